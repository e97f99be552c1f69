"""One version's chunks from several donors at once.

All donors draw from one line of wanted chunks, so a quick one gets more of them and nobody plans
shares. What a donor leaves behind (it died, it lied, it lacks the chunk) goes to the others in the
next round; there is no next round without progress, so it ends. It knows peers by their protocol
only: sources, manifests and whoever is asked after the donors are the fetch's.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from hotweights_transports.peers.base import Deliver, Missing, PeerClient, PeerError, Want

log = logging.getLogger(__name__)

CONCURRENCY = 8  # each donor has a connection and a thread of its own


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
        return fetch_ranges_concurrent(
            self._donors, self._digest, wanted, deliver, concurrency=self._concurrency, cancel=stop
        )


class _Stripes:
    def __init__(
        self,
        donors: Sequence[PeerClient],
        digest: str,
        wanted: Iterator[Want],
        deliver: Deliver,
        cancel: threading.Event,
    ) -> None:
        self._useful = list(donors)
        self._digest = digest
        self._wanted = wanted
        self._deliver = deliver
        self._cancel = cancel
        self._lock = threading.Lock()  # of what follows
        self._left: deque[Want] = deque()  # came back from a donor
        # digest of a chunk that somebody lacks → whether anybody knows its version
        self._lacking: dict[str, bool] = {}
        self._last: PeerError | None = None

    def run(self, concurrency: int) -> list[Missing]:
        while not self._cancel.is_set():
            # the others stand in, in the next round, for those that failed
            asked = self._useful[:concurrency]
            with ThreadPoolExecutor(len(asked), thread_name_prefix="stripe") as executor:
                drawing = {donor: executor.submit(self._draw, donor) for donor in asked}
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
        taken: dict[str, Want] = {}
        missing: list[Missing] = []
        try:
            missing = donor.fetch_chunks(
                self._digest, self._wants(taken), partial(self._take_in, taken), cancel=self._cancel
            )
        except PeerError as error:
            log.warning("donor %s: %s", donor.address, error)
            self._last = error
            missing = []
        with self._lock:
            for gap in missing:
                self._lacking[gap.want.blake3] = (
                    self._lacking.get(gap.want.blake3, False) or gap.version_known
                )
            self._left.extend(taken.values())
        return not taken

    def _wants(self, taken: dict[str, Want]) -> Iterator[Want]:
        while True:
            with self._lock:
                want = self._left.popleft() if self._left else next(self._wanted, None)
                if want is None:
                    return
                taken[want.blake3] = want
            yield want

    def _take_in(self, taken: dict[str, Want], want: Want, data: memoryview) -> None:
        self._deliver(want, data)
        with self._lock:
            taken.pop(want.blake3, None)
