"""What can be read off a host's name or address, with or without an IPv6 address's brackets. Nobody
is asked.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def bare(host: str) -> str:
    """Without brackets, as sockets want it."""
    return host.removeprefix("[").removesuffix("]")


def bracketed(host: str) -> str:
    """As it stands before ``:port`` (RFC 3986, section 3.2.2)."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def anywhere(host: str) -> str:
    """The wildcard of an address's family: where to listen so that others get through to it."""
    return "::" if ":" in host else "0.0.0.0"


def same(host: str) -> str:
    """One spelling for all of an address's, so that two can be compared; a name as it is."""
    try:
        return str(ipaddress.ip_address(bare(host)))
    except ValueError:
        return host


def of_endpoint(endpoint: str) -> str:
    """The host of ``scheme://host:port``, spelled as `same` does; empty where there is none."""
    try:
        return same(urlsplit(endpoint).hostname or "")
    except ValueError:  # brackets that hold no address
        return ""


def is_loopback(host: str) -> bool:
    """Whether it reaches this machine only. A name other than ``localhost`` might be anybody's."""
    try:
        return ipaddress.ip_address(bare(host)).is_loopback
    except ValueError:
        return host == "localhost"


def is_wildcard(host: str) -> bool:
    """Whether listening there is listening on every address. ``*`` is ZeroMQ's word for it."""
    return bare(host) in ("*", "0.0.0.0", "::")
