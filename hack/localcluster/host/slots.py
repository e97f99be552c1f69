"""Which addresses and kernel names a cluster with nodes may use on this machine.

Bridges, namespaces and routes belong to the machine, not to a folder, so clusters that live at once
must not choose the same. Each takes a numbered slot, written under /run (which, like them, a reboot
clears), and everything else follows from the number. A cluster that was killed finds its own slot
again by its name. Slots whose addresses the machine already routes elsewhere are passed over.
"""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path

from localcluster import paths
from localcluster.controlplane import Endpoints, free_endpoints
from localcluster.credentials import node_name
from localcluster.errors import ClusterError
from localcluster.host.commands import run

RUN = Path("/run/hotweights-localcluster")
"""Slots, and the mount namespaces of nodes."""

_NSLOTS = 16
_APISERVER_PORT = 6443
_LOCK_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class NodeAddresses:
    """One node: its address on the bridge, its pods' addresses, and its names in the kernel."""

    name: str
    address: str
    pod_cidr: str
    pod_gateway: str
    namespace: str  # under /run/netns
    host_link: str  # the host's end of the veth pair; at most 15 characters


@dataclass(frozen=True, slots=True)
class Slot:
    """A cluster's number on this machine, and what follows from it."""

    number: int
    cluster: str

    @property
    def bridge(self) -> str:
        """The host's bridge, to which every node has a link."""
        return f"hwlc{self.number}"

    @property
    def gateway(self) -> str:
        """The host's address on the bridge: the API server's, and the nodes' way out."""
        return f"10.200.{self.number}.1"

    @property
    def node_cidr(self) -> str:
        """The nodes' addresses."""
        return f"10.200.{self.number}.0/24"

    @property
    def pod_cidr(self) -> str:
        """All pods' addresses."""
        return f"10.{210 + self.number}.0.0/16"

    @property
    def service_cidr(self) -> str:
        """The ClusterIPs. On the host they lead to the first node, whose kube-proxy knows them."""
        return f"10.{96 + self.number}.0.0/16"

    def node(self, index: int) -> NodeAddresses:
        """The node with this number."""
        return NodeAddresses(
            name=node_name(index),
            address=f"10.200.{self.number}.{10 + index}",
            pod_cidr=f"10.{210 + self.number}.{index}.0/24",
            pod_gateway=f"10.{210 + self.number}.{index}.1",
            namespace=f"hotweights-{self.cluster}-{node_name(index)}",
            host_link=f"{self.bridge}n{index}",
        )

    def endpoints(self) -> Endpoints:
        """The control plane's, reachable from every node and pod."""
        spare = free_endpoints()
        return Endpoints(
            self.gateway,
            _APISERVER_PORT,
            spare.etcd_port,
            spare.etcd_peer_port,
            self.service_cidr,
            self.pod_cidr,
        )

    def networks(self) -> tuple[ipaddress.IPv4Network, ...]:
        """Everything that it routes."""
        return tuple(
            ipaddress.IPv4Network(cidr)
            for cidr in (self.node_cidr, self.pod_cidr, self.service_cidr)
        )


def claim(cluster: str, state: Path) -> Slot:
    """The cluster's slot: the one it has, or the first that is free."""
    with paths.locked(RUN / "lock", "choosing addresses", _LOCK_TIMEOUT_SECONDS):
        taken = _taken()
        if cluster in taken:
            return Slot(taken[cluster], cluster)
        routed = _routed()
        for number in range(_NSLOTS):
            slot = Slot(number, cluster)
            overlaps = any(ours.overlaps(theirs) for ours in slot.networks() for theirs in routed)
            if number not in taken.values() and not overlaps:
                claim = {"cluster": cluster, "state": str(state)}
                paths.write_atomically(RUN / "slots" / f"{number}.json", json.dumps(claim))
                return slot
    raise ClusterError(
        f"All {_NSLOTS} address ranges are taken: by clusters ({', '.join(taken) or 'none'}) "
        "or by this "
        "machine's routes (`ip route`). Take one down: python -m localcluster down --name NAME"
    )


def held(cluster: str) -> Slot | None:
    """The slot that the cluster has, if it has one."""
    number = _taken().get(cluster)
    return None if number is None else Slot(number, cluster)


def only(slot: Slot) -> bool:
    """Whether no other cluster is on this machine."""
    return set(_taken()) <= {slot.cluster}


def release(slot: Slot) -> None:
    """Give the slot back."""
    (RUN / "slots" / f"{slot.number}.json").unlink(missing_ok=True)


def _taken() -> dict[str, int]:
    files = (RUN / "slots").glob("*.json")
    return {json.loads(file.read_text())["cluster"]: int(file.stem) for file in sorted(files)}


def _routed() -> list[ipaddress.IPv4Network]:
    routes = json.loads(run(["ip", "-json", "-4", "route"]))
    return [
        ipaddress.IPv4Network(route["dst"], strict=False)
        for route in routes
        if route["dst"] != "default"
    ]
