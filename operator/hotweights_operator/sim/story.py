"""What may happen to a cluster while a rollout runs: faults, and users changing their minds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from hotweights_crds.weightrollout import VersionRef, WeightRolloutSpec

if TYPE_CHECKING:
    from hotweights_operator.sim.run import Simulation

Happening = Callable[["Simulation"], None]


def happen(sim: Simulation) -> None:
    """One of them, by weight."""
    happening = sim.draw.choices(list(HAPPENINGS), weights=list(HAPPENINGS.values()))[0]
    sim.tell(f"-- {happening.__name__.replace('_', ' ').strip()}")
    happening(sim)


def _node(sim: Simulation) -> str | None:
    names = sorted(sim.api.objects["node"])
    return sim.draw.choice(names) if names else None


def _pod(sim: Simulation) -> str | None:
    uids = sorted(sim.fleet.engines)
    return sim.draw.choice(uids) if uids else None


def _change(sim: Simulation, **update: object) -> None:
    for rollout in sim.rollouts()[:1]:
        sim.put_rollout(rollout.name, rollout.spec.model_copy(update=update))


def agent_dies(sim: Simulation) -> None:
    """And comes back, or not until the end."""
    node = _node(sim)
    if node is None:
        return
    sim.fleet.kill_agent(node)
    if sim.draw.random() < 0.7:
        sim.fleet.start_agent(node)


def agents_return(sim: Simulation) -> None:
    """All that are dead."""
    for node in sorted(sim.api.objects["node"]):
        if sim.fleet.agents.get(node) is None:
            sim.fleet.start_agent(node)


def engine_refuses(sim: Simulation) -> None:
    """A version does not fit this pod's model."""
    uid = _pod(sim)
    if uid is not None:
        sim.fleet.faults.incompatible.add((uid, f"sha256:v{sim.draw.choice([1, 2])}"))
        sim.lasting = True


def commit_fails(sim: Simulation) -> None:
    """The next commit of a pod fails, harmlessly or in the middle."""
    uid = _pod(sim)
    if uid is not None:
        sim.fleet.faults.breaking_commits[uid] = sim.draw.choice(["Failed", "Dirty"])


def container_dies(sim: Simulation) -> None:
    """And is started again."""
    uid = _pod(sim)
    if uid is not None:
        sim.fleet.restart_container(uid)


def pod_is_deleted(sim: Simulation) -> None:
    """Its Deployment makes another one."""
    uid = _pod(sim)
    if uid is not None:
        sim.fleet.remove_pod(uid)


def pod_terminates(sim: Simulation) -> None:
    """Slowly: it is marked first."""
    uid = _pod(sim)
    if uid is not None:
        sim.api.put("pod", uid, replace(sim.api.get("pod", uid), terminating=True, finished=True, ready=False))


def scale(sim: Simulation) -> None:
    """Up, down, or to nothing."""
    sim.replicas = sim.draw.randint(0, 7)


def node_vanishes(sim: Simulation) -> None:
    """With all that is on it."""
    node = _node(sim)
    if node is not None and len(sim.api.objects["node"]) > 1:
        sim.fleet.remove_node(node)


def node_comes(sim: Simulation) -> None:
    """A new machine."""
    sim.serial += 1
    sim.fleet.add_node(f"node-x{sim.serial}")


def node_blinks(sim: Simulation) -> None:
    """Not Ready, or Ready again."""
    node = _node(sim)
    if node is not None:
        known = sim.api.get("node", node)
        sim.api.put("node", node, replace(known, ready=not known.ready))


def operator_restarts(sim: Simulation) -> None:
    """With a new list of everything, and no memory."""
    known = sim.operator.last_complete
    sim.operator = sim._operator()
    sim.operator.last_complete = known
    sim.operator.start()


def operator_stalls(sim: Simulation) -> None:
    """A decision is made, the process hangs, another operator goes on, and then the old one's writes arrive."""
    rollouts = sim.rollouts()
    if not rollouts:
        return
    key = ("rollout", f"{rollouts[0].namespace}/{rollouts[0].name}")
    old = sim.operator
    actions = old.decide(("rollout", key[1]), sim.now)
    operator_restarts(sim)
    for _ in range(3):
        sim.step()
    old.perform(("rollout", key[1]), actions)


def version_changes(sim: Simulation) -> None:
    """A release, or a rollback, in the middle."""
    _change(sim, version_ref=VersionRef(name=f"v{sim.draw.choice([0, 1, 1, 2, 3])}"))


def version_is_made_anew(sim: Simulation) -> None:
    """The same name, other bytes."""
    sim.serial += 1
    sim.add_version("v1", f"sha256:v1-{sim.serial}")


def version_is_deleted(sim: Simulation) -> None:
    """It may still be in use."""
    sim.api.delete("version", f"default/v{sim.draw.choice([1, 2])}")


def missing_version_comes(sim: Simulation) -> None:
    """The rollout was there first."""
    if sim.api.get("version", "default/v9") is None:
        sim.add_version("v9")


def source_is_corrupt(sim: Simulation) -> None:
    """For good."""
    sim.fleet.faults.corrupt.add(f"sha256:v{sim.draw.choice([1, 2])}")
    sim.lasting = True


def pause_or_resume(sim: Simulation) -> None:
    """By the user."""
    for rollout in sim.rollouts()[:1]:
        _change(sim, paused=not rollout.spec.paused)


def rollout_is_deleted(sim: Simulation) -> None:
    """Pods keep what they serve; it may be made again."""
    for rollout in sim.rollouts()[:1]:
        sim.api.delete("rollout", f"{rollout.namespace}/{rollout.name}")
        if sim.draw.random() < 0.7:
            for _ in range(5):
                sim.step()
            sim.put_rollout("again", rollout.spec)


def another_selects_the_same(sim: Simulation) -> None:
    """A younger rollout in conflict."""
    for rollout in sim.rollouts()[:1]:
        spec: WeightRolloutSpec = rollout.spec.model_copy(update={"version_ref": VersionRef(name="v2")})
        sim.put_rollout("younger", spec)


HAPPENINGS: dict[Happening, float] = {
    agent_dies: 3,
    agents_return: 2,
    engine_refuses: 0.5,
    commit_fails: 2,
    container_dies: 3,
    pod_is_deleted: 2,
    pod_terminates: 1,
    scale: 1.5,
    node_vanishes: 0.7,
    node_comes: 0.7,
    node_blinks: 1.5,
    operator_restarts: 2,
    operator_stalls: 1.5,
    version_changes: 2.5,
    version_is_made_anew: 0.5,
    version_is_deleted: 0.5,
    missing_version_comes: 2,
    source_is_corrupt: 0.3,
    pause_or_resume: 1,
    rollout_is_deleted: 0.4,
    another_selects_the_same: 0.4,
}
