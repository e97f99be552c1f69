"""What a story is made of, drawn before it begins: who lives in the cluster, how they roll out,
what is wrong with versions, a plot.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotweights_crds.weightrollout import VersionRef, WeightRolloutSpec
from hotweights_operator.model.objects import Pod
from hotweights_operator.sim.cluster.bad_versions import Flaw, FlawKind

if TYPE_CHECKING:
    from hotweights_operator.sim.run import Simulation

GOOD = ("v0", "v3")
"""Versions that every engine can take: stories end with one of them."""
MOST_CLOCK_SECONDS = 20  # as far as a node's clock may be off, either way
LARGE = 0.01
"""Share of the stories in which the cluster is large."""


@dataclass(slots=True)
class App:
    """A Deployment of engines, and its rollout."""

    namespace: str
    name: str
    replicas: int
    ends_with: str = ""

    def owns(self, pod: Pod) -> bool:
        """Whether it is one of its pods."""
        return pod.namespace == self.namespace and pod.labels.get("app") == self.name


def apps(draw: random.Random) -> tuple[list[App], int]:
    """Who lives in the cluster, and on how many nodes. Two namespaces have the same names for
    everything.
    """
    if draw.random() < LARGE:
        return [App("team-a", "llm", 80), App("team-b", "llm", 25)], 20
    kinds = draw.choices(("one", "two", "three"), weights=(6, 3, 1))[0]
    found = [App("team-a", "llm", draw.randint(1, 6 if kinds == "one" else 4))]
    if kinds != "one":
        found.append(App("team-b", "llm", draw.randint(1, 3)))
    if kinds == "three":
        found.append(App("team-a", "rag", draw.randint(1, 2)))
    return found, draw.randint(1, 4)


def spec(draw: random.Random, app: App) -> WeightRolloutSpec:
    """How an application is rolled out."""
    strategy: dict[str, Any] = {"type": "AllAtOnce"}
    if draw.random() < 0.85:
        most = draw.choice([1, 1, 2, "25%", "50%"] if app.replicas < 20 else ["25%", "50%"])
        strategy = {"type": "Rolling", "rolling": {"maxUnavailable": most}}
    return WeightRolloutSpec.from_dict(
        {
            "versionRef": {"name": draw.choice(["v0", "v0", "v0", "v1", "v9"])},
            "target": {"selector": {"matchLabels": {"app": app.name}}},
            "strategy": strategy,
            "staging": {"originReaders": draw.randint(1, 2)},
            "activation": {"probe": draw.choice(["Any", "Golden"])},
            "failurePolicy": {
                "maxFailed": draw.choice([0, 0, 1, 2]),
                "action": draw.choice(["Pause", "Pause", "Abort"]),
            },
            "progressDeadlineSeconds": draw.choice([15, 60, 300]),
            "minReadySeconds": draw.choice([0, 0, 0, 0, 6]),
        }
    )


_KINDS: dict[FlawKind, float] = {
    "refused": 2,
    "refused at boot": 2,
    "unrecorded": 2,
    "mismatched": 2,
    "dirty": 1,
    "crashing": 2.5,
    "killing": 2.5,
    "corrupt": 0.7,
}


def flaw(draw: random.Random) -> Flaw | None:
    """What is wrong with a new version, if anything is."""
    if draw.random() < 0.5:
        return None
    kind = draw.choices(list(_KINDS), weights=list(_KINDS.values()))[0]
    return Flaw(kind, draw.choice([100, 100, 60, 30]), draw.uniform(2.0, 30.0), draw.random() < 0.5)


# -- plots --------------------------------------------------------------------------------------

Moment = Callable[["Simulation"], bool]


@dataclass(slots=True)
class Plot:
    """Something that people do at the worst moment, once."""

    moment: str = ""  # commits, fails
    deed: str = ""  # back, on, pause, retry
    large: bool = False

    def go_on(self, sim: Simulation) -> None:
        """Do it, if the moment has come."""
        if not self.moment or not self._has_come(sim):
            return
        app = sim.apps[0]
        rollout = sim.rollout_of(app)
        if rollout is None or rollout.spec.version_ref.name in GOOD:
            return
        name = f"{self.deed} when a pod {self.moment}"
        sim.tell(f"-- plot: {name}")
        if self.moment == "commits" and self.deed == "back":
            sim.api.counts["rolled back while a pod commits"] += 1
        self.moment = ""
        if self.deed == "retry":
            sim.put_rollout(app, rollout.spec, retry=f"{sim.now:%H%M%S}")
            return
        change: dict[str, Any] = {"paused": True} if self.deed == "pause" else {}
        if self.deed in ("back", "on"):
            change["version_ref"] = VersionRef(name="v0" if self.deed == "back" else "v3")
        sim.put_rollout(app, rollout.spec.model_copy(update=change))

    def _has_come(self, sim: Simulation) -> bool:
        app = sim.apps[0]
        own = {pod.uid for pod in sim.fleet.pods() if app.owns(pod)}
        if self.moment == "commits":
            return any(
                sim.fleet.engines[uid].committing and not sim.fleet.engines[uid].boots
                for uid in own & set(sim.fleet.engines)
            )
        agents = [agent for agent in sim.fleet.agents.values() if agent is not None]
        return any(
            m.failed is not None
            for agent in agents
            for uid, m in agent.engines.items()
            if uid in own
        )


def plot(draw: random.Random) -> Plot:
    """A plot, in half of the stories; in the others one that never comes about."""
    if draw.random() < 0.5:
        return Plot()
    return Plot(
        draw.choice(["commits", "fails"]), draw.choice(["back", "back", "on", "pause", "retry"])
    )
