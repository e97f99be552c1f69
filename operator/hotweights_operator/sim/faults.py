"""What goes wrong with machines and operators while a rollout runs. Each says whether it could
happen.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from hotweights_operator.sim import plan
from hotweights_operator.sim.cluster.operator import Ended

if TYPE_CHECKING:
    from hotweights_operator.sim.run import Simulation


def _node(sim: Simulation) -> str:
    names_ = sorted(sim.api.objects["node"])
    return sim.draw.choice(names_) if names_ else ""


def _pod(sim: Simulation) -> str:
    uids = sorted(uid for uid in sim.fleet.engines if sim.api.get("pod", uid).live)
    return sim.draw.choice(uids) if uids else ""


# -- machines -----------------------------------------------------------------------------------


def agent_dies(sim: Simulation) -> bool:
    """An agent dies, and comes back at once, or not until the end."""
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
    """All agents that are dead are started again."""
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
    """An engine's container dies, of memory sometimes, and is started again."""
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
    """An application gets more pods, fewer, or none; a large one only a few more or fewer."""
    app = sim.draw.choice(sim.apps)
    app.replicas = (
        sim.draw.randint(0, 7) if app.replicas < 20 else app.replicas + sim.draw.randint(-3, 3)
    )
    return True


def node_vanishes(sim: Simulation) -> bool:
    """A machine is gone with all that is on it; never the last one."""
    node = _node(sim)
    if len(sim.api.objects["node"]) < 2:
        return False
    sim.fleet.remove_node(node)
    return True


def node_comes(sim: Simulation) -> bool:
    """A new machine joins, with an agent."""
    sim.serial += 1
    sim.fleet.add_node(f"node-x{sim.serial}")
    return True


def node_blinks(sim: Simulation) -> bool:
    """A node becomes not Ready, or Ready again; its pods go on."""
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
    """Somebody deletes the NodeWeights of a node that has one."""
    node = _node(sim)
    if sim.api.get("state", node) is None:
        return False
    sim.api.delete("state", node)
    sim.api.counts["object of a node is deleted"] += 1
    return True


# -- operators ----------------------------------------------------------------------------------


def operator_restarts(sim: Simulation) -> bool:
    """It is ended in good order, and the other leads; it comes back with a new list of everything,
    and no memory.
    """
    sim.operator.give_up(sim.now)
    sim.replace_operator(sim.operator)
    return True


def operator_ends_soon(sim: Simulation) -> bool:
    """After so many more writes, in the middle of what it does."""
    sim.operator.ends_after = sim.draw.randint(0, 6)
    return True


def operator_stalls(sim: Simulation) -> bool:
    """The process that leads stands still with what it has sent, for less or for longer than its
    lease; then it goes on.
    """
    leader = sim.operator
    if leader.stands_until is not None or not leader.leads:
        return False
    seconds = sim.draw.choice([3.0, 12.0, 18.0, 30.0])
    try:
        leader.stand_still(sim.now + timedelta(seconds=seconds))
    except Ended:
        sim.replace_operator(leader)
    return True
