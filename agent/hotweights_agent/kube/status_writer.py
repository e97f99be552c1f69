"""Writes the node's status: what matters at once, progress now and then.

A thousand agents share one API server. A change of phase is written as soon as the last write is
through, unless a burst of them used up its token bucket, as only an engine that changes its word
all the time does; mere progress only after `WriteLimits.progress_share` more or
`WriteLimits.progress_seconds`, from a bucket of its own. Only the newest status counts. A write
that fails is tried again until it succeeds or something newer is to be written; `trouble` says when
that goes on for too long.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from hotweights_agent.session.retry import TokenBucket
from hotweights_common.backoff import Backoff
from hotweights_crds.conditions import Condition, upsert
from hotweights_crds.nodeweights import NodeWeightsStatus
from hotweights_kube.errors import Invalid, KubeError, NotFound, Unavailable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WriteLimits:
    """How often the status is written, for one agent of a thousand that share an API server."""

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
    urgent_per_second: float = 2.0
    """Urgent writes, in the long run."""
    urgent_burst: int = 20
    """Urgent writes, at once. A version's way to an engine takes about six."""
    retry: Backoff = Backoff(0.5, 8.0)
    """After failed writes."""
    trouble_seconds: float = 60.0
    """For how long the API server may refuse the status until that is trouble."""


def progressed(old: NodeWeightsStatus, new: NodeWeightsStatus) -> float:
    """By how much any version has come further, as a share of its bytes."""
    before = {s.digest: s.bytes_done for s in old.staged}
    shares = [
        (s.bytes_done - before.get(s.digest, 0)) / s.bytes_total
        for s in new.staged
        if s.bytes_total
    ]
    return max(shares, default=0.0)


class StatusWriter:
    """Takes the newest status by `offer`, writes it in `run`."""

    def __init__(
        self,
        write: Callable[[dict[str, object]], Awaitable[object]],
        clock: Callable[[], float],
        utc: Callable[[], str],
        limits: WriteLimits | None = None,
        counted: Callable[[str], None] = lambda _result: None,
    ) -> None:
        """``write`` patches the object's status; ``counted`` hears how each write ended."""
        self._write = write
        self._clock = clock
        self._utc = utc
        self._limits = limits or WriteLimits()
        self._counted = counted
        self._bucket = TokenBucket(self._limits.per_second, self._limits.burst, clock())
        self._urgent_bucket = TokenBucket(
            self._limits.urgent_per_second, self._limits.urgent_burst, clock()
        )
        self._refused_since: float | None = None
        self._refusal = ""
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
        """The object may have lost what was written (it is new, or the API server was away): write
        the newest once more.
        """
        if self._new is None:
            self._new = self._written
        if self._new is not None:
            self._urgent = True
            self._changed.set()

    def trouble(self) -> str:
        """Why others believe an old status; empty: they do not. An API server that is away is not:
        nobody can read there.
        """
        since = self._refused_since
        if since is None or self._clock() < since + self._limits.trouble_seconds:
            return ""
        return f"the status has been refused for {self._clock() - since:.0f} s: {self._refusal}"

    async def run(self) -> None:
        """Write what was offered last, when it is due, until cancelled."""
        failures = 0
        while True:
            await self._changed.wait()
            await asyncio.sleep(self._limits.coalesce_seconds)
            await self._until_due()
            new, urgent = self._new, self._urgent
            self._new, self._urgent = None, False
            self._changed.clear()
            if new is None:
                continue
            try:
                await self._write(self._body(new))
            # no trouble: the operator makes the object, and `again` is called when it is seen
            except NotFound:
                self._refused_since = None
                self._counted("gone")
                log.info("this node's NodeWeights is not there yet; the operator creates it")
                self._written = new  # written again when the object is seen
                continue
            except KubeError as error:
                self._note_failure(error)
                failures += 1
                if self._new is None:
                    self._new = new
                self._urgent = self._urgent or urgent
                self._changed.set()
                await asyncio.sleep(self._limits.retry.seconds(failures))
                continue
            failures, self._refused_since = 0, None
            self._counted("written")
            self._written, self._written_at = new, self._clock()

    def _note_failure(self, error: KubeError) -> None:
        if isinstance(error, Invalid):
            self._counted("refused")
            log.error(
                "the API server will never take this status, and others believe the one "
                "before; please report it: %s",
                error,
            )
        else:
            self._counted("failed")
            log.warning("the status was not written: %s", error)
        if isinstance(error, Unavailable):  # nobody can read the old one either
            return
        self._refusal = str(error)
        self._refused_since = self._clock() if self._refused_since is None else self._refused_since

    async def _until_due(self) -> None:
        """Wait while there is nothing but progress, and not enough of it, or for a bucket."""
        while self._new is not None:
            self._changed.clear()
            bucket = self._urgent_bucket if self._urgent else self._bucket
            wait = (
                bucket.wait_seconds(self._clock()) if self._urgent else self.wait_seconds(self._new)
            )
            if wait <= 0:
                bucket.take()
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
        if (
            self._written is not None
            and progressed(self._written, new) < self._limits.progress_share
        ):
            due = self._written_at + self._limits.progress_seconds - now
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
