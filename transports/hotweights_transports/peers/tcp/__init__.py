"""The TCP transport: always there, needs nothing but the standard library and BLAKE3."""

from __future__ import annotations

from collections.abc import Callable

from hotweights_transports.peers.base import (
    Authenticate,
    ChunkProvider,
    ClientLimits,
    PeerClient,
    PeerServer,
    Prove,
    ServerLimits,
)
from hotweights_transports.peers.registry import Availability, Transport
from hotweights_transports.peers.stream.client import StreamClient
from hotweights_transports.peers.stream.server import StreamServer


class TcpTransport(Transport):
    scheme = "tcp"

    def available(self) -> Availability:
        return Availability(True, "sockets are everywhere")

    def listen(
        self,
        uri: str,
        provider: ChunkProvider,
        authenticate: Authenticate,
        limits: ServerLimits | None = None,
        prove: Prove | None = None,
    ) -> PeerServer:
        return StreamServer(uri, provider, authenticate, limits or ServerLimits(), prove)

    def connect(
        self,
        uri: str,
        token: Callable[[], str],
        limits: ClientLimits | None = None,
        key: str = "",
    ) -> PeerClient:
        return StreamClient(uri, token, limits or ClientLimits(), key)


TRANSPORT = TcpTransport()
