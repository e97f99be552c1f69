"""A version every hour: what is kept about a rollout does not grow with the versions before."""

from __future__ import annotations

import pytest

from hotweights_crds.weightrollout import MAX_HISTORY, WeightRolloutSpec
from hotweights_operator.sim.run import Simulation

SPEC = {
    "versionRef": {"name": "v0"},
    "target": {"selector": {"matchLabels": {"app": "rollout"}}},
    "strategy": {"type": "AllAtOnce"},
}
NEARLY = 0.05  # names and numbers get a digit more


def rolled_out(sim: Simulation, name: str) -> bool:
    (rollout,) = sim.rollouts()
    return rollout.status.phase == "Complete" and rollout.status.target.name == name


def sizes(sim: Simulation) -> dict[str, int]:
    """Characters of what stands at the API server, and what the operator remembers."""
    (rollout,) = sim.rollouts()
    states = [state for _, state in sim.api.objects["state"].values()]
    seen = sim.operator.cache.observed()
    return {
        "status": len(rollout.status.model_dump_json()),
        "nodes": sum(
            len(state.spec.model_dump_json()) + len(state.status.model_dump_json())
            for state in states
        ),
        "remembered": len(seen.interned) + sum(map(len, seen.remembered.values())),
    }


@pytest.mark.timeout(180)
def test_the_twentieth_version_leaves_no_more_than_the_tenth() -> None:
    sim = Simulation(1, with_faults=False)
    sim.set_up(WeightRolloutSpec.from_dict(SPEC), nodes=2, pods=2)
    (app,) = sim.apps
    assert sim.steps(400, lambda: rolled_out(sim, "v0"))
    found = []
    for number in range(2 * MAX_HISTORY):
        name = f"hour-{number:03}"
        sim.add_version(app.namespace, name)
        (rollout,) = sim.rollouts()
        named = rollout.spec.version_ref.model_copy(update={"name": name})
        sim.put_rollout(app, rollout.spec.model_copy(update={"version_ref": named}))
        assert sim.steps(400, lambda name=name: rolled_out(sim, name))  # type: ignore[misc]
        found.append(sizes(sim))
    then, now = found[MAX_HISTORY], found[-1]
    assert all(size <= then[what] * (1 + NEARLY) for what, size in now.items()), (then, now)
