"""One version's chunks from several donors at once.

All donors draw from one line of wanted chunks, so a quick one gets more of them and nobody plans
shares. When the line is empty, a quick donor is also asked for what a slow one still owes, and
whoever brings it first ends the other's wait. What a donor leaves behind (it died, it lacks the
chunk) goes to the others in the next round; there is no next round without progress, so it ends. A
donor that lied is not asked again. It knows peers by their protocol only: sources, manifests and
whoever is asked after the donors are the fetch's.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

from hotweights_transports.peers.base import (
    Deliver,
    Missing,
    PeerClient,
    PeerCorrupt,
    PeerError,
    Want,
)

log = logging.getLogger(__name__)

CONCURRENCY = 8  # each donor has a connection and a thread of its own
TICK_SECONDS = 0.1  # how late a cancellation is noticed
FAR_QUICKER = 2.0  # by so much before a chunk is asked for twice


def fetch_ranges_concurrent(
    donors: Sequence[PeerClient],
    digest: str,
    wanted: Iterator[Want],
    deliver: Deliver,
    *,
    concurrency: int = CONCURRENCY,
    cancel: threading.Event | None = None,
) -> list[Missing]:
    """As `PeerClient.fetch_chunks`, from ``concurrency`` donors at a time; the others stand in for
    those that fail.

    Raises the last donor's `PeerError` when all have failed; what was not delivered then is still
    to be fetched.
    """
    return _Stripes(donors, digest, wanted, deliver, cancel or threading.Event()).run(concurrency)


class StripedSource:
    """Several donors as one source of a fetch."""

    def __init__(
        self, donors: Sequence[PeerClient], digest: str, concurrency: int = CONCURRENCY
    ) -> None:
        self.name = ",".join(donor.address for donor in donors)
        self._donors = donors
        self._digest = digest
        self._concurrency = concurrency

    def fetch(
        self, wanted: Iterator[Want], deliver: Deliver, stop: threading.Event
    ) -> list[Missing]:
        """As `chunk_sources.ChunkSource` promises, from several donors at a time."""
        stripes = _Stripes(self._donors, self._digest, wanted, deliver, stop)
        try:
            return stripes.run(self._concurrency)
        finally:
            honest = [donor for donor in self._donors if donor not in stripes.liars]
            # with none left its `PeerCorrupt` keeps the fetch from asking this source again
            self._donors = honest or self._donors


@dataclasses.dataclass(slots=True)
class _Draw:
    """One donor's part of a round."""

    began: float
    owed: dict[str, Want] = dataclasses.field(default_factory=dict)  # asked for, in that order
    nbytes: int = 0  # that it brought

    def rate(self, now: float) -> float:
        """Bytes per second so far."""
        return self.nbytes / max(now - self.began, 1e-6)


class _Stripes:
    def __init__(
        self,
        donors: Sequence[PeerClient],
        digest: str,
        wanted: Iterator[Want],
        deliver: Deliver,
        cancel: threading.Event,
    ) -> None:
        self.liars: list[PeerClient] = []
        self._useful = list(donors)
        self._digest = digest
        self._wanted = wanted
        self._deliver = deliver
        self._cancel = cancel
        self._lock = threading.Lock()  # of what follows
        self._left: deque[Want] = deque()  # came back from a donor
        self._draws: dict[PeerClient, _Draw] = {}  # of the round under way
        self._brought: set[str] = set()  # by whom does not matter; also what is being delivered
        self._twice: set[str] = set()  # asked for a second time
        self._dry = False  # nothing more is wanted than what is owed by now
        self._over = threading.Event()  # of the round: nobody owes anything any more
        # digest of a chunk that somebody lacks → whether anybody knows its version
        self._lacking: dict[str, bool] = {}
        self._last: PeerError | None = None

    def run(self, concurrency: int) -> list[Missing]:
        while not self._cancel.is_set():
            # the others stand in, in the next round, for those that failed
            asked = self._useful[:concurrency]
            self._over.clear()
            now = time.monotonic()
            self._draws = {donor: _Draw(now) for donor in asked}
            with ThreadPoolExecutor(len(asked), thread_name_prefix="stripe") as executor:
                drawing = {donor: executor.submit(self._draw, donor) for donor in asked}
                while wait(drawing.values(), TICK_SECONDS).not_done:
                    if self._cancel.is_set():
                        self._over.set()
            whole = {donor: drawn.result() for donor, drawn in drawing.items()}
            if not self._left:  # nothing came back, so all has come
                return []
            self._useful = [donor for donor in self._useful if whole.get(donor, True)]
            if not self._useful:
                break
        if self._last is not None and not self._lacking:
            raise self._last
        return [Missing(want, self._lacking.get(want.blake3, True)) for want in self._left]

    def _draw(self, donor: PeerClient) -> bool:
        """One donor, until there is nothing more to draw; whether it gave all that it was asked
        for.
        """
        missing: list[Missing] = []
        draw = self._draws[donor]
        try:
            missing = donor.fetch_chunks(
                self._digest, self._wants(draw), partial(self._take_in, draw), cancel=self._over
            )
        except PeerError as error:
            log.warning("donor %s: %s", donor.address, error)
            if isinstance(error, PeerCorrupt):
                self.liars.append(donor)
            if self._last is None or not isinstance(error, PeerCorrupt):
                self._last = error
        with self._lock:
            for gap in missing:
                self._lacking[gap.want.blake3] = (
                    self._lacking.get(gap.want.blake3, False) or gap.version_known
                )
            del self._draws[donor]
            owed = [want for name, want in draw.owed.items() if name not in self._brought]
            # what another one owes too is that one's from now on
            elsewhere = {name for other in self._draws.values() for name in other.owed}
            self._left.extend(want for want in owed if want.blake3 not in elsewhere)
            return not owed

    def _wants(self, draw: _Draw) -> Iterator[Want]:
        while True:
            with self._lock:
                want = self._left.popleft() if self._left else next(self._wanted, None)
                if want is None:
                    self._dry = True
                    want = self._owed_by_a_slow_one(draw)
                if want is None:
                    return
                draw.owed[want.blake3] = want
            yield want

    def _owed_by_a_slow_one(self, draw: _Draw) -> Want | None:
        """What is farthest from coming: the last that the slowest donor owes."""
        now = time.monotonic()
        slower = [
            other
            for other in self._draws.values()
            if other is not draw and other.rate(now) * FAR_QUICKER < draw.rate(now)
        ]
        for other in sorted(slower, key=lambda other: other.rate(now)):
            for name in reversed(other.owed):
                if name not in self._brought and name not in self._twice:
                    self._twice.add(name)
                    return other.owed[name]
        return None

    def _take_in(self, draw: _Draw, want: Want, data: memoryview) -> None:
        with self._lock:
            if want.blake3 in self._brought:  # another one was quicker
                draw.owed.pop(want.blake3, None)
                return
            self._brought.add(want.blake3)
        kept = False
        try:
            self._deliver(want, data)
            kept = True
        finally:
            with self._lock:
                if kept:
                    draw.nbytes += want.nbytes
                    draw.owed.pop(want.blake3, None)
                else:
                    self._brought.discard(want.blake3)
                if self._is_all_here():
                    self._over.set()

    def _is_all_here(self) -> bool:
        return (
            self._dry
            and not self._left
            and all(name in self._brought for draw in self._draws.values() for name in draw.owed)
        )
