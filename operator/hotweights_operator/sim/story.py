"""What may happen to a cluster while a rollout runs: mishaps, and users changing their minds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hotweights_crds.weightrollout import FailurePolicy, VersionRef
from hotweights_operator.sim import faults
from hotweights_operator.sim.plan import App

if TYPE_CHECKING:
    from hotweights_operator.sim.run import Simulation

Happening = Callable[["Simulation"], bool]
"""Does one thing to the world; says whether it could happen."""


def inject(sim: Simulation) -> None:
    """Let one of `HAPPENINGS` happen, drawn by weight; it is counted only if it could."""
    happening = sim.draw.choices(list(HAPPENINGS), weights=list(HAPPENINGS.values()))[0]
    name = name_of(happening)
    sim.tell(f"-- {name}")
    if happening(sim):
        sim.api.counts[f"happens: {name}"] += 1


def name_of(happening: Happening) -> str:
    """The name by which a happening is told and counted: its function's, in words."""
    return happening.__name__.replace("_", " ").strip()


def names() -> tuple[str, ...]:
    """The names of all happenings, in order."""
    return tuple(sorted(name_of(happening) for happening in HAPPENINGS))


def _change(sim: Simulation, app: App | None = None, **update: object) -> bool:
    app = app or sim.draw.choice(sim.apps)
    rollout = sim.rollout_of(app)
    if rollout is None:
        return False
    sim.put_rollout(app, rollout.spec.model_copy(update=update))
    return True


# -- people -------------------------------------------------------------------------------------


def version_changes(sim: Simulation) -> bool:
    """A release, or a rollback, in the middle."""
    return _change(sim, version_ref=VersionRef(name=f"v{sim.draw.choice([0, 1, 1, 2, 2, 3])}"))


def version_is_made_anew(sim: Simulation) -> bool:
    """A version is deleted and made anew: the same name, other bytes."""
    app = sim.draw.choice(sim.apps)
    sim.serial += 1
    sim.add_version(app.namespace, "v1", f"sha256:{app.namespace}-v1-{sim.serial}")
    return True


def version_is_deleted(sim: Simulation) -> bool:
    """A WeightVersion is deleted; it may still be in use."""
    key = f"{sim.draw.choice(sim.apps).namespace}/v{sim.draw.choice([0, 1, 2])}"
    found = sim.api.get("version", key) is not None
    sim.api.delete("version", key)
    return found


def missing_version_comes(sim: Simulation) -> bool:
    """A version comes that a rollout has named before there was one."""
    app = sim.draw.choice(sim.apps)
    if sim.api.get("version", f"{app.namespace}/v9") is not None:
        return False
    sim.add_version(app.namespace, "v9")
    return True


def source_cannot_be_read(sim: Simulation) -> bool:
    """A version's source may not be read, until the faults stop."""
    app = sim.draw.choice(sim.apps)
    sim.serial += 1
    sim.add_version(app.namespace, "v2", f"sha256:{app.namespace}-v2-{sim.serial}")
    sim.fleet.faults.unreadable.add(sim.api.get("version", f"{app.namespace}/v2").spec.source.uri)
    return True


def pause_or_resume(sim: Simulation) -> bool:
    """The user sets spec.paused, or takes it back."""
    app = sim.draw.choice(sim.apps)
    rollout = sim.rollout_of(app)
    return rollout is not None and _change(sim, app, paused=not rollout.spec.paused)


def retry_is_asked(sim: Simulation) -> bool:
    """The user asks for a retry, by an annotation."""
    app = sim.draw.choice(sim.apps)
    rollout = sim.rollout_of(app)
    if rollout is None:
        return False
    sim.serial += 1
    sim.put_rollout(app, rollout.spec, retry=f"{sim.serial}")
    return True


def policy_changes(sim: Simulation) -> bool:
    """More failures are allowed, or fewer."""
    policy = FailurePolicy(
        max_failed=sim.draw.choice([0, 1, 2, 5]), action=sim.draw.choice(["Pause", "Abort"])
    )
    return _change(sim, failure_policy=policy)


def rollout_is_deleted(sim: Simulation) -> bool:
    """Pods keep what they serve; it may be made again."""
    app = sim.draw.choice(sim.apps)
    rollout = sim.rollout_of(app)
    if rollout is None:
        return False
    sim.api.delete("rollout", f"{rollout.namespace}/{rollout.name}")
    if sim.draw.random() < 0.7:
        for _ in range(5):
            sim.step()
        sim.put_rollout(app, rollout.spec)
    return True


def another_selects_the_same(sim: Simulation) -> bool:
    """A younger rollout selects the same pods: a conflict, in which the older one wins."""
    app = sim.draw.choice(sim.apps)
    rollout = sim.rollout_of(app)
    if rollout is None:
        return False
    spec = rollout.spec.model_copy(update={"version_ref": VersionRef(name="v2")})
    sim.put_rollout(app, spec, f"{app.name}-younger")
    return True


# weights: how often each happens, beside the others
HAPPENINGS: dict[Happening, float] = {
    faults.agent_dies: 3,
    faults.agent_is_flaky: 0.6,
    faults.agents_return: 2,
    another_selects_the_same: 0.4,
    faults.clock_changes: 0.6,
    faults.commit_breaks: 1.2,
    faults.commit_fails: 2,
    faults.container_dies: 3,
    missing_version_comes: 1,
    faults.node_blinks: 1.5,
    faults.node_comes: 0.7,
    faults.node_is_drained: 0.8,
    faults.node_takes_no_writes: 0.7,
    faults.node_vanishes: 0.7,
    faults.object_is_deleted: 0.4,
    faults.operator_ends_soon: 2,
    faults.operator_restarts: 1,
    faults.operator_stalls: 1,
    pause_or_resume: 1.2,
    faults.pod_terminates: 2,
    policy_changes: 0.7,
    retry_is_asked: 1,
    rollout_is_deleted: 0.4,
    faults.scale: 1.5,
    source_cannot_be_read: 0.4,
    version_changes: 4,
    version_is_deleted: 0.4,
    version_is_made_anew: 0.5,
}
