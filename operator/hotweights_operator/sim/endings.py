"""How stories end: the faults stop, then everything comes to rest, then there is a last edit, and
it must work.

The last edit goes to a version that every engine can take, back or onwards. There is no excuse for
a pod that does not come to serve it: not what failed before, nor what was given up, lost or
restarted. While a rollout is held or given up, nobody is left behind: every pod is of service with
something.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hotweights_crds.conditions import is_true
from hotweights_crds.weightrollout import VersionRef
from hotweights_operator.model.objects import Pod
from hotweights_operator.sim import plan
from hotweights_operator.sim.plan import App

if TYPE_CHECKING:
    from hotweights_operator.sim.run import Simulation

REST_STEPS = 10  # without any write: then the world is at rest
MOST_STEPS = 600
CALM_STEPS = 200  # in which nobody may change, where the lost keep the world from resting


def heal(sim: Simulation) -> None:
    """The faults stop; what is wrong with versions stays so."""
    sim.tell("-- the faults stop")
    sim.fleet.faults.heal()
    sim.operator.ends_after = -1
    sim.operator.conflicts = 0.0
    sim.api.refusing.clear()
    changed = set(sim.fleet.kubelets.clocks)
    sim.fleet.kubelets.clocks.clear()
    if changed:
        # until what was written by wrong clocks lies behind
        sim.steps(plan.MOST_CLOCK_SECONDS, lambda: False)
    for name, (_, node) in list(sim.api.objects["node"].items()):
        if not node.ready:
            sim.api.put("node", name, replace(node, ready=True))
        if sim.fleet.agents.get(name) is None or name in changed:
            sim.fleet.kill_agent(name)
            sim.fleet.start_agent(name)
    if not sim.api.objects["node"]:
        sim.fleet.add_node("node-new")
    for app in sim.apps:
        sim.api.delete("rollout", f"{app.namespace}/{app.name}-younger")
        if sim.rollout_of(app) is None:
            sim.put_rollout(app, plan.spec(sim.draw, app))
    wanted = {(r.namespace, r.spec.version_ref.name) for r in sim.rollouts()}
    for namespace in {app.namespace for app in sim.apps}:
        wanted |= {(namespace, name) for name in plan.GOOD}
    for namespace, name in sorted(wanted):
        if sim.api.get("version", f"{namespace}/{name}") is None:
            sim.add_version(namespace, name)


def come_to_rest(sim: Simulation) -> None:
    """Without any edit: it may be held, given up or stalled, but nobody is left behind."""
    sim.tell("-- it is left alone")
    sim.idle_steps = 0
    last: deque[dict[str, Any]] = deque(maxlen=CALM_STEPS)

    def rests() -> bool:
        last.append({pod.uid: _does(sim, pod) for pod in sim.fleet.pods() if pod.live})
        return sim.idle_steps >= REST_STEPS

    rested = sim.steps(MOST_STEPS, rests, hastens=True)
    pods = [
        (app, pod) for app in sim.apps for pod in sim.fleet.pods() if pod.live and app.owns(pod)
    ]
    lost = [pod.uid for app, pod in pods if _is_lost(sim, app, pod)]
    sim.judge.bench.count("comes to rest" if rested else "comes to rest, all but the lost")
    told = {r.name: (r.status.phase, r.status.message) for r in sim.rollouts()}
    if not rested and not lost:
        sim.judge.fails("comes to rest", f"after {MOST_STEPS} steps: {told}")
    for uid in {pod.uid for _, pod in pods} - set(lost) if not rested else ():
        # what those do who are lost for this version is no reason for others to do anything
        if any(does.get(uid) != last[-1].get(uid) for does in last):
            sim.judge.fails("comes to rest", f"{uid} still changes: {told}")
    wanted = sum(app.replicas for app in sim.apps)
    if len(pods) != wanted:
        sim.judge.fails("nobody is left behind", f"{len(pods)} pods of {wanted}")
    for _, pod in pods:
        if not sim.fleet.kubelets.in_service(pod.uid) and pod.uid not in lost:
            sim.judge.fails("nobody is left behind", _account(sim, pod))


def _does(sim: Simulation, pod: Pod) -> Any:
    """What a pod is told and does, as far as somebody could notice that it changes."""
    state, engine = sim.api.get("state", pod.node), sim.fleet.engines.get(pod.uid)
    order = state.assigned(pod.uid) if state is not None else None
    return (
        (order.digest, order.prepare, order.token) if order is not None else None,
        (engine.phase, engine.digest) if engine is not None else None,
        sim.fleet.kubelets.in_service(pod.uid),
    )


def _is_lost(sim: Simulation, app: App, pod: Pod) -> bool:
    """Whether what is stable turned out to be bad for this pod after it was complete: only people
    can help.
    """
    rollout = sim.rollout_of(app)
    digest = rollout.status.stable.digest if rollout is not None else ""
    flaw, agent = sim.fleet.faults.flaws.get(digest), sim.fleet.agents.get(pod.node)
    memory = agent.engines.get(pod.uid) if agent is not None else None
    gave_up = memory is not None and memory.failed is not None and memory.failed.digest == digest
    known = {sim.digest(app, name.partition("/")[2]) for name in sim.api.objects["version"]}
    # its WeightVersion is gone, and perhaps every node that held it
    forgotten = bool(digest) and digest not in known
    # golden tokens are not demanded of what is stable, so nobody is lost for the want of them
    bad = flaw is not None and flaw.kind != "unrecorded" and flaw.hits(pod.uid, digest)
    return gave_up or forgotten or bad


def come_to_a_good_end(sim: Simulation) -> None:
    """A last edit to a version that every engine can take; with a node that cannot be written to
    for a while, sometimes.
    """
    sim.steps(60, lambda: _all_seen(sim))
    nodes = sorted(sim.api.objects["node"])
    refusing = sim.draw.choice(nodes) if len(nodes) > 1 and sim.draw.random() < 0.15 else ""
    if refusing:
        sim.tell(f"-- nothing can be written to {refusing}")
        sim.api.refusing.add(refusing)
    for app in sim.apps:
        _last_edit(sim, app)
    if refusing:
        sim.steps(MOST_STEPS, lambda: _good_beside(sim, refusing), hastens=True)
        _check_beside(sim, refusing)
        sim.api.refusing.clear()
        sim.tell(f"-- {refusing} can be written to again")
    if not sim.steps(MOST_STEPS, lambda: _is_good(sim), hastens=True):
        _explain(sim)


def _last_edit(sim: Simulation, app: App) -> None:
    rollout = sim.rollout_of(app)
    if rollout is None:
        raise LookupError(f"{app.name} has no rollout: heal makes one")
    names = [name for name in plan.GOOD if sim.digest(app, name) != rollout.status.target.digest]
    app.ends_with = sim.draw.choice(names)
    spec = rollout.spec.model_copy(
        update={"version_ref": VersionRef(name=app.ends_with), "paused": False}
    )
    sim.put_rollout(app, spec)


def _all_seen(sim: Simulation) -> bool:
    return all(r.status.observed_generation == r.generation for r in sim.rollouts())


def all_ready(sim: Simulation) -> bool:
    """Whether every rollout says Ready."""
    return all(is_true(r.status.conditions, "Ready") for r in sim.rollouts())


def _serves_the_end(sim: Simulation, app: App, pod: Pod) -> bool:
    """Whether a pod is of service with the version that the story ends with."""
    engine = sim.fleet.engines.get(pod.uid)
    is_it = engine is not None and engine.digest == sim.digest(app, app.ends_with)
    return is_it and sim.fleet.kubelets.in_service(pod.uid)


def _is_good(sim: Simulation) -> bool:
    if not all(
        is_true(r.status.conditions, "Ready") or not a.replicas
        for a in sim.apps
        if (r := sim.rollout_of(a))
    ):
        return False
    pods = [
        (app, pod) for app in sim.apps for pod in sim.fleet.pods() if pod.live and app.owns(pod)
    ]
    served = all(_serves_the_end(sim, app, pod) for app, pod in pods)
    return served and len(pods) == sum(app.replicas for app in sim.apps) and _all_seen(sim)


def _explain(sim: Simulation) -> None:
    """Which of the ends is not good."""
    for app in sim.apps:
        for pod in sim.fleet.pods():
            if pod.live and app.owns(pod) and not _serves_the_end(sim, app, pod):
                sim.judge.fails("the way back works", _account(sim, pod))
        rollout = sim.rollout_of(app)
        if rollout is not None and app.replicas and not is_true(rollout.status.conditions, "Ready"):
            text = f"{rollout.status.phase}: {rollout.status.message}"
            sim.judge.fails(
                "says so when it is complete", f"every pod serves {app.ends_with}, but {text}"
            )
    seen = {
        f"{r.namespace}/{r.name}": (r.generation, r.status.observed_generation)
        for r in sim.rollouts()
    }
    pods = {f"{app.namespace}/{app.name}": app.replicas for app in sim.apps}
    sim.judge.fails(
        "comes to a good end",
        f"pods are missing or the last edit is not seen: {pods} wanted, {seen}",
    )


def _account(sim: Simulation, pod: Pod) -> str:
    state, engine = sim.api.get("state", pod.node), sim.fleet.engines.get(pod.uid)
    order = state.assigned(pod.uid) if state is not None else None
    told = (
        f"told {order.digest or 'nothing'} (prepare {order.prepare or 'nothing'})"
        if order
        else "told nothing"
    )
    does = f"{engine.phase} on {engine.digest or 'what it booted'}" if engine else "no engine"
    messages = [f"{r.name}: {r.status.phase}: {r.status.message}" for r in sim.rollouts()]
    return f"{pod.uid} is {told} and {does}, {'Ready' if pod.ready else 'not Ready'}; {messages}"


def _good_beside(sim: Simulation, node: str) -> bool:
    """Whether all others serve the last version, and the statuses name the node that cannot be
    written to.
    """
    for app in sim.apps:
        pods = [pod for pod in sim.fleet.pods() if pod.live and app.owns(pod)]
        if not all(pod.node == node or _serves_the_end(sim, app, pod) for pod in pods):
            return False
        left = [pod for pod in pods if pod.node == node and not _serves_the_end(sim, app, pod)]
        rollout = sim.rollout_of(app)
        if (
            left
            and rollout is not None
            and all(failure.node != node for failure in rollout.status.failures)
        ):
            return False
    return True


def _check_beside(sim: Simulation, node: str) -> None:
    if _good_beside(sim, node):
        return
    told = [f"{r.name}: {r.status.phase}: {r.status.message}" for r in sim.rollouts()]
    sim.judge.fails("one node's refusal never silences", f"{node} refuses writes: {told}")
