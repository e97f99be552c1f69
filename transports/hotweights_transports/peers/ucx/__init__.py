"""The UCX transport: the TCP transport's conversation, with the chunks on whatever network UCX
finds fastest.
"""

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
from hotweights_transports.peers.ucx.connection import UcxWire
from hotweights_transports.peers.ucx.library import Unavailable, live


class UcxServer(StreamServer):
    scheme = "ucx"
    wire_type = UcxWire


class UcxClient(StreamClient):
    scheme = "ucx"
    wire_type = UcxWire


class UcxTransport(Transport):
    scheme = "ucx"

    def available(self) -> Availability:
        try:
            return Availability(True, live())
        except Unavailable as error:
            return Availability(False, str(error))

    def listen(
        self,
        uri: str,
        provider: ChunkProvider,
        authenticate: Authenticate,
        limits: ServerLimits | None = None,
        prove: Prove | None = None,
    ) -> PeerServer:
        return UcxServer(uri, provider, authenticate, limits or ServerLimits(), prove)

    def connect(
        self,
        uri: str,
        token: Callable[[], str],
        limits: ClientLimits | None = None,
        key: str = "",
    ) -> PeerClient:
        return UcxClient(uri, token, limits or ClientLimits(), key)


TRANSPORT = UcxTransport()
