"""Whole rollouts by seed: a random cluster, a random story, random faults; then the faults stop and it must come to an end.

What happens is drawn from the seed alone, so a violation is repeated by its number. After the story every rollout must be
Complete, unless something was broken on purpose for good: then it must be Stalled or Aborted, and say why.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hotweights_crds.conditions import find, is_true
from hotweights_crds.weightrollout import WeightRolloutSpec
from hotweights_crds.weightversion import WeightVersionSpec
from hotweights_operator import times
from hotweights_operator.actions import Action
from hotweights_operator.keys import Key
from hotweights_operator.model import Pod, Rollout, Version
from hotweights_operator.sim.api import Api
from hotweights_operator.sim.fleet import Fleet
from hotweights_operator.sim.invariants import Violated
from hotweights_operator.sim.operator import Operator

NAMESPACE = "default"
START = datetime(2026, 1, 1, tzinfo=UTC)
STORY_STEPS = 45
QUIET_STEPS = 12
MAX_STEPS = 700


def silence(_: str) -> None:
    """Tell nobody."""


@dataclass(slots=True)
class Simulation:
    """One story."""

    seed: int
    tell: Callable[[str], None] = silence
    with_faults: bool = True
    draw: random.Random = field(init=False)
    api: Api = field(default_factory=Api)
    fleet: Fleet = field(init=False)
    operator: Operator = field(init=False)
    now: datetime = START
    replicas: int = 0
    serial: int = 0
    lasting: bool = False  # something was broken for good
    zombie: tuple[Key, tuple[Action, ...]] | None = None

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.fleet = Fleet(self.api, self.draw, self.now)
        self.operator = self._operator()

    # -- the cluster ---------------------------------------------------------------------------------------------------

    def set_up(self, spec: WeightRolloutSpec | None = None, nodes: int = 0, pods: int = 0) -> None:
        """Nodes, pods and a rollout, in an order that the seed decides."""
        for number in range(nodes or self.draw.randint(1, 4)):
            self.fleet.add_node(f"node-{number}")
        for number in range(4):
            self.add_version(f"v{number}")
        self.replicas = pods or self.draw.randint(1, 6)
        self.replicate()
        self.operator.start()
        if self.draw.random() < 0.7:
            for _ in range(12):
                self.step()
        self.put_rollout("rollout", spec or self._spec())

    def _spec(self) -> WeightRolloutSpec:
        strategy: dict[str, Any] = {"type": "AllAtOnce"}
        if self.draw.random() < 0.8:
            strategy = {"type": "Rolling", "rolling": {"maxUnavailable": self.draw.choice([1, 1, 2, "25%", "50%"])}}
        return WeightRolloutSpec.from_dict(
            {
                "versionRef": {"name": f"v{self.draw.choice([1, 1, 1, 9])}"},
                "target": {"selector": {"matchLabels": {"app": "llm"}}},
                "strategy": strategy,
                "staging": {"originReaders": self.draw.randint(1, 2)},
                "failurePolicy": {
                    "maxFailed": self.draw.choice([0, 0, 1]),
                    "action": self.draw.choice(["Pause", "Abort"]),
                },
                "progressDeadlineSeconds": 300,
            }
        )

    def add_version(self, name: str, content: str = "") -> None:
        """A WeightVersion; the same name with other content is another object."""
        self.serial += 1
        uri = f"file:///{name}-{self.serial}"
        self.fleet.contents[uri] = content or f"sha256:{name}"
        spec = WeightVersionSpec.from_dict({"model": "m", "version": name, "source": {"uri": uri}})
        version = Version(f"version-{self.serial}", name, NAMESPACE, 1, "", spec)
        self.api.put("version", f"{NAMESPACE}/{name}", version)

    def put_rollout(self, name: str, spec: WeightRolloutSpec) -> None:
        """Create a rollout or change its spec."""
        known: Rollout | None = self.api.get("rollout", f"{NAMESPACE}/{name}")
        if known is None:
            self.serial += 1
            known = Rollout(f"{name}-{self.serial}", name, NAMESPACE, 0, "", times.show(self.now), spec)
        self.api.put("rollout", f"{NAMESPACE}/{name}", replace(known, spec=spec, generation=known.generation + 1))

    def rollouts(self) -> list[Rollout]:
        """As they stand."""
        return [rollout for _, rollout in self.api.objects["rollout"].values()]

    def replicate(self) -> None:
        """A Deployment in one function: as many pods as wanted, on nodes that are Ready."""
        pods = [pod for pod in self.fleet.pods() if not pod.finished]
        for pod in pods[self.replicas :]:
            self.fleet.remove_pod(pod.uid)
        ready = sorted(name for name, (_, node) in self.api.objects["node"].items() if node.ready)
        for _ in range(self.replicas - len(pods)):
            if ready:
                self.serial += 1
                uid = f"pod-{self.serial}"
                labels = {"app": "llm", "hotweights.dev/inject": "true"}
                node = self.draw.choice(ready) if self.with_faults else ready[self.serial % len(ready)]
                self.fleet.start_pod(Pod(uid, uid, NAMESPACE, node, labels))

    def _operator(self) -> Operator:
        return Operator(self.api, self.fleet, self.draw, self.tell, conflicts=0.03 if self.with_faults else 0.0)

    # -- time ----------------------------------------------------------------------------------------------------------

    def run(self) -> Simulation:
        """The whole story. Raises `Violated`."""
        try:
            self.set_up()
            for _ in range(STORY_STEPS):
                if self.with_faults and self.draw.random() < 0.3:
                    self._happen()
                self.step()
            self.heal()
            self.settle()
        except Violated as violation:
            raise Violated(violation.name, f"{violation} (seed {self.seed}, {self.now:%H:%M:%S})") from violation
        return self

    def step(self, seconds: float = 0.0) -> None:
        """A second or two."""
        self.now += timedelta(seconds=seconds or self.draw.uniform(1.0, 2.0))
        self.fleet.now = self.now
        self.replicate()
        self.fleet.step()
        self.operator.watch()
        self.operator.work(self.now, self.draw.randint(1, 6))

    def heal(self) -> None:
        """The faults stop; what was broken for good stays so."""
        for name, (_, node) in list(self.api.objects["node"].items()):
            if not node.ready:
                self.api.put("node", name, replace(node, ready=True))
            if self.fleet.agents.get(name) is None:
                self.fleet.start_agent(name)
        if not self.api.objects["node"]:
            self.fleet.add_node("node-new")
        self.fleet.faults.breaking_commits.clear()
        self.replicas = max(1, self.replicas)
        self.operator.conflicts = 0.0
        for rollout in self.rollouts():
            name = rollout.spec.version_ref.name
            self.put_rollout(rollout.name, rollout.spec.model_copy(update={"paused": False}))
            if self.api.get("version", f"{NAMESPACE}/{name}") is None:
                self.add_version(name)

    def settle(self) -> None:
        """Wait until nothing changes any more, through every deadline, and see what came out."""
        quiet = 0
        for _ in range(MAX_STEPS):
            before = self.api.version
            self.step(seconds=40.0 if quiet > QUIET_STEPS // 2 else 0.0)
            idle = before == self.api.version and not self.operator.dirty and not self.operator.is_behind
            quiet = quiet + 1 if idle else 0
            if quiet >= QUIET_STEPS and all(self._has_ended(rollout) for rollout in self.rollouts()):
                break
        else:
            told = {r.name: (r.status.phase, r.status.message) for r in self.rollouts()}
            raise Violated("comes to an end", f"after {MAX_STEPS} steps: {told}")
        for rollout in self.rollouts():
            self._check_end(rollout)
        self._check_pods()

    @staticmethod
    def _has_ended(rollout: Rollout) -> bool:
        conditions = rollout.status.conditions
        return is_true(conditions, "Ready") or is_true(conditions, "Stalled")

    def _check_end(self, rollout: Rollout) -> None:
        status = rollout.status
        if is_true(status.conditions, "Ready"):
            digest = status.target.digest
            live = [pod.uid for pod in self.fleet.pods() if pod.live]
            serving = [uid for uid in live if self.fleet.engines[uid].digest == digest]
            if len(serving) != self.replicas:
                raise Violated("zero false commits", f"{len(serving)} of {self.replicas} engines serve {digest}")
            if status.observed_generation != rollout.generation:
                raise Violated("says why", "Ready speaks of an older generation")
            return
        stalled = find(status.conditions, "Stalled")
        if stalled is None or not stalled.reason:
            raise Violated("says why", f"{status.phase} without a reason")
        excused = self.lasting or status.phase == "Aborted" or stalled.reason == "TargetConflict"
        if not excused and stalled.reason not in ("CommitFailed", "EngineDirty"):
            raise Violated("converges", f"{status.phase}/{stalled.reason}: {status.message}")

    def _check_pods(self) -> None:
        """In the end every live pod stands in its node's object, once as the order that counts."""
        for pod in self.fleet.pods():
            state = self.api.get("state", pod.node)
            if pod.live and (state is None or state.assigned(pod.uid) is None):
                raise Violated("every pod is told what to serve", pod.uid)

    # -- what happens --------------------------------------------------------------------------------------------------

    def _happen(self) -> None:
        from hotweights_operator.sim.story import happen

        happen(self)


def simulate(seed: int, tell: Callable[[str], None] = silence) -> Simulation:
    """One seed's story, to its end. Raises `Violated`."""
    return Simulation(seed, tell).run()
