"""What this agent can serve peers over, and how fast each of it is here: for the operator, which
chooses.

The measurement is a third of a second over loopback, one chunk again and again, without hashing: it
compares what transports cost this host's processors. Where there is only one transport nothing is
measured. It knows no version and no peer.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

from blake3 import blake3

from hotweights_common import hosts
from hotweights_common.errors import HotweightsError
from hotweights_crds.nodeweights import Endpoint
from hotweights_storage.slab import sealed_memfd
from hotweights_transports import broadcast
from hotweights_transports.peers.base import (
    Authenticate,
    ChunkProvider,
    Identity,
    Lease,
    ServerLimits,
    Want,
)
from hotweights_transports.peers.registry import Availability, resolution, transport_for, transports

log = logging.getLogger(__name__)

MEASURED_SECONDS = 0.3  # it delays the agent's start
CHUNK_NBYTES = 4 << 20  # as manifests have them (docs/design/001-contracts.md)
# of no version that there is
VERSION = f"sha256:{hashlib.sha256(b'').hexdigest()}"


def listeners(ports: Mapping[str, int], address: str) -> list[str]:
    """Where to listen for peers, who connect to ``address``, by scheme: always TCP (port 0: any);
    another transport where it has a port and works.
    """
    on, host = _switched_on(ports), hosts.bracketed(hosts.anywhere(address))
    return [f"tcp://{host}:{ports['tcp']}"] + [
        f"{scheme}://{host}:{port}"
        for scheme, port in ports.items()
        if scheme != "tcp" and scheme in on and on[scheme].works
    ]


def describe(
    endpoints: Sequence[str], ports: Mapping[str, int], *, mpi: bool
) -> tuple[Endpoint, ...]:
    """Of what is listened at, of broadcasts, whose invitations are fetched over TCP, and of what is
    not there.
    """
    at = {urlsplit(endpoint).scheme: endpoint for endpoint in endpoints}
    because: dict[str, str] = {}
    on = _switched_on(ports)
    for scheme, transport in transports().items():
        if scheme in on:
            because[scheme] = on[scheme].because
        elif transport.between_hosts:
            because[scheme] = f"it is not switched on: {scheme}_port in the agent's settings"
    because["mpi"] = "it is not switched on: mpi in the agent's settings"
    if mpi:
        mpi_found = broadcast.availability()
        because["mpi"] = mpi_found.because
        if mpi_found.works and "tcp" in at:
            at["mpi"] = at["tcp"].replace("tcp", "mpi", 1)
    # one alone has nothing to be compared with
    rates = {scheme: _measured(scheme) for scheme in at} if len(at) > 1 else {}
    return tuple(
        Endpoint(
            scheme=scheme,
            endpoint=at.get(scheme, ""),
            megabytes_per_second=rates.get(scheme, 0),
            message=message,
        )
        for scheme, message in because.items()
    )


def _switched_on(ports: Mapping[str, int]) -> dict[str, Availability]:
    """TCP, and another transport where it has a port. Where there is none, nothing is loaded."""
    others = {scheme for scheme, port in ports.items() if scheme != "tcp" and port}
    if not others:
        return {"tcp": transports()["tcp"].available()}
    found = resolution()
    return {scheme: found[scheme] for scheme in ("tcp", *others)}


def _measured(scheme: str) -> int:
    try:
        return broadcast.measure() if scheme == "mpi" else measure(scheme)
    except (HotweightsError, OSError) as error:
        log.warning("%s was not measured: %s", scheme, error)
        return 0


def measure(scheme: str, seconds: float = MEASURED_SECONDS) -> int:
    """MB/s (10^6 bytes) from a server to a client in this process, over loopback, for so many
    seconds. Raises `PeerError` or `OSError`.
    """
    token = secrets.token_hex()
    one = _OneChunk()
    uri = f"{scheme}://127.0.0.1:0"
    arrived = 0

    def count(want: Want, _data: memoryview) -> None:
        nonlocal arrived
        arrived += want.nbytes

    try:
        with (
            transport_for(uri).listen(
                uri, one, _only(token), ServerLimits(max_connections=8)
            ) as server,
            transport_for(uri).connect(server.address, lambda: token) as client,
        ):
            # the first one makes connections and pages
            client.fetch_chunks(VERSION, [one.want], count)
            arrived, began = 0, time.monotonic()
            client.fetch_chunks(VERSION, _until(one.want, began + seconds), count)
            # 0 would say that it was not measured
            return max(1, int(arrived / (time.monotonic() - began) / 1e6))
    finally:
        one.close()


class _OneChunk(ChunkProvider):
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
    return lambda given: (
        Identity("self") if secrets.compare_digest(given.encode(), token.encode()) else None
    )


def _until(want: Want, deadline: float) -> Iterator[Want]:
    yield want  # one at least: a host that is busy may begin late
    while time.monotonic() < deadline:
        yield want
