"""One key at a time: observe, decide, perform, say when to look again. The only place where the clock is read."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from hotweights_kube import errors
from hotweights_operator import decide as rollouts
from hotweights_operator import keys, nodes, revision, versions
from hotweights_operator.actions import Action
from hotweights_operator.cache import Cache, Kind
from hotweights_operator.keys import Key
from hotweights_operator.perform import Performer
from hotweights_operator.queue import WorkQueue
from hotweights_operator.revision import Outcome

log = logging.getLogger(__name__)


class Meter(Protocol):
    """Who counts what the loop does."""

    def reconciled(self, kind: str, result: str, seconds: float) -> None:
        """One key was worked on."""
        ...

    def ended(self, outcome: Outcome, seconds: float) -> None:
        """A revision of a rollout ended."""
        ...

    def acted(self, actions: Sequence[Action]) -> None:
        """These writes were decided."""
        ...


@dataclass(slots=True)
class Reconciler:
    """The loop around the decisions."""

    cache: Cache
    queue: WorkQueue[Key]
    performer: Performer
    meter: Meter

    def changed(self, kind: Kind, key: str, old: object) -> None:
        """An object is new, different or gone in the cache: what depends on it is looked at."""
        observed = self.cache.observed()
        for value in (old, self.cache.get(kind, key)):
            if value is not None:
                for affected in keys.affected(kind, value, observed):
                    self.queue.add(affected)

    def everything(self) -> None:
        """Look at all there is."""
        for key in keys.everything(self.cache.observed()):
            self.queue.add(key)

    async def work(self) -> None:
        """Take keys and work on them, for ever."""
        while True:
            key = await self.queue.get()
            started = time.monotonic()
            result = await self._guarded(key)
            self.meter.reconciled(key[0], result, time.monotonic() - started)

    async def _guarded(self, key: Key) -> str:
        try:
            again = await self.reconcile(key, datetime.now(UTC))
        except errors.Conflict as error:
            log.debug("%s %s: %s", *key, error)
            self.queue.failed(key)
            return "conflict"
        except errors.KubeError as error:
            log.warning("%s %s: %s. Next try in %.1f s", *key, error, self.queue.failed(key))
            return "error"
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("%s %s: a defect of the operator; please report it", *key)
            self.queue.failed(key)
            return "defect"
        self.queue.done(key)
        if again is not None:
            self.queue.add(key, again)
        return "ok"

    async def reconcile(self, key: Key, now: datetime) -> float | None:
        """One step. When to look again; raises what the API server refused first."""
        kind, name = key
        match kind:
            case "node":
                return await self._node(name)
            case "version":
                return await self._version(name, now)
            case "rollout":
                return await self._rollout(name, now)

    async def _node(self, name: str) -> float | None:
        decision = nodes.decide(name, self.cache.observed())
        await self._act(decision.actions)
        return decision.again_in_seconds

    async def _version(self, name: str, now: datetime) -> float | None:
        version = self.cache.get("version", name)
        if version is None:
            return None
        decision = versions.decide(version, self.cache.observed(), now)
        await self._act(decision.actions)
        if decision.status is not None:
            await self.performer.write_version(version, decision.status)
        await self.performer.tell(decision.events)
        return decision.again_in_seconds

    async def _rollout(self, name: str, now: datetime) -> float | None:
        rollout = self.cache.get("rollout", name)
        if rollout is None:
            return None
        decision = rollouts.decide(rollout, self.cache.observed(), now)
        await self._act(decision.actions)
        if decision.status is not None:
            await self.performer.write_rollout(rollout, decision.status)
            for outcome, seconds in revision.ended(rollout.status, decision.status, now):
                self.meter.ended(outcome, seconds)
        await self.performer.tell(decision.events)
        return decision.again_in_seconds

    async def _act(self, actions: Sequence[Action]) -> None:
        if not actions:
            return
        self.meter.acted(actions)
        refused = await self.performer.act(actions)
        if refused:
            raise refused[0]
