"""The operator's loop: observe, decide, write down what must be remembered, then let the writes out
one by one.

Production and the simulator drive this very class; they differ in the `Port` that does what is
decided, in who wakes a key, and in what time is. Three rules make it safe to lose any write and to
end at any moment:

- A status is written before anything of the same pass is acted on. If it is refused, nothing of the
  pass happens.
- A rollout is decided about only when none of its writes is under way, so that a decision sees all
  that was done.
- A write goes out only if the object's intent and the node are still as they were when it was
  decided: a pause is seen by every write that has not begun.

What one node refuses concerns that node: it is named in the rollout's next status, and tried again
ever more rarely.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Protocol

from hotweights_common.backoff import Backoff
from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_crds.weightversion import WeightVersionStatus
from hotweights_kube import errors
from hotweights_operator.decide import nodes, revision, rollout_status, rollouts, versions
from hotweights_operator.decide.revision import Outcome
from hotweights_operator.model.actions import Action, Event
from hotweights_operator.model.objects import Refusal, Rollout, Version
from hotweights_operator.runtime.cache import Cache
from hotweights_operator.runtime.outbox import Outbox, Write
from hotweights_operator.runtime.triggers import Key

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 1.0
"""A status that differs only in how many bytes were staged is written at most this often."""
# soon at first, for what passes; bounded, so that a node that recovers is not left for long
RETRY = Backoff(0.5, 30.0)


class Port(Protocol):
    """Who does what is decided. Each raises `KubeError` when it is refused, and puts what came back
    into the cache.
    """

    async def write_rollout(self, rollout: Rollout, status: WeightRolloutStatus) -> None:
        """Replace a rollout's status, fenced by the resourceVersion that it was decided on."""
        ...

    async def write_version(self, version: Version, status: WeightVersionStatus) -> None:
        """Replace a WeightVersion's status, fenced in the same way."""
        ...

    async def act(self, action: Action) -> None:
        """Do one action: one write to one node's object, fenced by the resourceVersion it names."""
        ...

    async def tell(self, events: Sequence[Event]) -> None:
        """Say it; nothing depends on whether it is heard."""
        ...


class LoopMetrics(Protocol):
    """Who counts what the loop does."""

    def ended(self, outcome: Outcome, seconds: float) -> None:
        """A revision of a rollout ended."""
        ...

    def acted(self, action: Action) -> None:
        """An action was written, not merely decided."""
        ...


@dataclass(slots=True)
class _Trouble:
    """A node that refused a decider's write."""

    failures: int
    again_at: datetime


@dataclass(slots=True)
class Loop:
    """One operator process's loop. ``wake`` asks for a key to be reconciled, after so many
    seconds.
    """

    cache: Cache
    port: Port
    meter: LoopMetrics
    wake: Callable[[Key, float], None]
    started_at: datetime
    outbox: Outbox = field(default_factory=Outbox)
    filled: Callable[[], None] = lambda: None  # told when something is to be written
    # to be decided about as soon as their writes have landed
    _awaited: set[Key] = field(default_factory=set)
    _troubles: dict[tuple[Key, str], _Trouble] = field(default_factory=dict)
    # nodes that refused what is not wanted any more
    _idle: dict[Key, frozenset[str]] = field(default_factory=dict)
    # when a rollout's status was written last
    _written_at: dict[Key, datetime] = field(default_factory=dict)

    async def reconcile(self, key: Key, now: datetime) -> None:
        """One pass of one key. Raises `KubeError` when a status was refused: then nothing else of
        the pass has happened.
        """
        # whatever was decided before and has not begun is decided anew
        self.outbox.replace(key, ())
        if self.outbox.under_way(key):
            self._awaited.add(key)
            return
        kind, name = key
        match kind:
            case "node":
                decision = nodes.decide(name, self.cache.observed())
                self._let_out(key, decision.actions, now)
                again = decision.again_in_seconds
            case "version":
                again = await self._version(key, now)
            case "rollout":
                again = await self._rollout(key, now)
        if again is not None:
            self.wake(key, again)

    async def _version(self, key: Key, now: datetime) -> float | None:
        version: Version | None = self.cache.get("version", key[1])
        if version is None:
            self._forget(key)
            return None
        self._look_at_refusals(key, version.uid, now)
        decision = versions.decide(version, self.cache.observed(), now)
        # the status first, as for rollouts; the same one is no write
        if decision.status is not None and decision.status != version.status:
            await self.port.write_version(version, decision.status)
        self._let_out(key, decision.actions, now, (version.uid, version.generation))
        await self.port.tell(decision.events)
        return decision.again_in_seconds

    async def _rollout(self, key: Key, now: datetime) -> float | None:
        rollout: Rollout | None = self.cache.get("rollout", key[1])
        if rollout is None:
            self._forget(key)
            return None
        self._look_at_refusals(key, rollout.uid, now)
        decision = rollouts.decide(rollout, self.cache.observed(), now, self.started_at)
        self._note_idle(key, rollout, {action.node for action in decision.actions})
        waits = [decision.again_in_seconds]
        status = decision.status
        if status is not None and status != rollout.status:
            waits.append(await self._write_status(key, rollout, status, now))
        self._let_out(key, decision.actions, now, (rollout.uid, rollout.generation))
        # last: an event of a status that was refused would tell of what is not so
        await self.port.tell(decision.events)
        return min((wait for wait in waits if wait is not None), default=None)

    def _forget(self, key: Key) -> None:
        """Nothing is remembered of an object that is gone."""
        self._written_at.pop(key, None)
        self._idle.pop(key, None)
        for place in [place for place in self._troubles if place[0] == key]:
            del self._troubles[place]

    def _look_at_refusals(self, key: Key, owner: str, now: datetime) -> None:
        """Nodes that refused for long enough ago count as those that can be written to; where
        nothing is to be written any more, nothing can be refused.
        """
        refusals, idle = self.cache.observed().refusals, self._idle.pop(key, frozenset())
        for (uid, node), refusal in list(refusals.items()):
            trouble = self._troubles.get((key, node))
            if uid != owner:
                continue
            if node in idle:
                del refusals[uid, node]
                self._troubles.pop((key, node), None)
            elif trouble is None or now >= trouble.again_at:
                refusals[uid, node] = replace(refusal, is_due=True)

    def _note_idle(self, key: Key, rollout: Rollout, nodes: Collection[str]) -> None:
        """Remember for the next pass which nodes could be written to again and are not to be."""
        refusals = self.cache.observed().refusals.items()
        idle = {
            node
            for (uid, node), known in refusals
            if uid == rollout.uid and known.is_due and node not in nodes
        }
        if idle:
            self._idle[key] = frozenset(idle)
            self.wake(key, 0.0)

    async def _write_status(
        self, key: Key, rollout: Rollout, status: WeightRolloutStatus, now: datetime
    ) -> float | None:
        """Write it, or say in how many seconds it is time to, if it tells of nothing but
        progress.
        """
        # the first one at once: what this process finds may be long ago
        last = self._written_at.get(key)
        wait = 0.0 if last is None else PROGRESS_SECONDS - (now - last).total_seconds()
        if wait > 0 and rollout_status.is_progress(rollout.status, status):
            return wait
        await self.port.write_rollout(rollout, status)
        self._written_at[key] = now
        for outcome, seconds in revision.ended(rollout.status, status, now):
            self.meter.ended(outcome, seconds)
        return None

    def _let_out(
        self, key: Key, actions: Sequence[Action], now: datetime, epoch: tuple[str, int] = ("", 0)
    ) -> None:
        """Have these written, but for nodes that refused not long ago."""
        ready: list[Write] = []
        for action in actions:
            trouble = self._troubles.get((key, action.node))
            if trouble is None or now >= trouble.again_at:
                ready.append(Write(key, action, epoch))
            else:
                self.wake(key, (trouble.again_at - now).total_seconds())
        self.outbox.replace(key, ready)
        if ready:
            self.filled()

    # -- writes ---------------------------------------------------------------------------------

    async def write_one(self, now: datetime) -> bool:
        """Do the write that has waited longest; whether there was one that could be done."""
        write = self.outbox.take()
        if write is None:
            return False
        again: float | None = None  # seconds until its key is looked at; None: no need
        try:
            if self._is_as_decided(write):
                await self.port.act(write.action)
                self.meter.acted(write.action)
                self._succeeded(write)
            else:
                again = 0.0
        except errors.Conflict:
            again = 0.0  # somebody wrote in between; what is there now has been read
        except errors.KubeError as error:
            again = self._refused(write, error, now)
        finally:
            self.outbox.landed(write)
        if write.key in self._awaited and not self.outbox.under_way(write.key):
            self._awaited.discard(write.key)
            again = 0.0
        if again is not None:
            self.wake(write.key, again)
        return True

    def _is_as_decided(self, write: Write) -> bool:
        """Whether nothing that the decision was about has changed since."""
        kind, name = write.key
        if kind == "rollout":
            rollout: Rollout | None = self.cache.get("rollout", name)
            # by UID too: one that was made anew counts its generations from one
            if rollout is None or (rollout.uid, rollout.generation) != write.epoch:
                return False
        # making an object is decided on none
        state = self.cache.get("state", write.action.node)
        decided_on = getattr(write.action, "resource_version", None)
        return decided_on is None or (state is not None and state.resource_version == decided_on)

    def _succeeded(self, write: Write) -> None:
        # keys of nodes have no UID: nobody's status tells of what they were refused
        self._troubles.pop((write.key, write.action.node), None)
        if write.epoch[0]:
            self.cache.observed().refusals.pop((write.epoch[0], write.action.node), None)

    def _refused(self, write: Write, error: errors.KubeError, now: datetime) -> float:
        """Remember it for the next status; in how many seconds to try again."""
        place = (write.key, write.action.node)
        failures = self._troubles[place].failures + 1 if place in self._troubles else 1
        wait = RETRY.seconds(failures)
        self._troubles[place] = _Trouble(failures, now + timedelta(seconds=wait))
        log.warning(
            "%s %s: node %s: %s. Next try in %.1f s", *write.key, write.action.node, error, wait
        )
        if write.epoch[0]:
            # 400: with the words around it, it is to fit a failure's message (512)
            refusal = Refusal(type(error).__name__, str(error)[:400])
            self.cache.observed().refusals[write.epoch[0], write.action.node] = refusal
            self.wake(write.key, wait)
            return 0.0  # the status is to say so at once; the write itself waits
        return wait
