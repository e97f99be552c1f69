"""``tcp://host:port``, read and written, also with other schemes; IPv6 hosts in brackets."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from hotweights_common import hosts

BACKLOG = 128


def parse(uri: str, scheme: str = "tcp") -> tuple[str, int]:
    """Host (an IPv6 address without brackets) and port. Raises `ValueError` for anything more or
    less than ``scheme://host:port``.
    """
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{uri}: {error}; write {scheme}://host:port") from error
    if (
        parts.scheme != scheme
        or not host
        or port is None
        or parts.path
        or parts.query
        or parts.username is not None
    ):
        raise ValueError(
            f"{uri}: not an address of a {scheme.upper()} peer; write {scheme}://host:port"
        )
    return host, port


def form(host: str, port: int, scheme: str = "tcp") -> str:
    return f"{scheme}://{hosts.bracketed(host)}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, at a free port for port 0. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET  # only an IPv6 address has a colon
    return socket.create_server((host, port), family=family, backlog=BACKLOG)
