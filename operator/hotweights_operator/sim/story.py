"""What may happen to a cluster while a rollout runs: faults, and users changing their minds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from hotweights_crds.weightrollout import FailurePolicy, VersionRef
from hotweights_operator.sim import plan
from hotweights_operator.sim.operator import Ended
from hotweights_operator.sim.plan import App

if TYPE_CHECKING:
    from hotweights_operator.sim.run import Simulation

Happening = Callable[["Simulation"], bool]
"""Whether it could happen."""


def happen(sim: Simulation) -> None:
    """One of them, by weight."""
    happening = sim.draw.choices(list(HAPPENINGS), weights=list(HAPPENINGS.values()))[0]
    name = name_of(happening)
    sim.tell(f"-- {name}")
    if happening(sim):
        sim.api.counts[f"happens: {name}"] += 1


def name_of(happening: Happening) -> str:
    """As it is told and counted."""
    return happening.__name__.replace("_", " ").strip()


def names() -> tuple[str, ...]:
    """Of all."""
    return tuple(sorted(name_of(happening) for happening in HAPPENINGS))


def _node(sim: Simulation) -> str:
    names_ = sorted(sim.api.objects["node"])
    return sim.draw.choice(names_) if names_ else ""


def _pod(sim: Simulation) -> str:
    uids = sorted(uid for uid in sim.fleet.engines if sim.api.get("pod", uid).live)
    return sim.draw.choice(uids) if uids else ""


def _change(sim: Simulation, app: App | None = None, **update: object) -> bool:
    app = app or sim.draw.choice(sim.apps)
    rollout = sim.rollout_of(app)
    if rollout is None:
        return False
    sim.put_rollout(app, rollout.spec.model_copy(update=update))
    return True


# -- machines ----------------------------------------------------------------------------------------------------------


def agent_dies(sim: Simulation) -> bool:
    """And comes back, or not until the end."""
    node = _node(sim)
    if node:
        sim.fleet.kill_agent(node)
        if sim.draw.random() < 0.7:
            sim.fleet.start_agent(node)
    return bool(node)


def agent_is_flaky(sim: Simulation) -> bool:
    """It dies whenever it is half through staging."""
    node = _node(sim)
    if node:
        sim.fleet.faults.flaky_agents.add(node)
    return bool(node)


def agents_return(sim: Simulation) -> bool:
    """All that are dead."""
    dead = [node for node in sorted(sim.api.objects["node"]) if sim.fleet.agents.get(node) is None]
    for node in dead:
        sim.fleet.start_agent(node)
    return bool(dead)


def commit_fails(sim: Simulation) -> bool:
    """Those of one pod: so often that it is tried again, or given up."""
    uid = _pod(sim)
    if uid:
        sim.fleet.faults.failing_commits[uid] = sim.draw.choice([1, 2, 3, 3])
    return bool(uid)


def commit_breaks(sim: Simulation) -> bool:
    """In the middle: the engine repairs itself, or dies of it."""
    uid = _pod(sim)
    if uid:
        sim.fleet.faults.dirty_commits[uid] = sim.draw.random() < 0.5
    return bool(uid)


def container_dies(sim: Simulation) -> bool:
    """And is started again."""
    uid = _pod(sim)
    if uid:
        sim.api.counts["container dies"] += 1
        sim.fleet.kubelets.end_container(uid, oom=sim.draw.random() < 0.1)
    return bool(uid)


def pod_terminates(sim: Simulation) -> bool:
    """Its ReplicaSet makes another one at once."""
    uid = _pod(sim)
    if uid:
        sim.fleet.kubelets.terminate(uid)
    return bool(uid)


def node_is_drained(sim: Simulation) -> bool:
    """All pods of a node go at once."""
    node = _node(sim)
    pods = [pod.uid for pod in sim.fleet.pods() if pod.node == node and pod.live]
    for uid in pods:
        sim.fleet.kubelets.terminate(uid)
    return bool(pods)


def scale(sim: Simulation) -> bool:
    """Up, down, or to nothing."""
    app = sim.draw.choice(sim.apps)
    app.replicas = sim.draw.randint(0, 7) if app.replicas < 20 else app.replicas + sim.draw.randint(-3, 3)
    return True


def node_vanishes(sim: Simulation) -> bool:
    """With all that is on it."""
    node = _node(sim)
    if len(sim.api.objects["node"]) < 2:
        return False
    sim.fleet.remove_node(node)
    return True


def node_comes(sim: Simulation) -> bool:
    """A new machine."""
    sim.serial += 1
    sim.fleet.add_node(f"node-x{sim.serial}")
    return True


def node_blinks(sim: Simulation) -> bool:
    """Not Ready, or Ready again."""
    node = _node(sim)
    if node:
        known = sim.api.get("node", node)
        sim.api.put("node", node, replace(known, ready=not known.ready))
    return bool(node)


def clock_changes(sim: Simulation) -> bool:
    """A node's clock is set forward or back."""
    node = _node(sim)
    if node:
        seconds = sim.draw.uniform(-plan.MOST_CLOCK_SECONDS, plan.MOST_CLOCK_SECONDS)
        sim.fleet.kubelets.clocks[node] = timedelta(seconds=seconds)
        sim.api.counts["clock of a node is changed"] += 1
    return bool(node)


def node_takes_no_writes(sim: Simulation) -> bool:
    """An admission webhook denies every write to its object, until it does no more."""
    node = _node(sim)
    if sim.api.refusing:
        sim.api.refusing.clear()
        return True
    if len(sim.api.objects["node"]) > 1:
        sim.api.refusing.add(node)
    return bool(sim.api.refusing)


def object_is_deleted(sim: Simulation) -> bool:
    """Somebody deletes a NodeWeights."""
    node = _node(sim)
    if sim.api.get("state", node) is None:
        return False
    sim.api.delete("state", node)
    sim.api.counts["object of a node is deleted"] += 1
    return True


# -- operators ---------------------------------------------------------------------------------------------------------


def operator_restarts(sim: Simulation) -> bool:
    """With a new list of everything, and no memory."""
    sim.restart_operator()
    return True


def operator_ends_soon(sim: Simulation) -> bool:
    """After so many more writes, in the middle of what it does."""
    sim.operator.ends_after = sim.draw.randint(0, 6)
    return True


def operator_stalls(sim: Simulation) -> bool:
    """The process hangs with what it was about to write, another one goes on, and then the old one wakes up."""
    old = sim.operator
    sim.restart_operator()
    for _ in range(3):
        sim.step()
    sim.zombie = True
    try:
        old.work(sim.now, 4)
    except Ended:
        return False
    finally:
        sim.zombie = False
    return True


# -- people ------------------------------------------------------------------------------------------------------------


def version_changes(sim: Simulation) -> bool:
    """A release, or a rollback, in the middle."""
    return _change(sim, version_ref=VersionRef(name=f"v{sim.draw.choice([0, 1, 1, 2, 2, 3])}"))


def version_is_made_anew(sim: Simulation) -> bool:
    """The same name, other bytes."""
    app = sim.draw.choice(sim.apps)
    sim.serial += 1
    sim.add_version(app.namespace, "v1", f"sha256:{app.namespace}-v1-{sim.serial}")
    return True


def version_is_deleted(sim: Simulation) -> bool:
    """It may still be in use."""
    key = f"{sim.draw.choice(sim.apps).namespace}/v{sim.draw.choice([0, 1, 2])}"
    found = sim.api.get("version", key) is not None
    sim.api.delete("version", key)
    return found


def missing_version_comes(sim: Simulation) -> bool:
    """The rollout was there first."""
    app = sim.draw.choice(sim.apps)
    if sim.api.get("version", f"{app.namespace}/v9") is not None:
        return False
    sim.add_version(app.namespace, "v9")
    return True


def source_cannot_be_read(sim: Simulation) -> bool:
    """For a while."""
    app = sim.draw.choice(sim.apps)
    sim.serial += 1
    sim.add_version(app.namespace, "v2", f"sha256:{app.namespace}-v2-{sim.serial}")
    sim.fleet.faults.unreadable.add(sim.api.get("version", f"{app.namespace}/v2").spec.source.uri)
    return True


def pause_or_resume(sim: Simulation) -> bool:
    """By the user."""
    app = sim.draw.choice(sim.apps)
    rollout = sim.rollout_of(app)
    return rollout is not None and _change(sim, app, paused=not rollout.spec.paused)


def retry_is_asked(sim: Simulation) -> bool:
    """By an annotation."""
    app = sim.draw.choice(sim.apps)
    rollout = sim.rollout_of(app)
    if rollout is None:
        return False
    sim.serial += 1
    sim.put_rollout(app, rollout.spec, retry=f"{sim.serial}")
    return True


def policy_changes(sim: Simulation) -> bool:
    """More failures are allowed, or fewer."""
    policy = FailurePolicy(max_failed=sim.draw.choice([0, 1, 2, 5]), action=sim.draw.choice(["Pause", "Abort"]))
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
    """A younger rollout in conflict."""
    app = sim.draw.choice(sim.apps)
    rollout = sim.rollout_of(app)
    if rollout is None:
        return False
    spec = rollout.spec.model_copy(update={"version_ref": VersionRef(name="v2")})
    sim.put_rollout(app, spec, f"{app.name}-younger")
    return True


HAPPENINGS: dict[Happening, float] = {
    agent_dies: 3,
    agent_is_flaky: 0.6,
    agents_return: 2,
    another_selects_the_same: 0.4,
    clock_changes: 0.6,
    commit_breaks: 1.2,
    commit_fails: 2,
    container_dies: 3,
    missing_version_comes: 1,
    node_blinks: 1.5,
    node_comes: 0.7,
    node_is_drained: 0.8,
    node_takes_no_writes: 0.7,
    node_vanishes: 0.7,
    object_is_deleted: 0.4,
    operator_ends_soon: 2,
    operator_restarts: 1,
    operator_stalls: 1,
    pause_or_resume: 1.2,
    pod_terminates: 2,
    policy_changes: 0.7,
    retry_is_asked: 1,
    rollout_is_deleted: 0.4,
    scale: 1.5,
    source_cannot_be_read: 0.4,
    version_changes: 4,
    version_is_deleted: 0.4,
    version_is_made_anew: 0.5,
}
