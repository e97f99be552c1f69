"""A Deployment grows while its rollout goes badly: what new pods boot into, on nodes that are new
too.
"""

from __future__ import annotations

from typing import Any

import pytest

from hotweights_crds.conditions import is_true
from hotweights_crds.weightrollout import WeightRolloutSpec, WeightRolloutStatus
from hotweights_operator.sim.cluster.bad_versions import Flaw
from hotweights_operator.sim.run import Simulation

BEFORE, ADDED = 4, 3
STEPS = 400
"""More than any of these stories takes."""


class Story:
    """Four pods of two nodes serve v0, and v1 is rolled out."""

    def __init__(self, flaw: Flaw | None = None, **spec: Any) -> None:
        self.sim = Simulation(11, with_faults=False)
        self._spec = spec
        self.sim.set_up(self._wants("v0"), nodes=2, pods=BEFORE)
        (self.app,) = self.sim.apps
        self.until(lambda: self.status.pods.ready == BEFORE and self.phase == "Complete")
        self.old = {pod.uid for pod in self.sim.fleet.pods()}
        if flaw is not None:
            self.sim.fleet.faults.flaws[self.sim.digest(self.app, "v1")] = flaw
        self.sim.put_rollout(self.app, self._wants("v1"))

    def _wants(self, version: str, **more: Any) -> WeightRolloutSpec:
        return WeightRolloutSpec.from_dict(
            {
                "versionRef": {"name": version},
                "target": {"selector": {"matchLabels": {"app": "rollout"}}},
                **self._spec,
                **more,
            }
        )

    def pause(self) -> None:
        self.sim.put_rollout(self.app, self._wants("v1", paused=True))

    def until(self, holds: Any) -> None:
        """Step by step; the judges of `sim` look at each."""
        assert self.sim.steps(STEPS, holds, hastens=True), self.status

    @property
    def status(self) -> WeightRolloutStatus:
        found = self.sim.rollout_of(self.app)
        return found.status if found is not None else WeightRolloutStatus()

    @property
    def phase(self) -> str:
        return self.status.phase

    @property
    def served(self) -> dict[str, str]:
        """Pod → the version that it is of service with, in words; without those of none."""
        names = {self.sim.digest(self.app, name): name for name in ("v0", "v1")}
        kubelets, engines = self.sim.fleet.kubelets, self.sim.fleet.engines
        return {
            pod.uid: names.get(engines[pod.uid].digest, "?")
            for pod in self.sim.fleet.pods()
            if kubelets.in_service(pod.uid)
        }

    def grows(self) -> None:
        """By pods that come to lie on new nodes and on old ones."""
        for name in ("new-0", "new-1"):
            self.sim.fleet.add_node(name)
        self.app.replicas = BEFORE + ADDED

    def everybody_serves(self, version: str) -> bool:
        return list(self.served.values()) == [version] * (BEFORE + ADDED)

    def of_new_pods(self) -> list[str]:
        return [version for uid, version in self.served.items() if uid not in self.old]


FLAWS = {
    "its engine ends": Flaw("crashing", seconds=5.0),
    "its answers are wrong": Flaw("mismatched"),
    "a commit breaks it": Flaw("dirty"),
    "it is refused": Flaw("refused"),
}


@pytest.mark.parametrize("action", ["Abort", "Pause"])
@pytest.mark.parametrize("flaw", FLAWS.values(), ids=FLAWS)
def test_new_pods_boot_into_what_is_stable_once_a_version_was_given_up(
    flaw: Flaw, action: str
) -> None:
    story = Story(flaw, failurePolicy={"maxFailed": 0, "action": action})
    story.until(lambda: story.phase in ("Aborted", "Stalled"))
    story.grows()
    story.until(lambda: len(story.of_new_pods()) == ADDED)
    assert story.of_new_pods() == ["v0"] * ADDED
    assert story.phase in ("Aborted", "Stalled")
    story.until(lambda: story.everybody_serves("v0"))


@pytest.mark.parametrize("passed", [False, True], ids=["as it begins", "when pods may change"])
@pytest.mark.parametrize("flaw", FLAWS.values(), ids=FLAWS)
def test_new_pods_come_to_what_is_stable_though_they_began_with_what_then_failed(
    flaw: Flaw, passed: bool
) -> None:
    story = Story(flaw, failurePolicy={"maxFailed": 0, "action": "Abort"})
    story.until(lambda: story.status.target.version == "v1")
    if passed and flaw.kind != "refused":  # which never comes so far
        story.until(lambda: story.status.prepared_revision == story.status.revision)
    assert story.phase != "Aborted"
    story.grows()
    story.until(lambda: story.phase == "Aborted" and story.everybody_serves("v0"))


def test_new_pods_boot_into_what_is_stable_while_somebody_pauses() -> None:
    story = Story()
    story.until(lambda: story.status.pods.updated == 1)
    story.pause()
    story.until(lambda: story.phase == "Paused")
    story.grows()
    story.until(lambda: len(story.of_new_pods()) == ADDED)
    assert story.of_new_pods() == ["v0"] * ADDED


def test_new_pods_boot_into_what_is_rolled_out_while_all_is_well() -> None:
    story = Story()
    story.until(lambda: story.status.pods.updated == 1)
    story.grows()
    story.until(lambda: len(story.of_new_pods()) == ADDED)
    assert story.of_new_pods() == ["v1"] * ADDED
    story.until(lambda: is_true(story.status.conditions, "Ready"))
    assert story.everybody_serves("v1")
