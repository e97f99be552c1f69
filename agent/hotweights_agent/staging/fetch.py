"""Brings one version onto this node: from its parents, their stand-ins and the origin, whoever has
the next chunk.

Each source has a thread that asks it for what the `ChunkScheduler` gives it, in load order. What a
source turns out to lack goes to the next one, and when a parent dies, falls silent, lies or is too
slow to be through in time, only what it had not delivered moves on. A peer that does not know the version *yet* (its own assignment
may come later than ours) is asked again for a while before anybody goes past it: that is what makes
a chain of nodes form at all.

A source that is slow and yet in time is kept, and helped: a part of what it owes is asked of a peer
that has nothing to do, a little at first, and more if that one proves far quicker. So a chain that
runs as quickly as the network lets it stays a chain, and whoever is behind a slow node takes most
from that node's parent, which has little else to give then. The last source, the origin, is no
helper: it would be asked by everybody at once.

It knows no assignment, no engine and no Kubernetes; what is verified and where it goes is the
image's.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from hotweights_agent.staging.chunk_scheduler import ChunkScheduler
from hotweights_agent.staging.chunk_sources import ChunkSource
from hotweights_agent.staging.fetch_policy import FetchPolicy
from hotweights_common.reasons import Reason
from hotweights_storage.errors import (
    Cancelled,
    ChecksumMismatch,
    SourceRefused,
    SourceUnavailable,
    TransferError,
)
from hotweights_storage.image import ImageBuilder
from hotweights_transports.peers.base import (
    Deliver,
    Missing,
    PeerCorrupt,
    PeerError,
    PeerTimeout,
    Want,
)
from hotweights_transports.peers.rate_limiter import RateLimiter

log = logging.getLogger(__name__)

# how late a cancellation or the deadline is noticed, and what other threads did
TICK_SECONDS = 0.1
_TOO_SLOW = "too slow to be through by the deadline, so others are asked"


class FetchFailed(TransferError):
    """No source gave what is still needed. `transient`: another try may end differently."""

    reason = Reason.FETCH_FAILED

    def __init__(self, message: str, reason: str, *, transient: bool) -> None:
        super().__init__(message, reason)
        self.transient = transient


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far a fetch is, in bytes of distinct chunks that this node lacked at its start."""

    done_nbytes: int
    needed_nbytes: int
    by_source: tuple[tuple[str, int], ...]


class Fetch:
    """One fetch into one image. `run` once, from any thread; it returns when nothing is missing, or
    raises.
    """

    def __init__(
        self,
        builder: ImageBuilder,
        sources: Sequence[ChunkSource],
        *,
        policy: FetchPolicy | None = None,
        cancel: threading.Event | None = None,
        progress: Callable[[Progress], None] | None = None,
        throttle: RateLimiter | None = None,
    ) -> None:
        """`progress` is called from the thread that runs `run`. Sources are asked in their
        order, no quicker than `throttle` lets bytes in.
        """
        if not sources:
            raise ValueError("a fetch without sources brings nothing; give it at least the origin")
        self._builder = builder
        self._sources = sources
        self._policy = policy or FetchPolicy()
        self._cancel = cancel or threading.Event()
        self._progress = progress
        self._throttle = throttle
        wants = [Want(blake3, builder.nbytes(blake3)) for blake3 in builder.missing]
        self._needed_nbytes = sum(want.nbytes for want in wants)
        self._scheduler = ChunkScheduler(wants, len(sources), self._policy.rounds)
        self._changed = threading.Condition()  # guards the scheduler and what follows
        self._failures: dict[int, Exception] = {}  # the last of each source
        self._stop = threading.Event()
        self._ends = [threading.Event() for _ in sources]  # as `_stop`, of one source
        # source that is being asked → since when, and what it had brought then
        self._windows: dict[int, tuple[float, int]] = {}
        # source → bytes per second, as it answered the last time that it was asked
        self._rates: dict[int, float] = {}
        self._reported_at = 0.0

    def run(self) -> Progress:
        began = time.monotonic()
        workers: dict[int, Future[None]] = {}
        with ThreadPoolExecutor(len(self._sources), thread_name_prefix="fetch") as executor:
            try:
                while not self._is_over(began, workers):
                    for source in range(len(self._sources)):
                        if source not in workers and self._has_work(source):
                            workers[source] = executor.submit(self._work, source, began)
                    self._report(began)
                    self._judge_rates(began)
                    with self._changed:
                        self._changed.wait(TICK_SECONDS)
            finally:
                self._halt()
        for worker in workers.values():
            worker.result()
        found = self._state()
        if self._progress is not None:
            self._progress(found)
        return found

    def _halt(self) -> None:
        self._stop.set()
        for end in self._ends:
            end.set()
        with self._changed:
            self._changed.notify_all()

    def _is_over(self, began: float, workers: dict[int, Future[None]]) -> bool:
        with self._changed:
            if self._scheduler.done:
                return True
            if self._scheduler.exhausted is not None:
                raise self._gave_up(self._scheduler.exhausted)
        for worker in workers.values():
            if worker.done():
                # it only ends before the scheduler is done by an error that concerns everybody
                worker.result()
        if self._cancel.is_set():
            raise Cancelled("the fetch was cancelled")
        if time.monotonic() - began > self._policy.deadline_seconds:
            state = self._state()
            raise FetchFailed(
                f"{state.done_nbytes} of {state.needed_nbytes} bytes came within "
                f"{self._policy.deadline_seconds:g} s; "
                f"raise staging.timeoutSeconds, or see why it is slow{self._complaints()}",
                Reason.STAGE_TIMEOUT,
                transient=False,
            )
        return False

    def _has_work(self, source: int) -> bool:
        with self._changed:
            return self._scheduler.has_work(source)

    def _report(self, began: float) -> None:
        if self._progress is None:
            return
        now = time.monotonic()
        if now - max(self._reported_at, began) >= self._policy.progress_seconds:
            self._reported_at = now
            self._progress(self._state())

    def _judge_rates(self, began: float) -> None:
        """Ends sources that are too slow for the deadline, while there are others after them, and
        has others help those that are merely slow.
        """
        # under our own limit no other one would be quicker
        if self._throttle is not None:
            return
        now, policy = time.monotonic(), self._policy
        with self._changed:
            fetched = self._scheduler.fetched_nbytes
            left = self._needed_nbytes - sum(fetched)
            for source, (since, before) in list(self._windows.items()):
                if now - since < policy.rate_seconds or source == len(self._sources) - 1:
                    continue
                self._windows[source] = now, fetched[source]
                nbytes, seconds = fetched[source] - before, now - since
                waiting_nbytes = self._scheduler.waiting_nbytes(source)
                if policy.is_hopeless(
                    nbytes, seconds, left, policy.deadline_seconds - (now - began)
                ):
                    self._ends[source].set()
                elif policy.is_slow(nbytes, seconds, waiting_nbytes):
                    self._help(source, nbytes / seconds, waiting_nbytes)

    def _help(self, source: int, rate: float, waiting_nbytes: int) -> None:
        """Have the first peer that is idle, and not known to be no quicker, asked for a part of
        what is to come from ``source``, which brings ``rate`` bytes per second. The lock is held.
        """
        policy = self._policy
        for helper in range(source + 1, len(self._sources) - 1):  # all but the last
            if (
                helper in self._windows
                or helper in self._failures
                or self._scheduler.has_work(helper)
            ):
                continue
            other = self._rates.get(helper)
            if other is None:
                nbytes = min(policy.probe_nbytes, waiting_nbytes // 8)
            elif other >= policy.far_quicker * rate:
                nbytes = int(waiting_nbytes * other / (other + rate))  # both are through at once
            else:
                continue
            if nbytes <= 0:  # so little is left that it is through soon
                return
            names = self._sources[source].name, self._sources[helper].name
            log.info("%s is slow: %s is asked for a part of what it owes", *names)
            self._scheduler.lend(source, helper, nbytes)
            self._changed.notify_all()
            return

    def _state(self) -> Progress:
        with self._changed:
            fetched = self._scheduler.fetched_nbytes
            by_source = tuple(
                (source.name, nbytes) for source, nbytes in zip(self._sources, fetched, strict=True)
            )
            return Progress(sum(fetched), self._needed_nbytes, by_source)

    def _work(self, source: int, began: float) -> None:
        """One source, until the fetch is over."""
        failures = 0
        while self._await_work(source):
            try:
                missing = self._ask(source)
            except (PeerError, SourceRefused, SourceUnavailable, ChecksumMismatch) as error:
                failures += 1
                self._note_failure(source, error)
                self._stop.wait(self._policy.backoff.seconds(failures))
                continue
            except Cancelled:
                if self._stop.is_set():  # we ended it ourselves: no failure of this source
                    return
                raise
            if self._note_missing(source, missing, began):
                self._stop.wait(self._policy.again_seconds)

    def _ask(self, source: int) -> list[Missing]:
        """What the source lacks of what it is asked for. Raises what it does, and `PeerTimeout`
        when it was given up.
        """
        name, end = self._sources[source].name, self._ends[source]
        with self._changed:
            began, before = time.monotonic(), self._scheduler.fetched_nbytes[source]
            self._windows[source] = began, before
        try:
            missing = self._sources[source].fetch(self._wants(source), self._delivery(source), end)
        except Cancelled as error:
            if self._stop.is_set() or not end.is_set():
                raise
            raise PeerTimeout(name, _TOO_SLOW) from error
        finally:
            with self._changed:
                self._note_rate(source, began, before)
                del self._windows[source]
            given_up = end.is_set() and not self._stop.is_set()
            if given_up:
                end.clear()
        if given_up:
            raise PeerTimeout(name, _TOO_SLOW)
        return missing

    def _note_rate(self, source: int, began: float, before: int) -> None:
        nbytes = self._scheduler.fetched_nbytes[source] - before
        self._rates[source] = nbytes / max(time.monotonic() - began, 1e-6)

    def _await_work(self, source: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stop.is_set() or self._scheduler.has_work(source))
            return not self._stop.is_set()

    def _wants(self, source: int) -> Iterator[Want]:
        while not self._ends[source].is_set():
            with self._changed:
                want = self._scheduler.take(source)
            if want is None:
                return
            yield want

    def _delivery(self, source: int) -> Deliver:
        name = self._sources[source].name

        def deliver(want: Want, data: memoryview) -> None:
            self._builder.put(want.blake3, data, name)
            with self._changed:
                self._scheduler.arrived(source, want.blake3)
                if self._scheduler.done:
                    self._changed.notify_all()
                    return
            # afterwards: whoever waits for this chunk has it, and only the next one comes later
            if self._throttle is not None:
                self._throttle.take(want.nbytes, self._stop)

        return deliver

    def _note_failure(self, source: int, error: Exception) -> None:
        log.warning("%s: %s", self._sources[source].name, error)
        with self._changed:
            self._failures[source] = error
            self._scheduler.failed(
                source, ban=isinstance(error, PeerCorrupt | ChecksumMismatch | SourceRefused)
            )
            self._changed.notify_all()

    def _note_missing(self, source: int, missing: list[Missing], began: float) -> bool:
        """Whether something of it is to be asked for again, from the same source."""
        patient = time.monotonic() - began < self._policy.patience_seconds
        again = {gap.want.blake3 for gap in missing if patient and not gap.version_known}
        with self._changed:
            if not self._stop.is_set():
                self._scheduler.returned(source, again)
            self._changed.notify_all()
        return bool(again)

    def _gave_up(self, want: Want) -> FetchFailed:
        last = next(iter(self._by_use()), None)
        reason = str(getattr(last, "reason", Reason.CHUNK_MISSING))
        return FetchFailed(
            f"chunk {want.blake3[:16]}… came from none of {len(self._sources)} "
            f"sources{self._complaints()}",
            reason,
            transient=not isinstance(last, PeerCorrupt | ChecksumMismatch | SourceRefused),
        )

    def _complaints(self) -> str:
        return "".join(f"; {error}" for error in self._by_use())

    def _by_use(self) -> list[Exception]:
        """What sources failed with, the origin's word first: somebody can do something about it."""
        with self._changed:
            failures = [self._failures[source] for source in sorted(self._failures, reverse=True)]
        return sorted(failures, key=lambda error: isinstance(error, PeerError))
