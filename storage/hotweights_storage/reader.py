"""Reads chunks from a source with several threads and constant memory.

Chunks that are neighbours in a file become one large read (`spans`); each thread reads a span into
its own page-aligned buffer and gives its chunks, one by one, to whoever wants them. The buffers are
all the memory it takes. It neither verifies nor stores: publishing, verifying and staging differ
only in what they do with a chunk.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from hotweights_common.reasons import Reason
from hotweights_planner.manifest import PAGE_NBYTES, Chunk
from hotweights_storage import linux
from hotweights_storage.errors import Cancelled, SourceUnavailable
from hotweights_storage.sources.base import Source

SPAN_NBYTES = 8 << 20  # two chunks; each thread has a buffer of this size
# with their buffers 128 MiB: half of what an agent has in reserve (`StagingSettings.reserve_bytes`)
MAX_WORKERS = 16
MAX_GAP_NBYTES = 64 << 10  # reading over a gap is quicker than a second request

Sink = Callable[[Chunk, memoryview], None]
"""Takes one chunk's bytes, in a reader's thread, several at once. The view is valid during the call
only.
"""


def default_workers() -> int:
    """Enough to keep a disk busy while others hash and copy."""
    return max(8, min(MAX_WORKERS, 2 * linux.processors()))


@dataclass(slots=True)
class Limits:
    """When to stop: ``stop`` is set, from any thread, or ``deadline`` (seconds of
    ``time.monotonic``) has passed. It is looked at before each span.
    """

    stop: threading.Event = field(default_factory=threading.Event)
    deadline: float | None = None

    def check(self) -> None:
        """Raise `Cancelled` if it is time."""
        if self.stop.is_set():
            raise Cancelled("staging was cancelled")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise Cancelled("staging took longer than its deadline; allow more time, or read from "
                "fewer nodes at once",
                            Reason.DEADLINE_EXCEEDED)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Span:
    """``nbytes`` of one file from ``offset``, and the chunks in them."""

    file: str
    offset: int
    nbytes: int
    chunks: tuple[Chunk, ...]


def spans(chunks: Iterable[Chunk], max_nbytes: int = SPAN_NBYTES) -> Iterator[Span]:
    """``chunks``, which are in load order, in reads of at most ``max_nbytes`` (or one chunk)."""
    begun: list[Chunk] = []
    for chunk in chunks:
        if begun:
            first, last = begun[0], begun[-1]
            gap = chunk.offset - (last.offset + last.nbytes)
            if (
                chunk.file != first.file
                or not 0 <= gap <= MAX_GAP_NBYTES
                or chunk.offset + chunk.nbytes - first.offset > max_nbytes
            ):
                yield _span(begun)
                begun = []
        begun.append(chunk)
    if begun:
        yield _span(begun)


def read_chunks(
    source: Source,
    chunks: Iterable[Chunk],
    sink: Sink,
    workers: int | None = None,
    limits: Limits | None = None,
    failing: Callable[[BaseException], None] | None = None,
) -> None:
    """Give every chunk's bytes to ``sink``, from several threads (``workers``, and never more than
    `MAX_WORKERS`, whose buffers would take memory that nobody reserved), while the caller waits. The first
    error, of the source, the sink or the limits, ends it and is raised when all have stopped;
    ``failing`` hears of it at once, for a sink that would wait for a chunk that does not come any
    more. ``chunks`` is consumed in the threads, one at a time. A file that ends too early is
    `SourceUnavailable`.
    """
    _Pool(source, spans(chunks), sink, limits or Limits(), failing).run(
        min(workers or default_workers(), MAX_WORKERS)
    )


class _Pool:
    def __init__(
        self,
        source: Source,
        work: Iterator[Span],
        sink: Sink,
        limits: Limits,
        failing: Callable[[BaseException], None] | None,
    ) -> None:
        self._source = source
        self._work = work
        self._sink = sink
        self._limits = limits
        self._failing = failing
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []

    def run(self, workers: int) -> None:
        threads = [
            # daemons: a read that never returns must not keep the process from ending
            threading.Thread(target=self._read_all, name=f"hotweights-read-{n}", daemon=True)
            for n in range(workers)
        ]
        started: list[threading.Thread] = []
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
            for thread in started:
                thread.join()
        # Ctrl-C, no more threads: let the others stop before their buffers go
        except BaseException as error:
            self._fail(error)
            for thread in started:
                thread.join()
            raise
        if self._errors:
            raise self._errors[0]

    def _read_all(self) -> None:
        buffer = _Buffer()
        try:
            while (span := self._next()) is not None:
                self._read(span, buffer)
        except BaseException as error:  # noqa: BLE001  # belongs to the caller of read_chunks, which raises it
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._errors.append(error)
        if self._failing is not None:
            self._failing(error)

    def _next(self) -> Span | None:
        with self._lock:
            if self._errors:
                return None
            self._limits.check()
            return next(self._work, None)

    def _read(self, span: Span, buffer: _Buffer) -> None:
        # whole pages, at most two more than are needed: only so a source can read past the cache
        begin = span.offset // PAGE_NBYTES * PAGE_NBYTES
        end = -(-(span.offset + span.nbytes) // PAGE_NBYTES) * PAGE_NBYTES
        with buffer.view(end - begin) as view:
            done = self._source.read_into(span.file, begin, view)
            if begin + done < span.offset + span.nbytes:
                text = (
                    f"{self._source.uri}: {span.file} ends before byte "
                    f"{span.offset + span.nbytes}, which is a tensor's"
                )
                raise SourceUnavailable(f"{text}; copy the file again", Reason.SOURCE_TRUNCATED)
            for chunk in span.chunks:
                at = chunk.offset - begin
                with view[at : at + chunk.nbytes] as data:
                    self._sink(chunk, data)


class _Buffer:
    """Page-aligned memory of one thread, kept from read to read."""

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None

    def view(self, nbytes: int) -> memoryview:
        if self._map is None or len(self._map) < nbytes:
            # the usual span with its pages at both ends; a chunk may be larger
            self._map = mmap.mmap(-1, max(nbytes, SPAN_NBYTES + 2 * PAGE_NBYTES))
        return memoryview(self._map)[:nbytes]


def _span(chunks: list[Chunk]) -> Span:
    offset = chunks[0].offset
    return Span(
        chunks[0].file, offset, chunks[-1].offset + chunks[-1].nbytes - offset, tuple(chunks)
    )
