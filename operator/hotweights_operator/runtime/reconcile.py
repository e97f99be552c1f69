"""Around the loop: the queue that says which key is next, workers for decisions and for writes, and
the clock. Nothing is decided here.

What is heard wakes nobody until this process may decide (`begin`), and nothing is left of what it
had in mind when it may no more (`end`): the next time it begins from what is in the cache.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from hotweights_kube import errors
from hotweights_operator.decide.revision import Outcome
from hotweights_operator.model.actions import Action
from hotweights_operator.runtime import triggers
from hotweights_operator.runtime.cache import Cache, Kind
from hotweights_operator.runtime.loop import Loop, Port
from hotweights_operator.runtime.queue import WorkQueue
from hotweights_operator.runtime.triggers import Key

log = logging.getLogger(__name__)


class ReconcileMetrics(Protocol):
    """Who counts what the loop does."""

    def reconciled(self, kind: str, result: str, seconds: float) -> None:
        """One key was worked on: ok, conflict, error or defect, and how long it took."""
        ...

    def ended(self, outcome: Outcome, seconds: float) -> None:
        """A revision of a rollout ended."""
        ...

    def acted(self, action: Action) -> None:
        """An action was written, not merely decided."""
        ...


@dataclass(slots=True)
class Reconciler:
    """Takes keys from the queue and drives the loop with them."""

    cache: Cache
    queue: WorkQueue[Key]
    port: Port
    meter: ReconcileMetrics
    loop: Loop = field(init=False)
    _decides: bool = False
    _busy: int = 0  # workers that are in the middle of something
    _at_rest: asyncio.Event = field(default_factory=asyncio.Event)
    _to_write: asyncio.Event = field(default_factory=asyncio.Event)
    _written_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.loop = self._new_loop()

    def _new_loop(self) -> Loop:
        return Loop(
            self.cache,
            self.port,
            self.meter,
            self._wake,
            started_at=datetime.now(UTC),
            filled=self._fill,
        )

    def begin(self) -> None:
        """From now on this process decides: about everything at first."""
        self.queue.clear()  # of what was cancelled in the middle, too
        self.loop, self._decides = self._new_loop(), True
        self.everything()

    async def end(self, seconds: float) -> bool:
        """Begin nothing any more, and wait so long at most for what was begun. Whether all of it
        has ended; then `work` and `write` may be cancelled.
        """
        self._decides = False
        self.loop.outbox.clear()
        self.cache.observed().refusals.clear()
        self._at_rest.clear()
        try:
            async with asyncio.timeout(seconds):
                while self._busy:
                    await self._at_rest.wait()
        except TimeoutError:
            return False
        finally:
            self.queue.clear()
        return True

    def _wake(self, key: Key, seconds: float) -> None:
        if self._decides:
            self.queue.add(key, seconds)

    def _rests(self) -> None:
        self._busy -= 1
        if not self._busy:
            self._at_rest.set()

    def _fill(self) -> None:
        # from now on a write that does not end is a stall; idle time before it was none
        if not self._to_write.is_set():
            self._written_at = time.monotonic()
        self._to_write.set()

    def changed(self, kind: Kind, key: str, old: Any) -> None:
        """An object is new, different or gone in the cache: what depends on it is looked at."""
        if not self._decides:
            return
        for affected in triggers.affected(
            kind, old, self.cache.get(kind, key), self.cache.observed()
        ):
            self.queue.add(affected)

    def everything(self) -> None:
        """Every decision there is may come out differently: at the start, and now and then."""
        for key in triggers.everything(self.cache.observed()) if self._decides else ():
            self.queue.add(key)

    async def work(self) -> None:
        """Take keys and decide about them, for ever."""
        while True:
            key = await self.queue.get()
            if not self._decides:
                continue
            # thread time: a pass that waits for the API server keeps nobody from the processor
            started, busy = time.monotonic(), time.thread_time()
            self._busy += 1
            try:
                result = await self._guarded(key, busy)
            finally:
                self._rests()
            self.meter.reconciled(key[0], result, time.monotonic() - started)

    async def write(self) -> None:
        """Write what was decided, one after the other, for ever."""
        while True:
            self._busy += 1
            try:
                wrote = self._decides and await self.loop.write_one(datetime.now(UTC))
            # a worker that ended would leave its share of the writes undone
            except Exception:
                log.exception("a defect of the operator; please report it")
                self.meter.reconciled("write", "defect", 0.0)
                wrote = True
            finally:
                self._rests()
            self._written_at = time.monotonic()
            if not wrote:
                self._to_write.clear()
                await self._to_write.wait()
            elif len(self.loop.outbox):
                self._to_write.set()  # a node that was being written to is free again

    @property
    def stalled_seconds(self) -> float:
        """How long no write has ended though some wait."""
        return time.monotonic() - self._written_at if len(self.loop.outbox) else 0.0

    async def _guarded(self, key: Key, busy: float) -> str:
        try:
            await self.loop.reconcile(key, datetime.now(UTC))
        except errors.Conflict as error:
            log.debug("%s %s: %s", *key, error)
            self.queue.failed(key)
            return "conflict"
        except errors.KubeError as error:
            wait = self.queue.failed(key, errors.wait_seconds(error) or 0.0)
            log.warning("%s %s: %s. Next try in %.1f s", *key, error, wait)
            return "error"
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("%s %s: a defect of the operator; please report it", *key)
            self.queue.failed(key)
            return "defect"
        self.queue.done(key, time.thread_time() - busy)
        return "ok"
