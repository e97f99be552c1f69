"""The configuration files of a node's three daemons, as pure functions of its addresses and
folders.

Every line that differs from the defaults is here because a node of this cluster shares its kernel
with the others, or because this machine has traps of its own; each says which.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from localcluster.host.slots import NodeAddresses

PAUSE_IMAGE = "localhost/pause:1"
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
CNI_PROGRAMS = "/usr/lib/cni"

_CAP_SYS_RESOURCE = 24
_RUNTIME = "plugins.'io.containerd.cri.v1.runtime'"


def may_lower_oom_scores(status: str) -> bool:
    """Whether a process with this /proc/PID/status may make itself less likely to be killed for
    memory.
    """
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> _CAP_SYS_RESOURCE & 1)


def containerd(cni_folder: Path, *, restrict_oom_scores: bool) -> str:
    """containerd's TOML. Where scores cannot be lowered, every sandbox would die without the
    restriction.
    """
    return f"""\
version = 3
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
address = "{CONTAINERD_SOCKET}"

[{_RUNTIME}]
restrict_oom_score_adj = {str(restrict_oom_scores).lower()}

[{_RUNTIME}.cni]
bin_dirs = ["{CNI_PROGRAMS}"]
conf_dir = "{cni_folder}"

[{_RUNTIME}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[{_RUNTIME}.containerd.runtimes.runc.options]
SystemdCgroup = false

[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "{PAUSE_IMAGE}"
"""


def cni(node: NodeAddresses) -> str:
    """The pods' network: a bridge in the node. No masquerading, so that peers see each other's
    addresses.
    """
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": node.pod_cidr, "gateway": node.pod_gateway}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    return _json({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, ports]})


def kubelet(
    cgroup: str,
    client_authority: Path,
    resolv_conf_file: Path,
    name_servers: list[str],
    most_restart_seconds: int | None = None,
) -> str:
    """The kubelet's configuration. It asks the API server who may read logs and exec, as it
    should. A container that ends again and again waits ``most_restart_seconds`` at most, or five
    minutes, which is a kubelet's own most.
    """
    crash_loop = {"maxContainerRestartPeriod": f"{most_restart_seconds}s"}
    return _json(
        {
            **({"crashLoopBackOff": crash_loop} if most_restart_seconds else {}),
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": "0.0.0.0",  # or `kubectl logs` does not reach it
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(client_authority)},
            },
            "authorization": {"mode": "Webhook"},
            "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{cgroup}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": [],  # nodes share one machine: each believes it has all of it
            "oomScoreAdj": 0,
            "resolvConf": str(resolv_conf_file),
            # none of our own: pods ask the host's; without any, each pod is warned about
            "clusterDNS": name_servers,
            "maxPods": 110,
            "serializeImagePulls": False,
            # The machine's disk is shared and may be full of other things; images come back only by
            # hand.
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "evictionHard": {
                "memory.available": "100Mi",
                "nodefs.available": "1%",
                "nodefs.inodesFree": "1%",
                "imagefs.available": "1%",
            },
            "volumePluginDir": "/var/lib/kubelet/volume-plugins",
            "logging": {"verbosity": 1},
        }
    )


def kube_proxy(node: NodeAddresses, cluster_cidr: str, kubeconfig: Path) -> str:
    """kube-proxy's configuration. Its conntrack limits are the kernel's, not a namespace's: left
    alone.
    """
    return _json(
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "iptables",
            "clusterCIDR": cluster_cidr,
            "hostnameOverride": node.name,
            "clientConnection": {"kubeconfig": str(kubeconfig)},
            "oomScoreAdj": 0,
            "conntrack": {
                "maxPerCore": 0,
                "min": 0,
                "tcpEstablishedTimeout": "0s",
                "tcpCloseWaitTimeout": "0s",
            },
        }
    )


def name_servers(resolv_conf_text: str) -> list[str]:
    """The addresses in a resolv.conf."""
    lines = (line.split() for line in resolv_conf_text.splitlines())
    return [words[1] for words in lines if words[:1] == ["nameserver"] and len(words) > 1]


def resolv_conf(host: str) -> str:
    """The host's name servers, less those that only the host can reach."""
    lines = [line.strip() for line in host.splitlines()]
    return "".join(
        f"{line}\n"
        for line in lines
        if line.startswith(("nameserver ", "search ", "options "))
        and not line.startswith(("nameserver 127.", "nameserver ::1"))
    )


def _json(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2) + "\n"
