"""Whole rollouts by seed: a random cluster, a random story, random faults; then a last edit, and it must come to a good end.

What happens is drawn from the seed alone, so a violation is repeated by its number. After the story the faults stop; the flaws of
versions stay. Then every rollout is set to a version that every engine can take, back or onwards, and every living pod must come to
serve it, whatever happened before: that is what a rollout is for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from hotweights_crds.conditions import is_true
from hotweights_crds.weightrollout import VersionRef, WeightRolloutSpec
from hotweights_crds.weightversion import WeightVersionSpec
from hotweights_operator import times
from hotweights_operator.model import INJECT_LABEL, Pod, Rollout, Version
from hotweights_operator.sim import plan
from hotweights_operator.sim.api import Api
from hotweights_operator.sim.fleet import Fleet
from hotweights_operator.sim.invariants import Violated
from hotweights_operator.sim.judge import Judge
from hotweights_operator.sim.operator import Ended, Operator
from hotweights_operator.sim.plan import App, Plot

START = datetime(2026, 1, 1, tzinfo=UTC)
STORY_STEPS = 45
OPENING_STEPS = 40
IDLE_STEPS = 6
REST_STEPS = 10
MOST_STEPS = 600


def silence(_: str) -> None:
    """Tell nobody."""


@dataclass(slots=True)
class Simulation:
    """One story."""

    seed: int
    tell: Callable[[str], None] = silence
    with_faults: bool = True
    ignored: Collection[str] = ()
    draw: random.Random = field(init=False)
    api: Api = field(default_factory=Api)
    fleet: Fleet = field(init=False)
    operator: Operator = field(init=False)
    judge: Judge = field(init=False)
    now: datetime = START
    apps: list[App] = field(default_factory=list)
    plot: Plot = field(default_factory=Plot)
    tenants: dict[str, str] = field(default_factory=dict)  # digest → namespace
    serial: int = 0
    zombie: bool = False  # an operator that was replaced writes on
    idle_steps: int = 0

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.fleet = Fleet(self.api, self.draw, self.now)
        self.operator = self._operator()
        self.judge = self.api.judge = Judge(self, self.ignored)

    # -- the cluster ---------------------------------------------------------------------------------------------------

    def set_up(self, spec: WeightRolloutSpec | None = None, nodes: int = 0, pods: int = 0) -> None:
        """Nodes, pods and rollouts, in an order that the seed decides; with ``spec`` one rollout and no surprises."""
        if spec is None:
            self.apps, count = plan.apps(self.draw)
            self.plot = plan.plot(self.draw)
            self.plot.large = sum(app.replicas for app in self.apps) >= 100
        else:
            self.apps, count = [App("default", "rollout", pods)], nodes
        for number in range(count):
            self.fleet.add_node(f"node-{number}")
        for namespace in sorted({app.namespace for app in self.apps}):
            for name in ("v0", "v1", "v2", "v3"):
                self.add_version(namespace, name)
        self.replicate()
        self.operator.start()
        if self.draw.random() < 0.7:
            for _ in range(12):
                self.step()
        for app in self.apps:
            self.put_rollout(app, spec or plan.spec(self.draw, app))

    def add_version(self, namespace: str, name: str, content: str = "") -> None:
        """A WeightVersion; the same name with other content is another object. The first one and the last never have a flaw."""
        self.serial += 1
        uri, digest = f"file:///{namespace}/{name}-{self.serial}", content or f"sha256:{namespace}-{name}"
        self.fleet.contents[uri], self.tenants[digest] = digest, namespace
        if self.with_faults and name not in plan.GOOD and digest not in self.fleet.faults.flaws:
            flaw = plan.flaw(self.draw)
            if flaw is not None:
                self.tell(f"   {digest} is {flaw}")
                self.fleet.faults.flaws[digest] = flaw
        written = WeightVersionSpec.from_dict({"model": "m", "version": name, "source": {"uri": uri}})
        version = Version(f"version-{self.serial}", name, namespace, 1, "", written)
        self.api.put("version", f"{namespace}/{name}", version)

    def put_rollout(self, app: App, spec: WeightRolloutSpec, name: str = "", retry: str = "") -> None:
        """Create a rollout or change its spec."""
        key = f"{app.namespace}/{name or app.name}"
        known: Rollout | None = self.api.get("rollout", key)
        if known is None:
            self.serial += 1
            uid = f"{name or app.name}-{self.serial}"
            known = Rollout(uid, name or app.name, app.namespace, 0, "", times.show(self.now), spec)
        generation = known.generation + (spec != known.spec or not known.generation)
        self.tell(f"-- {key}: {spec.version_ref.name}{', paused' if spec.paused else ''}{', retry' if retry else ''}")
        self.api.put("rollout", key, replace(known, spec=spec, generation=generation, retry=retry or known.retry))

    def rollouts(self) -> list[Rollout]:
        """As they stand."""
        return [rollout for _, rollout in self.api.objects["rollout"].values()]

    def rollout_of(self, app: App) -> Rollout | None:
        """An application's own."""
        found: Rollout | None = self.api.get("rollout", f"{app.namespace}/{app.name}")
        return found

    def replicate(self) -> None:
        """ReplicaSets: as many pods as wanted, made at once when others begin to go, on nodes that are Ready."""
        for app in self.apps:
            pods = [pod for pod in self.fleet.pods() if pod.live and app.owns(pod)]
            for pod in pods[app.replicas :]:
                self.fleet.kubelets.terminate(pod.uid)
            ready = sorted(name for name, (_, node) in self.api.objects["node"].items() if node.ready)
            for _ in range(app.replicas - len(pods)):
                if ready:
                    self.serial += 1
                    uid = f"{app.namespace}-{app.name}-{self.serial}"
                    node = self.draw.choice(ready) if self.with_faults else ready[self.serial % len(ready)]
                    labels = {"app": app.name, INJECT_LABEL: "true"}
                    self.fleet.kubelets.start_pod(Pod(uid, uid, app.namespace, node, labels))

    def restart_operator(self) -> None:
        """A new process with a new list of everything, and no memory."""
        known = self.operator.last_complete
        self.operator = self._operator()
        self.operator.last_complete = known  # the checker's, not the operator's
        self.operator.start()

    def _operator(self) -> Operator:
        return Operator(self.api, self.fleet, self.draw, self.tell, conflicts=0.03 if self.with_faults else 0.0)

    # -- time ----------------------------------------------------------------------------------------------------------

    def run(self) -> Simulation:
        """The whole story. Raises `Violated`."""
        from hotweights_operator.sim.story import happen

        try:
            self.set_up()
            if self.draw.random() < 0.6:
                self._steps(OPENING_STEPS, self._all_ready)
            for _ in range(STORY_STEPS if not self.plot.large else STORY_STEPS // 3):
                if self.draw.random() < 0.3:
                    happen(self)
                self.step()
                self.plot.go_on(self)
            self.heal()
            if self.draw.random() < 0.5:
                self.come_to_rest()
            self.come_to_a_good_end()
        except Violated as violation:
            raise Violated(violation.name, f"{violation.detail} (seed {self.seed}, {self.now:%H:%M:%S})") from violation
        return self

    def step(self, seconds: float = 0.0) -> None:
        """A moment."""
        before = self.api.version
        self.now += timedelta(seconds=seconds or self.draw.uniform(0.4, 2.0))
        self.fleet.now = self.now
        self.replicate()
        self.fleet.step()
        self.operator.watch()
        try:
            self.operator.work(self.now, self.draw.randint(1, 5 + len(self.api.objects["node"])))
        except Ended:
            self.restart_operator()
        self.judge.step()
        idle = before == self.api.version and not self.operator.dirty and not self.operator.is_behind
        self.idle_steps = self.idle_steps + 1 if idle else 0

    def _steps(self, most: int, done: Callable[[], bool], *, hastens: bool = False) -> bool:
        """Steps until something is so; time goes faster while nothing happens. Whether it came to be."""
        for _ in range(most):
            if done():
                return True
            self.step(seconds=40.0 if hastens and self.idle_steps > IDLE_STEPS else 0.0)
        return done()

    # -- how it ends ---------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """The faults stop; what is wrong with versions stays so."""
        self.tell("-- the faults stop")
        self.fleet.faults.heal()
        self.operator.ends_after = -1
        self.operator.conflicts = 0.0
        self.api.refusing.clear()
        changed = set(self.fleet.kubelets.clocks)
        self.fleet.kubelets.clocks.clear()
        if changed:
            self._steps(plan.MOST_CLOCK_SECONDS, lambda: False)  # until what was written by wrong clocks lies behind
        for name, (_, node) in list(self.api.objects["node"].items()):
            if not node.ready:
                self.api.put("node", name, replace(node, ready=True))
            if self.fleet.agents.get(name) is None or name in changed:
                self.fleet.kill_agent(name)
                self.fleet.start_agent(name)
        if not self.api.objects["node"]:
            self.fleet.add_node("node-new")
        for app in self.apps:
            self.api.delete("rollout", f"{app.namespace}/{app.name}-younger")
            if self.rollout_of(app) is None:
                self.put_rollout(app, plan.spec(self.draw, app))
        wanted = {(r.namespace, r.spec.version_ref.name) for r in self.rollouts()}
        for namespace in {app.namespace for app in self.apps}:
            wanted |= {(namespace, name) for name in plan.GOOD}
        for namespace, name in sorted(wanted):
            if self.api.get("version", f"{namespace}/{name}") is None:
                self.add_version(namespace, name)

    def come_to_rest(self) -> None:
        """Without any edit: it may be held, given up or stalled, but nobody is left behind."""
        self.tell("-- it is left alone")
        self.idle_steps = 0
        rested = self._steps(MOST_STEPS, lambda: self.idle_steps >= REST_STEPS, hastens=True)
        pods = [(app, pod) for app in self.apps for pod in self.fleet.pods() if pod.live and app.owns(pod)]
        lost = [pod.uid for app, pod in pods if self._is_lost(app, pod)]
        if not rested and not lost:
            told = {r.name: (r.status.phase, r.status.message) for r in self.rollouts()}
            self.judge.fails("comes to rest", f"after {MOST_STEPS} steps: {told}")
        for _, pod in pods:
            if not self.fleet.kubelets.in_service(pod.uid) and pod.uid not in lost:
                self.judge.fails("nobody is left behind", self._account(pod))

    def _is_lost(self, app: App, pod: Pod) -> bool:
        """Whether what is stable turned out to be bad for this pod after it was complete: only people can help."""
        rollout = self.rollout_of(app)
        digest = rollout.status.stable.digest if rollout is not None else ""
        flaw, agent = self.fleet.faults.flaws.get(digest), self.fleet.agents.get(pod.node)
        memory = agent.engines.get(pod.uid) if agent is not None else None
        gave_up = memory is not None and memory.failed is not None and memory.failed.digest == digest
        known = {self.digest(app, name.partition("/")[2]) for name in self.api.objects["version"]}
        forgotten = (
            bool(digest) and digest not in known
        )  # its WeightVersion is gone, and perhaps every node that held it
        return gave_up or forgotten or (flaw is not None and flaw.hits(pod.uid, digest))

    def come_to_a_good_end(self) -> None:
        """A last edit to a version that every engine can take; with a node that cannot be written to for a while, sometimes."""
        self._steps(60, self._all_seen)
        nodes = sorted(self.api.objects["node"])
        refusing = self.draw.choice(nodes) if len(nodes) > 1 and self.draw.random() < 0.15 else ""
        if refusing:
            self.tell(f"-- nothing can be written to {refusing}")
            self.api.refusing.add(refusing)
        for app in self.apps:
            self._last_edit(app)
        if refusing:
            self._steps(MOST_STEPS, lambda: self._good_beside(refusing), hastens=True)
            self._check_beside(refusing)
            self.api.refusing.clear()
            self.tell(f"-- {refusing} can be written to again")
        if not self._steps(MOST_STEPS, self._is_good, hastens=True):
            self._explain()

    def _last_edit(self, app: App) -> None:
        rollout = self.rollout_of(app)
        if rollout is None:
            raise LookupError(f"{app.name} has no rollout: heal makes one")
        names = [name for name in plan.GOOD if self.digest(app, name) != rollout.status.target.digest]
        app.ends_with = self.draw.choice(names)
        spec = rollout.spec.model_copy(update={"version_ref": VersionRef(name=app.ends_with), "paused": False})
        self.put_rollout(app, spec)

    def digest(self, app: App, name: str) -> str:
        """A version's digest, whether or not the operator knows it already."""
        version: Version | None = self.api.get("version", f"{app.namespace}/{name}")
        return self.fleet.contents[version.spec.source.uri] if version is not None else ""

    def _all_seen(self) -> bool:
        return all(r.status.observed_generation == r.generation for r in self.rollouts())

    def _all_ready(self) -> bool:
        return all(is_true(r.status.conditions, "Ready") for r in self.rollouts())

    def serves_the_end(self, app: App, pod: Pod) -> bool:
        """Whether a pod is of service with the version that the story ends with."""
        engine = self.fleet.engines.get(pod.uid)
        is_it = engine is not None and engine.digest == self.digest(app, app.ends_with)
        return is_it and self.fleet.kubelets.in_service(pod.uid)

    def _is_good(self) -> bool:
        if not all(
            is_true(r.status.conditions, "Ready") or not a.replicas for a in self.apps if (r := self.rollout_of(a))
        ):
            return False
        pods = [(app, pod) for app in self.apps for pod in self.fleet.pods() if pod.live and app.owns(pod)]
        served = all(self.serves_the_end(app, pod) for app, pod in pods)
        return served and len(pods) == sum(app.replicas for app in self.apps) and self._all_seen()

    def _explain(self) -> None:
        """Which of the ends is not good."""
        for app in self.apps:
            for pod in self.fleet.pods():
                if pod.live and app.owns(pod) and not self.serves_the_end(app, pod):
                    self.judge.fails("the way back works", self._account(pod))
            rollout = self.rollout_of(app)
            if rollout is not None and app.replicas and not is_true(rollout.status.conditions, "Ready"):
                text = f"{rollout.status.phase}: {rollout.status.message}"
                self.judge.fails("says so when it is complete", f"every pod serves {app.ends_with}, but {text}")

    def _account(self, pod: Pod) -> str:
        state, engine = self.api.get("state", pod.node), self.fleet.engines.get(pod.uid)
        order = state.assigned(pod.uid) if state is not None else None
        told = f"told {order.digest or 'nothing'} (prepare {order.prepare or 'nothing'})" if order else "told nothing"
        does = f"{engine.phase} on {engine.digest or 'what it booted'}" if engine else "no engine"
        messages = [f"{r.name}: {r.status.phase}: {r.status.message}" for r in self.rollouts()]
        return f"{pod.uid} is {told} and {does}, {'Ready' if pod.ready else 'not Ready'}; {messages}"

    def _good_beside(self, node: str) -> bool:
        """Whether all others serve the last version, and the statuses name the node that cannot be written to."""
        for app in self.apps:
            pods = [pod for pod in self.fleet.pods() if pod.live and app.owns(pod)]
            if not all(pod.node == node or self.serves_the_end(app, pod) for pod in pods):
                return False
            left = [pod for pod in pods if pod.node == node and not self.serves_the_end(app, pod)]
            rollout = self.rollout_of(app)
            if left and rollout is not None and all(failure.node != node for failure in rollout.status.failures):
                return False
        return True

    def _check_beside(self, node: str) -> None:
        if self._good_beside(node):
            return
        told = [f"{r.name}: {r.status.phase}: {r.status.message}" for r in self.rollouts()]
        self.judge.fails("one node's refusal never silences", f"{node} refuses writes: {told}")


def simulate(seed: int, tell: Callable[[str], None] = silence, ignored: Collection[str] = ()) -> Simulation:
    """One seed's story, to its end. Raises `Violated`."""
    return Simulation(seed, tell, ignored=ignored).run()
