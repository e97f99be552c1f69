"""Writes the node's status: what matters at once, progress now and then.

A thousand agents share one API server. A change of phase is written as soon as the last write is through; mere progress only
after `Pace.progress_share` more or `Pace.progress_seconds`, and never faster than a token bucket allows. Only the newest status
counts. A write that fails is tried again until it succeeds or something newer is to be written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from hotweights_crds.conditions import Condition, upsert
from hotweights_crds.nodeweights import NodeWeightsStatus
from hotweights_kube.errors import KubeError, NotFound

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """How often the status is written."""

    coalesce_seconds: float = 0.05
    """Changes that come together are written together."""
    progress_share: float = 0.10
    """Of a version's bytes: worth a write."""
    progress_seconds: float = 15.0
    """After so long any progress is worth a write."""
    per_second: float = 0.5
    """Writes of progress, in the long run."""
    burst: int = 5
    """Writes of progress, at once."""
    retry_seconds: float = 0.5
    """After a failed write; doubles up to `longest_retry_seconds`."""
    longest_retry_seconds: float = 8.0


class Bucket:
    """A token bucket on the caller's clock."""

    def __init__(self, per_second: float, burst: int, now: float) -> None:
        self._per_second, self._burst = per_second, burst
        self._level, self._at = float(burst), now

    def wait_seconds(self, now: float) -> float:
        """How long until the next token; 0 if there is one."""
        self._level = min(self._burst, self._level + (now - self._at) * self._per_second)
        self._at = now
        return max(0.0, (1.0 - self._level) / self._per_second)

    def take(self) -> None:
        """One token less."""
        self._level -= 1.0


def progressed(old: NodeWeightsStatus, new: NodeWeightsStatus) -> float:
    """By how much any version has come further, as a share of its bytes."""
    before = {s.digest: s.bytes_done for s in old.staged}
    shares = [(s.bytes_done - before.get(s.digest, 0)) / s.bytes_total for s in new.staged if s.bytes_total]
    return max(shares, default=0.0)


class StatusWriter:
    """Takes the newest status by `offer`, writes it in `run`."""

    def __init__(
        self,
        write: Callable[[dict[str, object]], Awaitable[object]],
        clock: Callable[[], float],
        utc: Callable[[], str],
        pace: Pace | None = None,
        counted: Callable[[str], None] = lambda _result: None,
    ) -> None:
        """``write`` patches the object's status; ``counted`` hears how each write ended."""
        self._write = write
        self._clock = clock
        self._utc = utc
        self._pace = pace or Pace()
        self._counted = counted
        self._bucket = Bucket(self._pace.per_second, self._pace.burst, clock())
        self._new: NodeWeightsStatus | None = None
        self._urgent = False
        self._changed = asyncio.Event()
        self._written: NodeWeightsStatus | None = None
        self._written_at = float("-inf")
        self._conditions: list[Condition] = []

    def offer(self, status: NodeWeightsStatus, *, urgent: bool) -> None:
        """The newest status; ``urgent``: do not wait."""
        self._new, self._urgent = status, self._urgent or urgent
        self._changed.set()

    def again(self) -> None:
        """The object may have lost what was written (it is new, or the API server was away): write the newest once more."""
        if self._new is None:
            self._new = self._written
        if self._new is not None:
            self._urgent = True
            self._changed.set()

    async def run(self) -> None:
        """Write, until cancelled."""
        failures = 0
        while True:
            await self._changed.wait()
            await asyncio.sleep(self._pace.coalesce_seconds)
            await self._until_due()
            new, urgent = self._new, self._urgent
            self._new, self._urgent = None, False
            self._changed.clear()
            if new is None:
                continue
            try:
                await self._write(self._body(new))
            except NotFound:
                self._counted("gone")
                log.info("this node's NodeWeights is not there yet; the operator creates it")
                self._written = new  # written again when the object is seen
                continue
            except KubeError as error:
                self._counted("failed")
                failures += 1
                log.warning("the status was not written: %s", error)
                if self._new is None:
                    self._new = new
                self._urgent = self._urgent or urgent
                self._changed.set()
                wait = self._pace.retry_seconds * 2 ** min(failures - 1, 10)
                await asyncio.sleep(min(self._pace.longest_retry_seconds, wait))
                continue
            failures = 0
            self._counted("written")
            self._written, self._written_at = new, self._clock()

    async def _until_due(self) -> None:
        """Wait while there is nothing but progress, and not enough of it."""
        while not self._urgent and self._new is not None:
            self._changed.clear()
            wait = self.wait_seconds(self._new)
            if wait <= 0:
                self._bucket.take()
                return
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def wait_seconds(self, new: NodeWeightsStatus) -> float:
        """How long mere progress waits; 0: it is due."""
        now = self._clock()
        due = 0.0
        if self._written is not None and progressed(self._written, new) < self._pace.progress_share:
            due = self._written_at + self._pace.progress_seconds - now
        return max(due, self._bucket.wait_seconds(now))

    def _body(self, status: NodeWeightsStatus) -> dict[str, object]:
        ready = Condition(
            type="Ready",
            status="True",
            observed_generation=status.observed_generation,
            last_transition_time=self._utc(),
            reason="Following",
            message="the agent follows this object",
        )
        self._conditions = upsert(self._conditions, ready)
        return {"status": status.model_copy(update={"conditions": self._conditions}).to_dict()}
