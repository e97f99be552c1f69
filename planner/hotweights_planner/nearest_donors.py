"""Which of those who have a version are asked for it: the nearest.

Near is what an address tells: the same host, the same zone (or /24, where nobody names zones), the
same /16, anything else. Among equals everybody has an order of his own, so that a crowd of
newcomers does not fall upon one donor. Pure; it opens nothing.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from hotweights_common import hosts


class Distance(IntEnum):
    """How far apart two hosts are; less is nearer."""

    SAME_HOST = 0
    SAME_ZONE = 1
    SAME_NETWORK = 2
    ELSEWHERE = 3


@dataclass(frozen=True, slots=True)
class Spot:
    """Where somebody is. ``address`` is an IP address or a name, ``zone`` what an operator calls
    the neighbourhood.
    """

    name: str
    address: str
    zone: str = ""


def distance(here: Spot, there: Spot) -> Distance:
    """How far ``there`` is from ``here``. Zones count before addresses, where both have one."""
    if here.address == there.address or hosts.is_loopback(
        there.address
    ):  # who tells us his loopback address is on this host
        return Distance.SAME_HOST
    if here.zone and there.zone:
        if here.zone == there.zone:
            return Distance.SAME_ZONE
    elif _same_network(here.address, there.address, 24):
        return Distance.SAME_ZONE
    return (
        Distance.SAME_NETWORK
        if _same_network(here.address, there.address, 16)
        else Distance.ELSEWHERE
    )


def nearest_first(here: Spot, others: Iterable[Spot]) -> list[Spot]:
    """``others`` in the order in which they are asked: by distance, then in an order that is
    ``here``'s own and always the same.
    """
    return sorted(others, key=lambda other: (distance(here, other), _turn(here, other)))


def choose(here: Spot, others: Iterable[Spot], at_least: int = 2, at_most: int = 8) -> list[Spot]:
    """All of the nearest, and farther ones only until there are ``at_least``; in no case more than
    ``at_most``, which is how many peers the schema of NodeWeights lists.
    """
    ordered = nearest_first(here, others)
    near = sum(1 for other in ordered if distance(here, other) == distance(here, ordered[0]))
    return ordered[: min(max(near, at_least), at_most)]


def _turn(here: Spot, other: Spot) -> bytes:
    # a digest instead of chance, so that equal input gives an equal plan
    return hashlib.sha256(f"{here.name}\0{other.name}".encode()).digest()


def _same_network(one: str, other: str, bits: int) -> bool:
    """IPv6 networks are four times as long: /64 stands for /24's neighbourhood, /48 for /16's."""
    try:
        first, second = ipaddress.ip_address(one), ipaddress.ip_address(other)
    except ValueError:  # a host's name, which tells nothing of its network
        return False
    if first.version != second.version:
        return False
    prefix = bits if first.version == 4 else {24: 64, 16: 48}[bits]
    return second in ipaddress.ip_network((first, prefix), strict=False)
