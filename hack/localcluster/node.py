"""One node: a network and a mount namespace with containerd, a kubelet and kube-proxy inside.

Its daemons join a cgroup of the node's own, and its pods are put into the same subtree; so the
whole node can be counted, crashed and removed as one. The helpers for bad days are here: kill the
kubelet, pull the cable, slow the link, crash everything.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from localcluster import binaries, credentials, nodeconfig, paths
from localcluster.api import Refused, Unreachable
from localcluster.controlplane import ControlPlane
from localcluster.credentials import node_user
from localcluster.host import cgroups, mounts, network
from localcluster.host.commands import run, succeeds
from localcluster.host.processes import Daemons
from localcluster.host.slots import NodeAddresses, Slot

CONTAINERD, KUBELET, KUBE_PROXY = "containerd", "kubelet", "kube-proxy"

_CONTAINERD_WITHIN_SECONDS = 60.0
_READY_WITHIN_SECONDS = 120.0
_IMPORT_TIMEOUT_SECONDS = 600.0


class Node:
    """A node of a cluster, addressed by its number."""

    def __init__(
        self,
        control_plane: ControlPlane,
        slot: Slot,
        index: int,
        nodes: int,
        most_restart_seconds: int | None = None,
    ) -> None:
        self.addresses: NodeAddresses = slot.node(index)
        self.name = self.addresses.name
        self._control_plane = control_plane
        self._slot = slot
        self._state = control_plane.state / self.name
        self._daemons: Daemons = control_plane.daemons
        self._cgroup = f"{cgroups.name_of(slot.cluster)}/{self.name}"
        # A node has its cores to itself, as a machine has: engines spin while they serve, and would
        # starve one another.
        self._cpus = cgroups.share_of(os.sched_getaffinity(0), index, nodes)
        self._most_restart_seconds = most_restart_seconds
        self._kubelet_started = datetime.min.replace(tzinfo=UTC)

    def daemon(self, program: str) -> str:
        """The name under which one of the node's daemons is on record; its log has the same."""
        return f"{self.name}-{program}"

    @property
    def daemon_names(self) -> list[str]:
        """All of the node's daemons."""
        return [self.daemon(program) for program in (CONTAINERD, KUBELET, KUBE_PROXY)]

    def start(self) -> None:
        """Start what does not run yet. Needs the node's network; returns once containerd takes
        images.
        """
        self._configure()
        cgroups.create(f"{self._cgroup}/daemons")
        if not succeeds([*self.enter(), "true"]):
            mounts.create(self._slot.cluster, self.name, self._state)
        self.start_containerd()

    def start_containerd(self) -> None:
        """Start containerd, if it does not run, and wait until it answers."""
        self._start(CONTAINERD, ["--config", self._state / "containerd.toml"])
        self._daemons.wait_until(
            lambda: succeeds([*self.ctr(), "version"]),
            f"containerd of {self.name} answers",
            needs=[self.daemon(CONTAINERD)],
            timeout_seconds=_CONTAINERD_WITHIN_SECONDS,
        )

    def start_kubelet(self) -> None:
        """Start the kubelet and kube-proxy, if they do not run."""
        kubeconfig = self._control_plane.kubeconfig_of(node_user(self.name))
        self._kubelet_started = datetime.now(UTC)
        self._start(
            KUBELET,
            [
                f"--config={self._state / 'kubelet.json'}",
                f"--kubeconfig={kubeconfig}",
                f"--hostname-override={self.name}",
                f"--node-ip={self.addresses.address}",
            ],
        )
        self._start(KUBE_PROXY, [f"--config={self._state / 'kube-proxy.json'}"])

    def kill_kubelet(self) -> None:
        """SIGKILL to the kubelet. Pods go on, and the node is NotReady after the grace period."""
        self._daemons.stop(self.daemon(KUBELET), grace_seconds=0)

    def crash(self) -> None:
        """Everything on the node dies at once, containers and /run included, as when a machine
        loses power.
        """
        for program in (KUBELET, KUBE_PROXY, CONTAINERD):
            self._daemons.stop(self.daemon(program), grace_seconds=0)
        cgroups.kill(self._cgroup)
        mounts.remove_node(self._slot.cluster, self.name)

    def restart(self) -> None:
        """Start the node again after `crash` or `kill_kubelet`."""
        self.start()
        self.start_kubelet()

    def unplug(self) -> None:
        """Pull the node's network cable."""
        network.set_link(self.addresses, up=False)

    def plug(self) -> None:
        """Plug it in again."""
        network.set_link(self.addresses, up=True)

    def shape(self, *, rate: str | None = None, delay: str | None = None) -> None:
        """Slow the node's link: a rate (`100mbit`) and a delay (`5ms`) in each direction; without
        either, full speed.
        """
        network.shape(self.addresses, rate=rate, delay=delay)

    def ready(self) -> bool:
        """Whether the API server believes that the node is ready."""
        try:
            node = self._control_plane.api.get(f"/api/v1/nodes/{self.name}")
        except (Unreachable, Refused):
            return False
        conditions = node.get("status", {}).get("conditions", [])
        return any(
            condition["type"] == "Ready" and condition["status"] == "True"
            for condition in conditions
        )

    def wait_ready(self) -> None:
        """Wait until the node is ready, as this kubelet says, and no longer if one of its daemons
        dies.
        """
        self._daemons.wait_until(
            lambda: self._heard() and self.ready(),
            f"{self.name} is ready",
            needs=self.daemon_names,
            timeout_seconds=_READY_WITHIN_SECONDS,
        )
        # the kubelet makes it, with all cores
        cgroups.limit_cpus(f"{self._cgroup}/kubepods", self._cpus)

    def _heard(self) -> bool:
        """Whether the kubelet has renewed its lease since we started it; before, Ready is its
        predecessor's.
        """
        try:
            lease = self._control_plane.api.get(
                f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{self.name}"
            )
        except (Unreachable, Refused):
            return False
        return datetime.fromisoformat(lease["spec"]["renewTime"]) >= self._kubelet_started

    def load(self, archive: Path) -> None:
        """Import an image archive (docker or OCI) into the node's containerd."""
        # Through stdin, because the file's folder may look different inside the node.
        with archive.open("rb") as content:
            run(
                [*self.ctr(), "images", "import", "-"],
                file=content,
                timeout_seconds=_IMPORT_TIMEOUT_SECONDS,
            )

    def enter(self) -> list[str]:
        """The words that, put before a command, run it inside the node."""
        # Not `ip netns exec`: it mounts a new /sys, which hides the cgroups.
        mount_namespace = mounts.namespace_file(self._slot.cluster, self.name)
        return [
            "nsenter",
            f"--mount={mount_namespace}",
            f"--net={network.namespace_file(self.addresses)}",
        ]

    def ctr(self) -> list[str | Path]:
        """The words that, put before a verb, run containerd's client for this node's pods."""
        program = binaries.ensure(["ctr"])["ctr"]
        return [
            *self.enter(),
            program,
            "--address",
            nodeconfig.CONTAINERD_SOCKET,
            "--namespace",
            "k8s.io",
        ]

    def _start(self, program: str, arguments: list[str | Path]) -> None:
        programs = binaries.ensure([program, "containerd-shim-runc-v2"])
        search = [
            str(programs["containerd-shim-runc-v2"].parent),
            os.environ.get("PATH", ""),
            "/usr/sbin:/sbin",
        ]
        self._daemons.start(
            self.daemon(program),
            [*self.enter(), programs[program], *arguments],
            cgroups=[cgroups.to_join(f"{self._cgroup}/daemons")],
            environment={"PATH": ":".join(search)},
        )

    def _configure(self) -> None:
        proxy = self._control_plane.kubeconfig_of(credentials.PROXY)
        authority = self._control_plane.credentials.authority
        resolv_conf = nodeconfig.resolv_conf(Path("/etc/resolv.conf").read_text())
        lowerable = nodeconfig.may_lower_oom_scores(Path("/proc/self/status").read_text())
        files = {
            "containerd.toml": nodeconfig.containerd(
                self._state / "cni", restrict_oom_scores=not lowerable
            ),
            "cni/10-pods.conflist": nodeconfig.cni(self.addresses),
            "kubelet.json": nodeconfig.kubelet(
                self._cgroup,
                authority,
                self._state / "resolv.conf",
                nodeconfig.name_servers(resolv_conf),
                self._most_restart_seconds,
            ),
            "kube-proxy.json": nodeconfig.kube_proxy(self.addresses, self._slot.pod_cidr, proxy),
            "resolv.conf": resolv_conf,
        }
        for name, text in files.items():
            paths.write_atomically(self._state / name, text)
