"""An operator process in memory: a stale view that watches bring up to date, and the very loop that
runs in production.

What differs is the port: writes go to the API server in memory, and any of them may be refused, or
be the last before the process ends. Every decision and every write is checked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from hotweights_crds.conditions import is_true
from hotweights_crds.nodeweights import UNASSIGNED
from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_crds.weightversion import WeightVersionStatus
from hotweights_kube.errors import Conflict, Invalid, KubeError
from hotweights_operator.decide import rollouts
from hotweights_operator.decide.revision import Outcome
from hotweights_operator.model.actions import Action, Assign, Event, RolloutDecision
from hotweights_operator.model.objects import NodeState, Rollout, Version
from hotweights_operator.model.observed import Observed
from hotweights_operator.runtime import triggers as keys_
from hotweights_operator.runtime.cache import KINDS, Cache, Kind
from hotweights_operator.runtime.loop import Loop
from hotweights_operator.runtime.triggers import Key
from hotweights_operator.sim import invariants
from hotweights_operator.sim.cluster import api as server
from hotweights_operator.sim.cluster.api import Api, Refused
from hotweights_operator.sim.cluster.fleet import Fleet

Tell = Callable[[str], None]


class Ended(Exception):
    """The process was killed in the middle of what it did."""


@dataclass(slots=True)
class Operator:
    """One operator process. It is its loop's port and meter."""

    api: Api
    fleet: Fleet
    draw: random.Random
    tell_story: Tell
    conflicts: float = 0.0  # share of writes that the API server refuses for no reason of ours
    cache: Cache = field(init=False)
    loop: Loop = field(init=False)
    cursors: dict[Kind, int] = field(default_factory=dict)
    dirty: set[Key] = field(default_factory=set)
    timers: dict[Key, datetime] = field(default_factory=dict)
    # rollout UID → digest; the checker's own memory
    last_complete: dict[str, str] = field(default_factory=dict)
    ends_after: int = -1  # so many more writes; negative: it lives
    now: datetime = field(init=False)

    def __post_init__(self) -> None:
        self.now = self.fleet.now
        self.cache = Cache(clock=lambda: self.now)
        self.loop = Loop(self.cache, self, self, self._wake, started_at=self.now)

    def start(self) -> None:
        """List everything into the cache; every key is to be decided."""
        for kind in KINDS:
            for key, (version, value) in self.api.objects[kind].items():
                self.cache.put(kind, key, version, value)
            self.cursors[kind] = len(self.api.log[kind])
        self.dirty = keys_.everything(self.cache.observed())

    def watch(self, *, everything: bool = False) -> None:
        """Read on in each log: some of what happened, or all of it."""
        self.now = self.fleet.now
        for kind in KINDS:
            log = self.api.log[kind]
            behind = len(log) - self.cursors[kind]
            count = behind if everything else self.draw.randint(0, behind)
            for version, key, value in log[self.cursors[kind] : self.cursors[kind] + count]:
                self._note(kind, key, version, value)
            self.cursors[kind] += count

    @property
    def is_behind(self) -> bool:
        """Whether there is something that it has not read, or not written."""
        return (
            any(self.cursors[kind] < len(self.api.log[kind]) for kind in KINDS)
            or len(self.loop.outbox) > 0
        )

    def work(self, now: datetime, limit: int) -> None:
        """Decide about some of what may have changed, and write some of what was decided. Raises
        `Ended`.
        """
        self.now = now
        due = {key for key, moment in self.timers.items() if now >= moment}
        for key in due:
            del self.timers[key]
        self.dirty |= due
        for key in self.draw.sample(sorted(self.dirty), min(limit, len(self.dirty))):
            self.reconcile(key, now)
        for _ in range(self.draw.randint(0, 2 * limit)):
            if not self.write(now):
                break

    def reconcile(self, key: Key, now: datetime) -> None:
        """Decide about one key, as the loop does; after an error it is decided again. Raises
        `Ended`.
        """
        self.dirty.discard(key)
        try:
            _run(self.loop.reconcile(key, now))
        except KubeError:
            self.dirty.add(key)

    def write(self, now: datetime) -> bool:
        """One of the writes that wait."""
        return bool(_run(self.loop.write_one(now)))

    # -- the port -------------------------------------------------------------------------------

    async def write_rollout(self, rollout: Rollout, status: WeightRolloutStatus) -> None:
        """A rollout's status. What it says is checked before it can be refused."""
        view = self.cache.observed()
        decision = rollouts.decide(rollout, view, self.now, self.loop.started_at)
        if decision.status != status:
            raise invariants.Violated("twice is once", "the same view gave two decisions")
        self._check(rollout, view, decision)
        name = f"{rollout.namespace}/{rollout.name}"
        if status.phase != rollout.status.phase or status.revision != rollout.status.revision:
            self.tell_story(f"{name}: {status.phase}: {status.message}")
        self._write("rollout", name, replace(rollout, status=status), int(rollout.resource_version))
        if is_true(status.conditions, "Ready"):
            self.last_complete[rollout.uid] = status.target.digest

    async def write_version(self, version: Version, status: WeightVersionStatus) -> None:
        """Write a version's status. Raises `Conflict`, `Invalid` or `Ended`."""
        name = f"{version.namespace}/{version.name}"
        self._write("version", name, replace(version, status=status), int(version.resource_version))

    async def act(self, action: Action) -> None:
        """One write to a node's object."""
        before: NodeState | None = self.api.get("state", action.node)
        self._count()
        try:
            if self.draw.random() < self.conflicts:
                self.api.counts["write is refused"] += 1
                raise Refused(action.node)
            self.api.perform(action)
        except server.Invalid as error:
            raise Invalid(str(error)) from error
        except Refused as error:
            self._refetch(action.node)
            raise Conflict(str(error)) from error
        after: NodeState = self.api.get("state", action.node)
        live = [pod.uid for pod in self.fleet.pods() if not pod.finished]
        invariants.tokens_grow(before, after, live)
        if isinstance(action, Assign) and before is not None:
            self._check_write(action, before)
        self._note("state", action.node, self.api.version_of("state", action.node), after)

    async def tell(self, events: Sequence[Event]) -> None:
        """Events are for people: nobody listens here."""

    def ended(self, outcome: Outcome, seconds: float) -> None:
        """As a meter: the judges count what they see, not what the loop says."""

    def acted(self, action: Action) -> None:
        """As a meter: the API server sees every write anyway."""

    # -- checks ---------------------------------------------------------------------------------

    def _check(self, rollout: Rollout, view: Observed, decision: RolloutDecision) -> None:
        target = decision.status.target.digest if decision.status else ""
        invariants.zero_false_commits(rollout, view, decision, self.fleet.confirmations)
        invariants.holds_still(rollout, view, decision)
        invariants.all_prepare_first(rollout, view, decision)
        invariants.says_why(decision)
        for action in decision.actions:
            if isinstance(action, Assign):
                complete = self.last_complete.get(rollout.uid, "")
                invariants.keeps_what_pods_need(
                    view.states[action.node].entry(action.uid),
                    action.entry,
                    complete,
                    in_progress=target != complete,
                )

    def _check_write(self, action: Assign, before: NodeState) -> None:
        if action.uid == UNASSIGNED:
            served = {
                uid: e.digest for uid, e in self.fleet.engines.items() if e.phase == "Serving"
            }
            invariants.orphans_keep(before, action.entry, served)

    # -- writes and watches ---------------------------------------------------------------------

    def _count(self) -> None:
        """Perhaps this was the last one. Raises `Ended`."""
        if self.ends_after == 0:
            self.api.counts["operator ends between two writes"] += 1
            raise Ended
        self.ends_after -= 1 if self.ends_after > 0 else 0

    def _write(self, kind: Kind, name: str, value: object, resource_version: int) -> None:
        """A status, fenced by what it was decided on."""
        self._count()
        known = self.api.objects[kind].get(name)
        if known is None or known[0] != resource_version or self.draw.random() < self.conflicts:
            if known is not None:
                self._note(kind, name, *known)
            self.api.counts["status is lost"] += kind == "rollout"
            raise Conflict(name)
        try:
            self.api.put(kind, name, value)
        except server.Invalid as error:
            raise Invalid(str(error)) from error
        self._note(kind, name, *self.api.objects[kind][name])

    def _refetch(self, node: str) -> None:
        known = self.api.objects["state"].get(node)
        if known is not None:
            self._note("state", node, *known)

    def _note(self, kind: Kind, key: str, version: int, value: object) -> None:
        """As the handlers do: what is new goes into the cache and makes its keys dirty."""
        old = self.cache.get(kind, key)
        changed = (
            self.cache.drop(kind, key, version)
            if value is None
            else self.cache.put(kind, key, version, value)
        )
        if changed:
            self.dirty |= keys_.affected(
                kind, old, self.cache.get(kind, key), self.cache.observed()
            )

    def _wake(self, key: Key, seconds: float) -> None:
        if seconds <= 0:
            self.dirty.add(key)
            return
        moment = self.now + timedelta(seconds=seconds)
        self.timers[key] = min(moment, self.timers.get(key, moment))


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine gives that waits for nobody."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("the port of a simulation waits for nobody")
