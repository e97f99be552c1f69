"""Whom a fetch asks for chunks, and in which order: parents first, then those that stand in for them,
and the origin last, unless this node is one that is to read it.

Whoever brings a version assembles its sources here: an agent's stager, ranks that replicate, a
process with a model of its own. It knows no version that is staged and no policy of a fetch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

from hotweights_agent.staging.striped_source import CONCURRENCY, StripedSource
from hotweights_planner.manifest import Chunk, Manifest
from hotweights_storage.reader import Limits, read_chunks
from hotweights_storage.source_reads import SourceReads
from hotweights_storage.sources.base import Source
from hotweights_transports.peers.base import ClientLimits, Deliver, Missing, PeerClient, Want
from hotweights_transports.peers.registry import transport_for

log = logging.getLogger(__name__)


def connected(
    stack: ExitStack,
    uris: Sequence[str],
    token: Callable[[], str],
    limits: ClientLimits | None = None,
    keys: Mapping[str, str] | None = None,
) -> list[PeerClient]:
    """Clients of these peers, closed with the stack; they connect at first use. Those of ``keys``
    (by address) have to prove that they have theirs. One that nobody can speak to from here is
    passed over, with a line in the log.
    """
    clients = []
    for uri in uris:
        try:
            client = transport_for(uri).connect(uri, token, limits, (keys or {}).get(uri, ""))
            clients.append(stack.enter_context(client))
        except ValueError as error:
            log.warning("a peer is passed over: %s", error)
    return clients


def in_order(
    peers: Sequence[PeerClient],
    origin: OriginSource,
    digest: str,
    parents: Collection[str] = (),
    donors_at_once: int = CONCURRENCY,
    reads_origin: bool = False,
) -> list[ChunkSource]:
    """The sources of one version, in the order in which they are asked. Several ``parents`` (by
    address) are donors of which each gives a stripe, so many of them at once. With ``reads_origin``
    the peers only stand in for the origin.
    """
    donors = [client for client in peers if client.address in parents]
    sources: list[ChunkSource] = []
    if len(donors) > 1:  # stripes; what is left, and the origin, stand in for them
        sources.append(StripedSource(donors, digest, donors_at_once))
        peers = [client for client in peers if client not in donors]
    sources += [PeerSource(client, digest) for client in peers]
    return [origin, *sources] if reads_origin else [*sources, origin]


class ChunkSource(Protocol):
    """Whence chunks come. `fetch` hands chunks to `deliver` or returns them as missing; a failure
    ends it by raising `PeerError`, `SourceRefused`, `SourceUnavailable` or `ChecksumMismatch`;
    anything else ends the whole fetch.
    """

    name: str

    def fetch(
        self, wanted: Iterator[Want], deliver: Deliver, stop: threading.Event
    ) -> list[Missing]: ...


class PeerSource:
    """Another node's agent, asked over whatever transport its endpoint names."""

    def __init__(self, client: PeerClient, digest: str) -> None:
        self.name = client.address
        self._client = client
        self._digest = digest

    def fetch(
        self, wanted: Iterator[Want], deliver: Deliver, stop: threading.Event
    ) -> list[Missing]:
        return self._client.fetch_chunks(self._digest, wanted, deliver, cancel=stop)


class OriginSource:
    """The place that the version comes from. It is opened when it is needed, because most nodes
    never need it.
    """

    def __init__(
        self,
        name: str,
        open_source: Callable[[], Source],
        manifest: Manifest,
        workers: int | None = None,
        reads: SourceReads | None = None,
    ) -> None:
        """``reads``: the process's, where it has several origins."""
        self.name = name
        self._open_source = open_source
        self._manifest = manifest
        self._workers = workers
        self._reads = reads or SourceReads()
        self._chunks: dict[str, Chunk] = {}

    def fetch(
        self, wanted: Iterator[Want], deliver: Deliver, stop: threading.Event
    ) -> list[Missing]:
        if not self._chunks:
            self._chunks = {chunk.blake3: chunk for chunk in self._manifest.chunks()}
            if (file := self._manifest.config_file) is not None:  # asked for like a chunk
                self._chunks[file.blake3] = Chunk(file.blake3, file.nbytes, file.name, 0, "", 0)

        def sink(chunk: Chunk, data: memoryview) -> None:
            deliver(Want(chunk.blake3, chunk.nbytes), data)

        def read(source: Source, limits: Limits) -> None:
            chunks = (self._chunks[want.blake3] for want in wanted)
            read_chunks(source, chunks, sink, self._workers, limits)

        self._reads.read(self.name, self._open_source, read, stop)
        return []
