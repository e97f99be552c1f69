"""Scheme of a peer's URI → the transport that speaks it.

The modules of transports are found, not listed, and imported when the first is asked for. What a
native library needs is paid only where it is used; whether it can work here a transport says itself
(`Transport.available`), with the reason either way.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from typing import ClassVar
from urllib.parse import urlsplit

from hotweights_transports import peers
from hotweights_transports.peers.base import (
    Authenticate,
    ChunkProvider,
    ClientLimits,
    PeerClient,
    PeerServer,
    Prove,
    ServerLimits,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Availability:
    """Whether a transport works on this host, and why, or why not, for people to read."""

    works: bool
    because: str


class Transport(ABC):
    """One scheme of URIs. It keeps nothing of a connection, so any thread may call it at any time,
    also after an error.
    """

    scheme: ClassVar[str]
    between_hosts: ClassVar[bool] = True
    """Whether it leads out of this process."""

    @abstractmethod
    def available(self) -> Availability:
        """Called on either side before anything else. The first call may load a native library;
        what is missing is said, not raised.
        """

    @abstractmethod
    def listen(
        self,
        uri: str,
        provider: ChunkProvider,
        authenticate: Authenticate,
        limits: ServerLimits | None = None,
        prove: Prove | None = None,
    ) -> PeerServer:
        """Serve at `uri`, on the node that gives; the server's `address` is what to tell others.
        Without `prove`, pullers that want proof are refused. Raises `ValueError` for an address that is none, and `OSError` when it cannot be listened
        at.
        """

    @abstractmethod
    def connect(
        self,
        uri: str,
        token: Callable[[], str],
        limits: ClientLimits | None = None,
        key: str = "",
    ) -> PeerClient:
        """A client for `uri`, on the node that pulls; it connects at first use. `token` is asked at
        each connection, because tokens are renewed; from any thread of the client. With `key`
        (`proof.ServerKey.public`), each connection begins with the server's proof that it has that
        key and is at `uri`: where that fails, `token` is not even asked. Raises `ValueError` for an
        address that is none.
        """


@cache
def transports() -> Mapping[str, Transport]:
    """By scheme, every transport that there is: each module of this package with a `TRANSPORT`. One
    more is one more module. None of them loads a native library before it is asked for.
    """
    found: dict[str, Transport] = {}
    for module in pkgutil.iter_modules(peers.__path__, f"{peers.__name__}."):
        transport = getattr(importlib.import_module(module.name), "TRANSPORT", None)
        if isinstance(transport, Transport):
            found[transport.scheme] = transport
    return found


def transport_for(uri: str) -> Transport:
    """The transport of a URI's scheme. Raises `ValueError` for a scheme that nobody speaks, and
    where its transport cannot work here.
    """
    scheme = urlsplit(uri).scheme
    transport = transports().get(scheme)
    if transport is None:
        raise ValueError(
            f"{uri}: no transport for {scheme or 'an address without a scheme'}; there are "
            f"{sorted(transports())}"
        )
    availability = transport.available()
    if not availability.works:
        raise ValueError(
            f"{uri}: the transport {scheme} does not work here: {availability.because}"
        )
    return transport


def resolution() -> dict[str, Availability]:
    """What works here and why, logged: for the node's capabilities."""
    found = {scheme: one.available() for scheme, one in sorted(transports().items())}
    for scheme, availability in found.items():
        logger.info(
            "peers over %s: %s (%s)",
            scheme,
            "yes" if availability.works else "no",
            availability.because,
        )
    return found
