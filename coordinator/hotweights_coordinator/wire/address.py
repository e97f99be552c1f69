"""Endpoints: ``tcp://host:port``, lists of them, and what can be read off an address."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from hotweights_common import hosts
from hotweights_common.reasons import Reason
from hotweights_coordinator.wire.messages import CallRefused

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"

_ENDPOINT = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9*._-]+):(\d{1,5})")


class Endpoint(NamedTuple):
    """Where a socket is bound, or connects to."""

    host: str  # as it is written; IPv6 in brackets
    port: int  # 0: any, for a socket that is bound

    def __str__(self) -> str:
        return f"tcp://{self.host}:{self.port}"

    @property
    def bare_host(self) -> str:
        return hosts.bare(self.host)


def parse(text: str) -> Endpoint:
    """Raises `CallRefused` with what an endpoint looks like."""
    found = _ENDPOINT.fullmatch(text.strip())
    if found is None:
        raise CallRefused(
            Reason.BAD_ENDPOINT, f"{text!r} is no endpoint; write it like {DEFAULT_ENDPOINT}"
        )
    if int(found[2]) > 65535:
        raise CallRefused(
            Reason.BAD_ENDPOINT,
            f"{text!r}: there is no port {found[2]}; give one up to 65535, like {DEFAULT_ENDPOINT}",
        )
    return Endpoint(found[1], int(found[2]))


def split(endpoints: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """A list, or text with commas, as endpoints without doubles, in that order. Raises
    `CallRefused` where one is none, or there is none.
    """
    texts = endpoints.split(",") if isinstance(endpoints, str) else endpoints
    found = tuple(dict.fromkeys(str(parse(text)) for text in texts if text.strip()))
    if not found:
        raise CallRefused(
            Reason.BAD_ENDPOINT, f"no endpoint is given; write it like {DEFAULT_ENDPOINT}"
        )
    return found


def events_endpoint(endpoint: str) -> str:
    """Where events are published unless it is said otherwise: the next port."""
    host, port = parse(endpoint)
    return str(Endpoint(host, port + 1 if port else 0))


def zone_of(host: str) -> str:
    """Addresses of one /24 (IPv6: /64) are near each other; a name tells nothing."""
    try:
        address = ipaddress.ip_address(hosts.bare(host))
    except ValueError:
        return ""
    return str(ipaddress.ip_network((address, 24 if address.version == 4 else 64), strict=False))
