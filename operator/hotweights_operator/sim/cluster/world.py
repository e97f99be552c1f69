"""What judges look at, and how they say that something is wrong. It knows the world, and no
invariant.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Protocol

from hotweights_operator.model.objects import NodeState, Pod, Rollout
from hotweights_operator.model.selectors import selects
from hotweights_operator.sim.cluster.api import Api
from hotweights_operator.sim.cluster.fleet import Fleet
from hotweights_operator.sim.cluster.operator import Operator
from hotweights_operator.sim.invariants import Violated


class World(Protocol):
    """What is judged: the truth, as a `Simulation` has it."""

    api: Api
    fleet: Fleet
    operator: Operator
    now: datetime
    tenants: dict[str, str]  # digest → namespace


class JudgeContext:
    """What all judges share: the world, and the first violation."""

    def __init__(self, world: World, ignored: Collection[str] = ()) -> None:
        """``ignored`` names invariants whose violation does not end the story."""
        self.world = world
        self._ignored = frozenset(ignored)
        self._violation: Violated | None = None

    def fails(self, name: str, detail: str) -> None:
        """Raises `Violated`, unless it is ignored."""
        if name not in self._ignored:
            self._violation = self._violation or Violated(name, detail)
            raise self._violation

    def check(self) -> None:
        """Raises what was found once more, should whoever wrote have caught it."""
        if self._violation is not None:
            raise self._violation

    def count(self, name: str) -> None:
        """A path of `coverage` was taken."""
        self.world.api.counts[name] += 1

    def rollouts(self) -> list[Rollout]:
        """All rollouts, as the API server has them."""
        return [rollout for _, rollout in self.world.api.objects["rollout"].values()]

    def rollout(self, uid: str) -> Rollout | None:
        """The rollout with this UID; None: it is gone."""
        return next((rollout for rollout in self.rollouts() if rollout.uid == uid), None)

    def own(self, rollout: Rollout) -> list[Pod]:
        """A rollout's live pods: the oldest rollout that selects a pod owns it."""
        rivals = [
            r for r in self.rollouts() if r.namespace == rollout.namespace and not r.terminating
        ]
        found = []
        for pod in self.world.fleet.pods():
            if pod.live and pod.namespace == rollout.namespace:
                fits = [r for r in rivals if selects(r.spec.target.selector, pod.labels)]
                if fits and min(fits, key=lambda r: r.age_key).uid == rollout.uid:
                    found.append(pod)
        return found

    def seen(self, rollout: Rollout) -> list[Pod]:
        """A rollout's live pods, as the operator sees them."""
        view = self.world.operator.cache.observed()
        owned = (pod for pod in view.owners.pods_in(rollout.namespace) if pod.live)
        return [
            pod
            for pod in owned
            if (owner := view.owners.owner(pod.uid)) is not None and owner.uid == rollout.uid
        ]

    def serves(self, uid: str) -> set[str]:
        """What a pod serves, in truth and as its agent said last; empty text: what it booted."""
        engine, pod = self.world.fleet.engines.get(uid), self.world.api.get("pod", uid)
        state: NodeState | None = self.world.api.get("state", pod.node) if pod is not None else None
        said = state.engine(uid) if state is not None else None
        return ({engine.digest} if engine else set()) | ({said.digest} if said else set())
