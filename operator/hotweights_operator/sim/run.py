"""Whole rollouts by seed: a random cluster, a random story, random faults; then a last edit, and it
must come to a good end.

What happens is drawn from the seed alone, so a violation is repeated by its number. After the story
the faults stop; the flaws of versions stay. Then every rollout is set to a version that every
engine can take, back or onwards, and every living pod must come to serve it, whatever happened
before: that is what a rollout is for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from hotweights_common import timestamps
from hotweights_crds.weightrollout import WeightRolloutSpec
from hotweights_crds.weightversion import WeightVersionSpec
from hotweights_operator.model.objects import INJECT_LABEL, Pod, Rollout, Version
from hotweights_operator.sim import endings, plan
from hotweights_operator.sim.cluster.api import Api
from hotweights_operator.sim.cluster.fleet import Fleet
from hotweights_operator.sim.cluster.operator import Ended, Operator
from hotweights_operator.sim.invariants import Violated
from hotweights_operator.sim.judge import Judge
from hotweights_operator.sim.plan import App, Plot

START = datetime(2026, 1, 1, tzinfo=UTC)
STORY_STEPS = 45
OPENING_STEPS = 40
IDLE_STEPS = 6  # without any write: then nothing is left but to wait for a time


def silence(_: str) -> None:
    """Tell nobody: what a story's teller is where nobody reads it."""


@dataclass(slots=True)
class Simulation:
    """One story and the world that it happens in. The same seed gives the same story."""

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

    # -- the cluster ----------------------------------------------------------------------------

    def set_up(self, spec: WeightRolloutSpec | None = None, nodes: int = 0, pods: int = 0) -> None:
        """Nodes, pods and rollouts, in an order that the seed decides; with ``spec`` one rollout
        and no surprises.
        """
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
        """A WeightVersion; the same name with other content is another object. The first one and
        the last never have a flaw.
        """
        self.serial += 1
        uri, digest = (
            f"file:///{namespace}/{name}-{self.serial}",
            content or f"sha256:{namespace}-{name}",
        )
        self.fleet.contents[uri], self.tenants[digest] = digest, namespace
        if self.with_faults and name not in plan.GOOD and digest not in self.fleet.faults.flaws:
            flaw = plan.flaw(self.draw)
            if flaw is not None:
                self.tell(f"   {digest} is {flaw}")
                self.fleet.faults.flaws[digest] = flaw
        written = WeightVersionSpec.from_dict(
            {"model": "m", "version": name, "source": {"uri": uri}}
        )
        version = Version(f"version-{self.serial}", name, namespace, 1, "", written)
        self.api.put("version", f"{namespace}/{name}", version)

    def put_rollout(
        self, app: App, spec: WeightRolloutSpec, name: str = "", retry: str = ""
    ) -> None:
        """Create a rollout or change its spec."""
        key = f"{app.namespace}/{name or app.name}"
        known: Rollout | None = self.api.get("rollout", key)
        if known is None:
            self.serial += 1
            uid = f"{name or app.name}-{self.serial}"
            known = Rollout(
                uid, name or app.name, app.namespace, 0, "", timestamps.show(self.now), spec
            )
        generation = known.generation + (spec != known.spec or not known.generation)
        self.tell(
            f"-- {key}: "
            f"{spec.version_ref.name}{', paused' if spec.paused else ''}{', retry' if retry else ''}"
        )
        self.api.put(
            "rollout",
            key,
            replace(known, spec=spec, generation=generation, retry=retry or known.retry),
        )

    def rollouts(self) -> list[Rollout]:
        """All rollouts, as the API server has them."""
        return [rollout for _, rollout in self.api.objects["rollout"].values()]

    def rollout_of(self, app: App) -> Rollout | None:
        """An application's rollout, not the younger one in conflict; None: there is none."""
        found: Rollout | None = self.api.get("rollout", f"{app.namespace}/{app.name}")
        return found

    def replicate(self) -> None:
        """ReplicaSets: as many pods as wanted, made at once when others begin to go, on nodes that
        are Ready.
        """
        for app in self.apps:
            pods = [pod for pod in self.fleet.pods() if pod.live and app.owns(pod)]
            for pod in pods[app.replicas :]:
                self.fleet.kubelets.terminate(pod.uid)
            ready = sorted(
                name for name, (_, node) in self.api.objects["node"].items() if node.ready
            )
            for _ in range(app.replicas - len(pods)):
                if ready:
                    self.serial += 1
                    uid = f"{app.namespace}-{app.name}-{self.serial}"
                    node = (
                        self.draw.choice(ready)
                        if self.with_faults
                        else ready[self.serial % len(ready)]
                    )
                    labels = {"app": app.name, INJECT_LABEL: "true"}
                    self.fleet.kubelets.start_pod(Pod(uid, uid, app.namespace, node, labels))

    def restart_operator(self) -> None:
        """A new process with a new list of everything, and no memory."""
        known = self.operator.last_complete
        self.operator = self._operator()
        self.operator.last_complete = known  # the checker's, not the operator's
        self.operator.start()

    def _operator(self) -> Operator:
        return Operator(
            self.api, self.fleet, self.draw, self.tell, conflicts=0.03 if self.with_faults else 0.0
        )

    # -- time -----------------------------------------------------------------------------------

    def run(self) -> Simulation:
        """The whole story: an opening, faults, healing, rest, a last edit. Raises `Violated`, with
        the seed and the time in its text.
        """
        from hotweights_operator.sim.story import inject

        try:
            self.set_up()
            if self.draw.random() < 0.6:
                self.steps(OPENING_STEPS, lambda: endings.all_ready(self))
            # a step of a large cluster takes as long as many steps of a small one
            for _ in range(STORY_STEPS if not self.plot.large else STORY_STEPS // 3):
                if self.draw.random() < 0.3:
                    inject(self)
                self.step()
                self.plot.go_on(self)
            endings.heal(self)
            if self.draw.random() < 0.5:
                endings.come_to_rest(self)
            endings.come_to_a_good_end(self)
        except Violated as violation:
            raise Violated(
                violation.name, f"{violation.detail} (seed {self.seed}, {self.now:%H:%M:%S})"
            ) from violation
        return self

    def step(self, seconds: float = 0.0) -> None:
        """One moment: machines, then the operator, then the judges, who must see what both did.
        ``seconds`` is how much time passes; 0: drawn.
        """
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
        idle = (
            before == self.api.version and not self.operator.dirty and not self.operator.is_behind
        )
        idle = idle and not self.fleet.hesitates
        self.idle_steps = self.idle_steps + 1 if idle else 0

    def steps(self, most: int, done: Callable[[], bool], *, hastens: bool = False) -> bool:
        """Steps until something is so; time goes faster while nothing happens. Whether it came to
        be.
        """
        for _ in range(most):
            if done():
                return True
            self.step(seconds=40.0 if hastens and self.idle_steps > IDLE_STEPS else 0.0)
        return done()

    # -- for those who look ---------------------------------------------------------------------

    def digest(self, app: App, name: str) -> str:
        """A version's digest, whether or not the operator knows it already."""
        version: Version | None = self.api.get("version", f"{app.namespace}/{name}")
        return self.fleet.contents[version.spec.source.uri] if version is not None else ""


def simulate(
    seed: int, tell: Callable[[str], None] = silence, ignored: Collection[str] = ()
) -> Simulation:
    """One seed's story, to its end. Raises `Violated`."""
    return Simulation(seed, tell, ignored=ignored).run()
