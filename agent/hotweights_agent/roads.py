"""What this agent can serve peers over, and how fast each of it is here: for the operator, which chooses.

The measurement is a third of a second over loopback, one chunk again and again, without hashing: it compares what transports cost this
host's processors. Where there is only one transport nothing is measured. It knows no version and no peer.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from blake3 import blake3

from hotweights_crds.nodeweights import Endpoint
from hotweights_transports.peers.base import (
    Authenticate,
    ChunkProvider,
    ClientLimits,
    Identity,
    Lease,
    PeerError,
    ServerLimits,
    Want,
)
from hotweights_transports.peers.registry import resolution, transport_for
from hotweights_transports.slab import sealed_memfd

log = logging.getLogger(__name__)

MEASURED_SECONDS = 0.3
CHUNK_NBYTES = 4 << 20
VERSION = f"sha256:{hashlib.sha256(b'').hexdigest()}"


def listeners(port: int, ucx_port: int) -> list[str]:
    """Where to listen for peers: always TCP; UCX where it is asked for (``ucx_port`` not 0) and works."""
    found = [f"tcp://0.0.0.0:{port}"]
    if ucx_port and resolution()["ucx"].works:
        found.append(f"ucx://0.0.0.0:{ucx_port}")
    return found


def describe(endpoints: Sequence[str], ucx_port: int) -> tuple[Endpoint, ...]:
    """Of what is listened at, and of UCX where it is not."""
    because = {"tcp": "sockets are everywhere", "ucx": "it is not switched on: ucx_port in the agent's settings"}
    if ucx_port:
        because["ucx"] = resolution()["ucx"].because
    at = {urlsplit(endpoint).scheme: endpoint for endpoint in endpoints}
    return tuple(
        Endpoint(
            scheme=scheme,
            endpoint=at.get(scheme, ""),
            megabytes_per_second=measure(scheme) if scheme in at and len(at) > 1 else 0,
            message=because[scheme],
        )
        for scheme in ("tcp", "ucx")
    )


def measure(scheme: str, seconds: float = MEASURED_SECONDS) -> int:
    """MB/s over loopback; 0 where it did not work after all."""
    token = secrets.token_hex()
    one = _One()
    uri = f"{scheme}://127.0.0.1:0"
    arrived = 0

    def count(want: Want, _data: memoryview) -> None:
        nonlocal arrived
        arrived += want.nbytes

    try:
        with (
            transport_for(uri).listen(uri, one, _only(token), ServerLimits(max_connections=4)) as server,
            transport_for(uri).connect(server.address, lambda: token, ClientLimits(streams=1)) as client,
        ):
            client.fetch_chunks(VERSION, [one.want], count)  # the first one makes connections and pages
            arrived, began = 0, time.monotonic()
            client.fetch_chunks(VERSION, _until(one.want, began + seconds), count)
            return int(arrived / (time.monotonic() - began) / 1e6)
    except (PeerError, OSError) as error:
        log.warning("peers over %s: not measured: %s", scheme, error)
        return 0
    finally:
        one.close()


class _One(ChunkProvider):
    """Has one chunk."""

    def __init__(self) -> None:
        content = os.urandom(CHUNK_NBYTES)
        self._slab = sealed_memfd(content, "hotweights-measure")
        self.want = Want(blake3(content).hexdigest(), CHUNK_NBYTES)

    def locate(self, blake3: str) -> Lease | None:
        if blake3 != self.want.blake3:
            return None
        return Lease(self._slab.fd, 0, self.want.nbytes, lambda: None, sealed=True)

    def manifest(self, digest: str) -> bytes | None:
        return b"" if digest == VERSION else None

    def close(self) -> None:
        self._slab.release()


def _only(token: str) -> Authenticate:
    return lambda given: Identity("self") if secrets.compare_digest(given.encode(), token.encode()) else None


def _until(want: Want, deadline: float) -> Iterator[Want]:
    while time.monotonic() < deadline:
        yield want
