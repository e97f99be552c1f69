"""Which chunk is to come from which source next: the account of one fetch.

Every chunk begins at the first source and moves on to the next one when a source lacks it or fails;
after the last source it begins again at the first, a bounded number of rounds. A source that gave
wrong bytes is not asked again. Within a source, chunks go out in load order, those that came back
from elsewhere too.

What a slow source has not been asked for yet may be lent to another one, from the end of the load
order, where it would come last. What the other one does not bring goes back to where it was, and
whoever lent it takes it up from the end when there is nothing else to ask it for: so they meet, and
one that turns out to hang holds up nothing.

Pure: no threads, no clock, no I/O. Whoever uses it from several threads brings the lock.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Collection, Sequence

from hotweights_transports.peers.base import Want


@dataclasses.dataclass(slots=True)
class _Entry:
    """One chunk that is still to come."""

    number: int  # in load order
    want: Want
    source: int = 0
    round: int = 0
    taken: bool = False
    lender: int | None = None  # whom it goes back to; it is in `_loans` of that one


class ChunkScheduler:
    """The account of one fetch: ``wants`` in load order, ``sources`` by number in the order in
    which they are asked, at most ``rounds`` times through all of them.
    """

    def __init__(self, wants: Sequence[Want], sources: int, rounds: int) -> None:
        if sources < 1 or rounds < 1:
            raise ValueError(
                f"{sources} sources and {rounds} rounds bring nothing; there must be at least one "
                "of each"
            )
        self._open = {want.blake3: _Entry(number, want) for number, want in enumerate(wants)}
        self._queues: list[list[int]] = [[] for _ in range(sources)]
        self._queues[0] = list(range(len(wants)))  # ascending numbers are a heap
        self._loans: list[set[int]] = [set() for _ in range(sources)]  # numbers, by lender
        self._wants = list(wants)
        self._rounds = rounds
        self._banned: set[int] = set()
        self.fetched_nbytes = [0] * sources
        self.exhausted: Want | None = None
        """A chunk that every source was asked for in vain, as often as there are rounds: the fetch
        has failed.
        """

    @property
    def done(self) -> bool:
        return not self._open

    def has_work(self, source: int) -> bool:
        return bool(self._loans[source]) or any(
            self._is_queued(number, source) for number in self._queues[source]
        )

    def is_banned(self, source: int) -> bool:
        return source in self._banned

    def take(self, source: int) -> Want | None:
        """The next chunk to ask `source` for; None: there is none now."""
        queue = self._queues[source]
        while queue:
            number = heapq.heappop(queue)
            if self._is_queued(number, source):
                entry = self._open[self._wants[number].blake3]
                entry.taken = True
                return entry.want
        if self._loans[source]:
            entry = self._open[self._wants[max(self._loans[source])].blake3]
            self._end_loan(entry)
            entry.source, entry.taken = source, True
            return entry.want
        return None

    def arrived(self, source: int, blake3: str) -> None:
        """It is verified and stored, whoever was asked for it."""
        # None: it has come twice, from the old source after it had moved on
        if (entry := self._open.pop(blake3, None)) is not None:
            self.fetched_nbytes[source] += entry.want.nbytes
            self._end_loan(entry)

    def waiting_nbytes(self, source: int) -> int:
        """What is to come from `source` and was not asked for yet."""
        return sum(entry.want.nbytes for entry in self._waiting(source))

    def lend(self, source: int, helper: int, nbytes: int) -> None:
        """Have `helper` asked for the last chunks that are to come from `source`, for at most so
        many bytes.
        """
        for entry in reversed(self._waiting(source)):
            nbytes -= entry.want.nbytes
            if nbytes < 0:
                return
            self._end_loan(entry)
            entry.source, entry.lender = helper, source
            self._loans[source].add(entry.number)
            self._queue(entry)

    def _waiting(self, source: int) -> list[_Entry]:
        return [
            entry for entry in self._open.values() if entry.source == source and not entry.taken
        ]

    def returned(self, source: int, again: Collection[str] = ()) -> None:
        """`source` has answered: what it was asked for and did not bring moves on; `again` it may
        have later.
        """
        for entry in [
            entry for entry in self._open.values() if entry.source == source and entry.taken
        ]:
            if entry.want.blake3 in again and entry.lender is None:
                self._queue(entry)
            else:
                self._move_on(entry)

    def failed(self, source: int, *, ban: bool = False) -> None:
        """`source` is of no use now: everything that was to come from it goes on to the next
        one.
        """
        if ban:
            self._banned.add(source)
        self._queues[source].clear()
        for number in tuple(self._loans[source]):  # others' own from now on
            self._end_loan(self._open[self._wants[number].blake3])
        for entry in list(self._open.values()):
            if entry.source == source:
                self._move_on(entry)

    def _is_queued(self, number: int, source: int) -> bool:
        entry = self._open.get(self._wants[number].blake3)
        return entry is not None and entry.source == source and not entry.taken

    def _move_on(self, entry: _Entry) -> None:
        lender = entry.lender
        if lender is not None:
            self._end_loan(entry)
            entry.source = lender
            self._queue(entry)
            return
        # once round at most: where all are banned it would never end
        for _ in self._queues:
            entry.source += 1
            if entry.source == len(self._queues):
                entry.source, entry.round = 0, entry.round + 1
            if entry.source not in self._banned:
                break
        if entry.round >= self._rounds or entry.source in self._banned:
            self.exhausted = entry.want
            return
        self._queue(entry)

    def _end_loan(self, entry: _Entry) -> None:
        if entry.lender is not None:
            self._loans[entry.lender].discard(entry.number)
            entry.lender = None

    def _queue(self, entry: _Entry) -> None:
        entry.taken = False
        heapq.heappush(self._queues[entry.source], entry.number)
