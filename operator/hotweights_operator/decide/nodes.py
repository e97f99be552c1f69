"""What a node's object needs besides the rollouts: that it exists, that every opted-in pod stands
in it, and that nothing stays in it for which there is no reason any more.

Pods that belong to no rollout are listed under ``unassigned``: a new one keeps what it boots, one
whose rollout was deleted keeps what it serves, and goes on doing so when it restarts. Everything is
pruned by level: what is left over is found by looking, not by having seen it go. So there are no
finalizers.
"""

from __future__ import annotations

from hotweights_crds.nodeweights import (
    MAX_PODS,
    MAX_STAGE,
    UNASSIGNED,
    PodAssignment,
    RolloutAssignment,
)
from hotweights_operator.decide import assignments, held_versions
from hotweights_operator.model import failures, fencing
from hotweights_operator.model.actions import (
    Action,
    AskResolve,
    Assign,
    CreateNodeWeights,
    NodeDecision,
)
from hotweights_operator.model.objects import SETTLED_PHASES, NodeState, Pod
from hotweights_operator.model.observed import Observed


def decide(name: str, observed: Observed) -> NodeDecision:
    """One step for one node, by `loop` for the key ``node``. At most one write: each is fenced by
    the object's resourceVersion, which the first one changes; `again_in_seconds` 0.0 brings the
    next.
    """
    node, state = observed.nodes.get(name), observed.states.get(name)
    if state is None:
        # not for pods that only end there: a node that drains would get its object anew
        needed = observed.has_agent(name) or any(pod.live for pod in observed.owners.pods_on(name))
        create = (CreateNodeWeights(name, node.uid),) if node is not None and needed else ()
        return NodeDecision(actions=create)
    wanted = _unassigned(state, observed)
    # pods first: what is pruned harms nobody by standing there a moment longer
    actions: list[Action] = []
    if not assignments.same(wanted, state.entry(UNASSIGNED)):
        actions.append(Assign(name, state.resource_version, UNASSIGNED, wanted))
    actions += [
        Assign(name, state.resource_version, entry.uid, None)
        for entry in state.spec.rollouts
        if entry.uid != UNASSIGNED
        and entry.uid not in observed.rollouts
        and _is_empty(entry, state, observed)
    ]
    actions += [
        AskResolve(name, state.resource_version, item.uid, None)
        for item in state.spec.resolve
        if item.uid not in observed.versions
    ]
    # the first alone: it changes the resourceVersion by which the second is fenced
    return NodeDecision(
        actions=tuple(actions[:1]), again_in_seconds=0.0 if len(actions) > 1 else None
    )


def _unassigned(state: NodeState, observed: Observed) -> RolloutAssignment | None:
    """The entry for pods without a rollout; those that stand in it go first, and there are no more
    than it has room for.
    """
    current = state.entry(UNASSIGNED)
    there = {pod.uid for pod in current.pods} if current else set()
    own = sorted(
        observed.owners.pods_on(state.name), key=lambda pod: (pod.uid not in there, pod.uid)
    )
    assigned = (_assigned(pod, state, observed) for pod in own if not pod.finished)
    # cut before sorting: those that stand in the entry keep their place
    pods = sorted(
        [found for found in assigned if found is not None][:MAX_PODS], key=lambda pod: pod.uid
    )
    if not pods:  # the entry goes, and with it what the node holds for it
        return None
    digests = dict.fromkeys((pod.namespace, pod.digest) for pod in pods if pod.digest)
    # With the route that it had: else, after an upgrade of the agents, every node would read the
    # source at once.
    found = {digest: held_versions.told(state, namespace, digest) for namespace, digest in digests}
    kept = {item.digest: item for item in current.stage} if current else {}
    # the API server refuses a longer list as a whole
    stage = [kept.get(digest, item) for digest, item in found.items() if item is not None][
        :MAX_STAGE
    ]
    return RolloutAssignment(uid=UNASSIGNED, stage=stage, pods=pods)


def _assigned(pod: Pod, state: NodeState, observed: Observed) -> PodAssignment | None:
    current = state.entry(UNASSIGNED)
    own = next((p for p in current.pods if p.uid == pod.uid), None) if current else None
    # its rollout takes it over; until then it stands here
    if observed.owners.owner(pod.uid) is not None:
        return (
            own if own is not None and not assignments.taken_over(state, own, UNASSIGNED) else None
        )
    known = state.assigned(pod.uid)
    digest = _kept_digest(pod, observed)
    # the same is no new order, and needs no look at tokens
    if known is not None and own == known and own.digest == digest:
        return own
    # without a rollout and a revision: what it gives up is held against none
    plain = PodAssignment(
        uid=pod.uid,
        name=pod.name,
        namespace=pod.namespace,
        digest=digest,
        version=_version_name(state, digest, known),
    )
    return fencing.next_token(state, pod.restarts, plain, UNASSIGNED)


def _kept_digest(pod: Pod, observed: Observed) -> str:
    """What a pod without a rollout goes on serving: what it was told, unless it gave that up; then
    what it serves.
    """
    target = observed.target(pod.uid)
    known, engine = target.assigned, target.engine
    # it was never told anything: what it serves becomes its order, once it is settled
    if known is None:
        return engine.digest if engine is not None and engine.phase in SETTLED_PHASES else ""
    # An engine that boots serves nothing yet: if it gave up what it is told, what its image brings
    # is left.
    given_up = target.gave_up_its_order or target.crashes >= failures.CRASHES
    if engine is not None and target.outstanding and given_up:
        return engine.digest
    return known.digest  # what it was told is what it serves, or will in a moment


def _version_name(state: NodeState, digest: str, known: PodAssignment | None) -> str:
    if digest and known is not None and known.digest == digest:
        return known.version
    return assignments.known_name(state, digest)


def _is_empty(entry: RolloutAssignment, state: NodeState, observed: Observed) -> bool:
    """Whether every pod of a deleted rollout's entry is gone or has found its place in another
    one.
    """
    for pod in entry.pods:
        known = observed.pods.get(pod.uid)
        here = known is not None and not known.finished and known.node == state.name
        if here and not assignments.taken_over(state, pod, entry.uid):
            return False
    return True
