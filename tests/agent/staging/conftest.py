"""Versions small enough to stage hundreds of them, and nodes that talk in one process."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pytest
from blake3 import blake3

from hotweights_agent.staging.chunk_sources import ChunkSource
from hotweights_agent.staging.store import Store
from hotweights_planner.header import TensorEntry
from hotweights_planner.manifest import PAGE_NBYTES, Manifest, build
from hotweights_storage.errors import SourceUnavailable
from hotweights_transports.peers.base import (
    ClientLimits,
    Deliver,
    Identity,
    Missing,
    PeerClient,
    PeerServer,
    ServerLimits,
    Want,
)
from hotweights_transports.peers.registry import transport_for

TENSOR_PAGES = 4


@dataclass
class Checkpoint:
    """A version whose tensors have one chunk per page; `seeds` says what is in each tensor."""

    version: str
    seeds: tuple[int, ...]
    manifest: Manifest = field(init=False)
    data: dict[str, bytes] = field(init=False, default_factory=dict)  # by BLAKE3

    def __post_init__(self) -> None:
        entries: list[TensorEntry] = []
        chunks: dict[str, list[str]] = {}
        nbytes = TENSOR_PAGES * PAGE_NBYTES
        for number, seed in enumerate(self.seeds):
            name = f"model.layers.{number}.weight"
            content = random.Random(seed).randbytes(nbytes)
            entries.append(TensorEntry(name, "U8", (nbytes,), nbytes, number * nbytes))
            pieces = [content[at : at + PAGE_NBYTES] for at in range(0, nbytes, PAGE_NBYTES)]
            chunks[name] = [blake3(piece).hexdigest() for piece in pieces]
            self.data.update(zip(chunks[name], pieces, strict=True))
        self.manifest = build(
            "tiny", self.version, {"model.safetensors": entries}, chunks, chunk_nbytes=PAGE_NBYTES
        )

    @property
    def nbytes(self) -> int:
        return len(self.data) * PAGE_NBYTES


@dataclass
class TableSource:
    """Gives chunks out of a dictionary, and does what a test wants before each."""

    data: Mapping[str, bytes]
    name: str = "table"
    before: Callable[[Want], None] = lambda want: None
    pending: list[str] = field(default_factory=list)
    calls: int = 0
    version_known: bool = True

    def fetch(
        self, wanted: Iterator[Want], deliver: Deliver, stop: threading.Event
    ) -> list[Missing]:
        self.calls += 1
        missing = []
        for want in wanted:
            self.pending.append(want.blake3)
            self.before(want)
            if want.blake3 in self.data:
                deliver(want, memoryview(self.data[want.blake3]))
            else:
                missing.append(Missing(want, self.version_known))
        return missing


class Dead:
    """A source that is not there."""

    name = "dead"
    calls = 0

    def fetch(
        self, wanted: Iterator[Want], deliver: Deliver, stop: threading.Event
    ) -> list[Missing]:
        self.calls += 1
        raise SourceUnavailable("the disk is gone")


@pytest.fixture
def checkpoint() -> Callable[..., Checkpoint]:
    return Checkpoint


@pytest.fixture
def table() -> Callable[..., ChunkSource]:
    return TableSource


@pytest.fixture
def dead() -> Callable[[], ChunkSource]:
    return Dead


@pytest.fixture
def store() -> Iterator[Store]:
    found = Store(available=lambda: 1 << 30)
    yield found
    for version in found.versions():
        found.release(version.digest)


@pytest.fixture
def serve() -> Iterator[Callable[[Store], PeerServer]]:
    servers: list[PeerServer] = []

    def start(store: Store) -> PeerServer:
        uri = "tcp://127.0.0.1:0"
        limits = ServerLimits(waiting_seconds=0.05)
        servers.append(
            transport_for(uri).listen(
                uri, store, lambda token: Identity(token) if token else None, limits
            )
        )
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def connect() -> Iterator[Callable[[str], PeerClient]]:
    clients: list[PeerClient] = []

    def start(address: str) -> PeerClient:
        # far above what a busy machine takes: no test here waits for them
        limits = ClientLimits(streams=2, window_chunks=8, silence_seconds=10, stall_seconds=20)
        clients.append(transport_for(address).connect(address, lambda: "agent", limits))
        return clients[-1]

    yield start
    for client in clients:
        client.close()
