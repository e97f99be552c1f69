"""The operator's loop in memory: a stale view that watches bring up to date, keys, decisions, writes, and the checks after each.

It is the queue and `perform` in another coat, around the very same decisions, cache and keys.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from hotweights_crds.conditions import is_true
from hotweights_crds.nodeweights import UNASSIGNED
from hotweights_operator import decide as rollouts
from hotweights_operator import keys as keys_
from hotweights_operator import nodes, versions
from hotweights_operator.actions import Action, Assign, RolloutDecision
from hotweights_operator.cache import KINDS, Cache, Kind
from hotweights_operator.keys import Key
from hotweights_operator.model import Observed, Rollout
from hotweights_operator.sim import invariants
from hotweights_operator.sim.api import Api, Refused
from hotweights_operator.sim.fleet import Fleet

Tell = Callable[[str], None]


@dataclass(slots=True)
class Operator:
    """One operator process."""

    api: Api
    fleet: Fleet
    draw: random.Random
    tell: Tell
    conflicts: float = 0.0  # share of writes that the API server refuses for no reason of ours
    cache: Cache = field(default_factory=Cache)
    cursors: dict[Kind, int] = field(default_factory=dict)
    dirty: set[Key] = field(default_factory=set)
    timers: dict[Key, datetime] = field(default_factory=dict)
    last_complete: dict[str, str] = field(default_factory=dict)  # rollout UID → digest; the checker's own memory

    def start(self) -> None:
        """List everything."""
        for kind in KINDS:
            for key, (version, value) in self.api.objects[kind].items():
                self.cache.put(kind, key, version, value)
            self.cursors[kind] = len(self.api.log[kind])
        self.dirty = keys_.everything(self.cache.observed())

    def watch(self, *, everything: bool = False) -> None:
        """Read on in each log: some of what happened, or all of it."""
        for kind in KINDS:
            log = self.api.log[kind]
            behind = len(log) - self.cursors[kind]
            count = behind if everything else self.draw.randint(0, behind)
            for version, key, value in log[self.cursors[kind] : self.cursors[kind] + count]:
                self._note(kind, key, version, value)
            self.cursors[kind] += count

    @property
    def is_behind(self) -> bool:
        """Whether there is something that it has not read."""
        return any(self.cursors[kind] < len(self.api.log[kind]) for kind in KINDS)

    def work(self, now: datetime, limit: int) -> None:
        """Decide about some of what may have changed."""
        due = {key for key, moment in self.timers.items() if now >= moment}
        for key in due:
            del self.timers[key]
        self.dirty |= due
        for key in self.draw.sample(sorted(self.dirty), min(limit, len(self.dirty))):
            self.dirty.discard(key)
            self.reconcile(key, now)

    def reconcile(self, key: Key, now: datetime) -> None:
        """One decision, checked and performed."""
        actions = self.decide(key, now)
        self.perform(key, actions)

    def decide(self, key: Key, now: datetime) -> tuple[Action, ...]:
        """The decision and its status write; the actions are left to be performed, now or too late."""
        view, (kind, name) = self.cache.observed(), key
        if kind == "node":
            found = nodes.decide(name, view)
            self._again(key, found.again_in_seconds, now)
            return found.actions
        if kind == "version":
            version = self.cache.get("version", name)
            if version is None:
                return ()
            answer = versions.decide(version, view, now)
            if answer.status is not None and answer.status != version.status:
                self._write("version", name, replace(version, status=answer.status), int(version.resource_version))
            return answer.actions
        rollout = self.cache.get("rollout", name)
        return self._decide_rollout(key, rollout, view, now) if rollout is not None else ()

    def perform(self, key: Key, actions: tuple[Action, ...]) -> None:
        """Write; what is refused is looked at again."""
        for action in actions:
            before = self.api.get("state", action.node)
            try:
                if self.draw.random() < self.conflicts:
                    raise Refused(action.node)
                self.api.perform(action)
            except Refused:
                self.dirty.add(key)
                self._refetch(action.node)
                continue
            after = self.api.get("state", action.node)
            live = [pod.uid for pod in self.fleet.pods() if not pod.finished]
            invariants.tokens_grow(before, after, live)
            if isinstance(action, Assign):
                self._check_write(action, before)
            self._note("state", action.node, self.api.version_of("state", action.node), after)

    def _decide_rollout(self, key: Key, rollout: Rollout, view: Observed, now: datetime) -> tuple[Action, ...]:
        decision = rollouts.decide(rollout, view, now)
        if self.draw.random() < 0.1 and decision != rollouts.decide(rollout, view, now):
            raise invariants.Violated("twice is once", "the same view gave two decisions")
        self._check(rollout, view, decision)
        self._again(key, decision.again_in_seconds, now)
        status = decision.status
        if status is not None and status != rollout.status:
            if status.phase != rollout.status.phase or status.revision != rollout.status.revision:
                self.tell(f"{key[1]}: {status.phase}: {status.message}")
            changed = replace(rollout, status=status)
            if not self._write("rollout", key[1], changed, int(rollout.resource_version)):
                return ()
        if status is not None and is_true(status.conditions, "Ready"):
            self.last_complete[rollout.uid] = status.target.digest
        return decision.actions

    def _check(self, rollout: Rollout, view: Observed, decision: RolloutDecision) -> None:
        target = decision.status.target.digest if decision.status else ""
        invariants.zero_false_commits(rollout, view, decision, self.fleet.confirmations)
        invariants.within_budget(rollout, view, decision.actions, target)
        invariants.holds_still(rollout, view, decision.actions, decision)
        invariants.only_what_is_ready(rollout, view, decision.actions, target)
        invariants.says_why(decision)
        for action in decision.actions:
            if isinstance(action, Assign):
                entries = view.states[action.node].spec.rollouts
                before = next((entry for entry in entries if entry.uid == action.uid), None)
                complete = self.last_complete.get(rollout.uid, "")
                busy = target != complete
                invariants.keeps_what_pods_need(before, action.entry, complete, in_progress=busy)

    def _check_write(self, action: Assign, before: object) -> None:
        from hotweights_operator.model import NodeState

        if action.uid == UNASSIGNED and isinstance(before, NodeState):
            served = {uid: e.digest for uid, e in self.fleet.engines.items() if e.phase == "Serving"}
            invariants.orphans_keep(before, action.entry, served)

    def _write(self, kind: Kind, name: str, value: object, resource_version: int) -> bool:
        """A status, fenced by what it was decided on."""
        known = self.api.objects[kind].get(name)
        if known is None or known[0] != resource_version or self.draw.random() < self.conflicts:
            self.dirty.add(("rollout" if kind == "rollout" else "version", name))
            if known is not None:
                self._note(kind, name, *known)
            return False
        self.api.put(kind, name, value)
        self._note(kind, name, *self.api.objects[kind][name])
        return True

    def _refetch(self, node: str) -> None:
        known = self.api.objects["state"].get(node)
        if known is not None:
            self._note("state", node, *known)

    def _note(self, kind: Kind, key: str, version: int, value: object) -> None:
        """As the handlers do: what is new goes into the cache and makes its keys dirty."""
        old = self.cache.get(kind, key)
        changed = self.cache.drop(kind, key, version) if value is None else self.cache.put(kind, key, version, value)
        if changed:
            for state in (old, value):
                if state is not None:
                    self.dirty |= keys_.affected(kind, state, self.cache.observed())

    def _again(self, key: Key, seconds: float | None, now: datetime) -> None:
        if seconds is not None:
            self.timers[key] = now + timedelta(seconds=seconds)
