"""The nodes' network: a bridge on the host, and a network namespace with a link to it for each
node.

Pods reach each other by plain routes (each node knows the others' pod ranges), the host reaches
pods the same way, and what leaves for the outside is masqueraded by the host, once. Everything here
can be said twice, and removing what is not there is no error: that is how a killed run is cleaned
up after.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from localcluster.host.commands import run, succeeds
from localcluster.host.slots import RUN, NodeAddresses, Slot

_NODE_LINK = "eth0"
_WAS_OFF = RUN / "forwarding-was-off"
_NETEM_HINT = "A delay needs the kernel's sch_netem; a rate alone does not."
_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


def namespace_file(node: NodeAddresses) -> Path:
    """Where `ip netns` keeps the node's network namespace."""
    return Path("/run/netns") / node.namespace


def start_forwarding() -> None:
    """Make the host forward packets, and note whether it did not before any cluster came."""
    if _FORWARDING.read_text().strip() == "0":
        _WAS_OFF.touch()
        _FORWARDING.write_text("1")


def stop_forwarding() -> None:
    """When the last cluster goes: as it was."""
    if _WAS_OFF.exists():
        _FORWARDING.write_text("0")
        _WAS_OFF.unlink()


def create_bridge(slot: Slot) -> None:
    """The host's side: bridge, address, the way out, and a way in for ClusterIPs."""
    run(["ip", "link", "add", slot.bridge, "type", "bridge"])
    run(["ip", "address", "add", f"{slot.gateway}/24", "dev", slot.bridge])
    run(["ip", "link", "set", slot.bridge, "up"])
    run(["ip", "route", "add", slot.service_cidr, "via", slot.node(0).address, "dev", slot.bridge])
    for rule in firewall_rules(slot):
        run(["iptables", "-w", "-t", rule[0], "-I", *rule[1:]])


def create_node(slot: Slot, node: NodeAddresses, others: Sequence[NodeAddresses]) -> None:
    """A node's side: namespace, link, and routes to the other nodes' pods and back."""
    run(["ip", "netns", "add", node.namespace])
    peer = ("peer", "name", _NODE_LINK, "netns", node.namespace)
    run(["ip", "link", "add", node.host_link, "type", "veth", *peer])
    run(["ip", "link", "set", node.host_link, "master", slot.bridge, "up"])
    inside = ["ip", "-netns", node.namespace]
    run([*inside, "link", "set", "lo", "up"])
    run([*inside, "address", "add", f"{node.address}/24", "dev", _NODE_LINK])
    run([*inside, "link", "set", _NODE_LINK, "up"])
    run([*inside, "route", "add", "default", "via", slot.gateway])
    for other in others:
        run([*inside, "route", "replace", other.pod_cidr, "via", other.address])
        run(
            [
                "ip",
                "-netns",
                other.namespace,
                "route",
                "replace",
                node.pod_cidr,
                "via",
                node.address,
            ]
        )
    run(["ip", "route", "replace", node.pod_cidr, "via", node.address, "dev", slot.bridge])
    settings = ("net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0")
    run(["nsenter", f"--net={namespace_file(node)}", "sysctl", "-qw", *settings])


def remove(slot: Slot, nodes: Sequence[NodeAddresses]) -> None:
    """Take away whatever of this is there. Links and routes go with their namespace or bridge."""
    for node in nodes:
        if namespace_file(node).exists():
            # A namespace lives as long as a process or a link end in it, so the link goes first, by
            # name.
            succeeds(["ip", "link", "delete", node.host_link])
            run(["ip", "netns", "delete", node.namespace])
    succeeds(["ip", "link", "delete", slot.bridge])
    for rule in firewall_rules(slot):
        while succeeds(["iptables", "-w", "-t", rule[0], "-D", *rule[1:]]):
            pass


def firewall_rules(slot: Slot) -> list[list[str]]:
    """Our rules in the host's tables, each as table, chain, match; the comment says whose they
    are.
    """
    mark = ["-m", "comment", "--comment", f"hotweights-localcluster-{slot.cluster}"]
    ours = ["!", "-o", slot.bridge]
    return [
        ["nat", "POSTROUTING", "-s", slot.pod_cidr, *ours, *mark, "-j", "MASQUERADE"],
        ["nat", "POSTROUTING", "-s", slot.node_cidr, *ours, *mark, "-j", "MASQUERADE"],
        ["filter", "FORWARD", "-i", slot.bridge, *mark, "-j", "ACCEPT"],
        ["filter", "FORWARD", "-o", slot.bridge, *mark, "-j", "ACCEPT"],
    ]


def set_link(node: NodeAddresses, *, up: bool) -> None:
    """Plug a node's cable in, or pull it out."""
    run(["ip", "link", "set", node.host_link, "up" if up else "down"])


def shape(node: NodeAddresses, *, rate: str | None, delay: str | None) -> None:
    """Give a node's link, in both directions, a rate (`100mbit`) and a delay (`5ms`) each; None for
    neither.
    """
    for tc, link in ((["tc"], node.host_link), (["tc", "-netns", node.namespace], _NODE_LINK)):
        succeeds([*tc, "qdisc", "delete", "dev", link, "root"])
        if rate or delay:
            run(
                [*tc, "qdisc", "add", "dev", link, "root", *queue(rate, delay)],
                hint=_NETEM_HINT if delay else "",
            )


def queue(rate: str | None, delay: str | None) -> list[str]:
    """tc's words for a queue. A rate alone is a token bucket, which every kernel has; netem is
    often left out.
    """
    if delay is None:
        return ["tbf", "rate", str(rate), "burst", "256kb", "latency", "50ms"]
    return ["netem", "delay", delay, *(["rate", rate, "limit", "20000"] if rate else [])]
