"""What a node's object needs besides the rollouts: that it exists, that every opted-in pod stands in it, and that nothing stays
in it for which there is no reason any more.

Pods that belong to no rollout are listed under ``unassigned``: a new one keeps what it boots, one whose rollout was deleted keeps
what it serves, and goes on doing so when it restarts. Everything is pruned by level: what is left over is found by looking, not
by having seen it go. So there are no finalizers.
"""

from __future__ import annotations

from hotweights_crds.nodeweights import UNASSIGNED, PodAssignment, RolloutAssignment
from hotweights_operator import entries, staging, tokens
from hotweights_operator.actions import Action, AskResolve, Assign, CreateNodeWeights, NodeDecision
from hotweights_operator.model import SETTLED_PHASES, NodeState, Observed, Pod
from hotweights_operator.targets import gather_one

_REFUSED = frozenset({"Refused", "Failed"})


def decide(name: str, observed: Observed) -> NodeDecision:
    """One step for one node."""
    node, state = observed.nodes.get(name), observed.states.get(name)
    if state is None:
        needed = name in observed.agents or any(pod.live for pod in observed.pods_by_node.get(name, ()))
        create = (CreateNodeWeights(name, node.uid),) if node is not None and needed else ()
        return NodeDecision(actions=create)
    wanted = _unassigned(state, observed)
    actions: list[Action] = []
    if not entries.same(wanted, entries.current(state, UNASSIGNED)):
        actions.append(Assign(name, state.resource_version, UNASSIGNED, wanted))
    known = {rollout.uid for rollout in observed.rollouts} | {UNASSIGNED}
    actions += [
        Assign(name, state.resource_version, entry.uid, None)
        for entry in state.spec.rollouts
        if entry.uid not in known and _is_empty(entry, state, observed)
    ]
    versions = {version.uid for version in observed.versions}
    actions += [
        AskResolve(name, state.resource_version, item.uid, None)
        for item in state.spec.resolve
        if item.uid not in versions
    ]
    return NodeDecision(actions=tuple(actions[:1]), again_in_seconds=0.0 if len(actions) > 1 else None)


def _unassigned(state: NodeState, observed: Observed) -> RolloutAssignment | None:
    """The entry for pods without a rollout."""
    pods = [
        assigned
        for pod in sorted(observed.pods_by_node.get(state.name, ()), key=lambda pod: pod.uid)
        if not pod.finished and (assigned := _assigned(pod, state, observed)) is not None
    ]
    if not pods:
        return None
    digests = dict.fromkeys((pod.namespace, pod.digest) for pod in pods if pod.digest)
    found = {digest: staging.remembered(namespace, digest, [state]) for namespace, digest in digests}
    current = entries.current(state, UNASSIGNED)
    kept = {item.digest: item for item in current.stage} if current else {}
    stage = [kept.get(digest, item) for digest, item in found.items() if item is not None]
    return RolloutAssignment(uid=UNASSIGNED, stage=stage, pods=pods)


def _assigned(pod: Pod, state: NodeState, observed: Observed) -> PodAssignment | None:
    current = entries.current(state, UNASSIGNED)
    own = next((p for p in current.pods if p.uid == pod.uid), None) if current else None
    if pod.uid in observed.claims:  # its rollout takes it over; until then it stands here
        return own if own is not None and not entries.taken_over(state, own, UNASSIGNED) else None
    known = state.assigned(pod.uid)
    digest = _kept_digest(pod, state, observed)
    plain = PodAssignment(
        uid=pod.uid,
        name=pod.name,
        namespace=pod.namespace,
        digest=digest,
        version=_version_name(state, digest, known),
    )
    if known is not None and own == known and own.digest == digest:
        return own
    return tokens.following(state, pod.uid, plain, UNASSIGNED)


def _kept_digest(pod: Pod, state: NodeState, observed: Observed) -> str:
    """What a pod without a rollout goes on serving."""
    target = gather_one(pod, observed)
    current = entries.current(state, UNASSIGNED)
    own = next((p for p in current.pods if p.uid == pod.uid), None) if current else None
    known, engine = target.assigned, target.engine
    if own is not None and own == known:
        return own.digest
    if known is None:
        return engine.digest if engine is not None and engine.phase in SETTLED_PHASES else ""
    if engine is not None and engine.phase in _REFUSED and target.answered:
        return engine.digest  # it did not do what it was told, and serves on
    return known.digest  # what it was told is what it serves, or will in a moment


def _version_name(state: NodeState, digest: str, known: PodAssignment | None) -> str:
    if not digest:
        return ""
    if known is not None and known.digest == digest:
        return known.version
    names = (item.version for entry in state.spec.rollouts for item in entry.stage if item.digest == digest)
    return next(names, "")


def _is_empty(entry: RolloutAssignment, state: NodeState, observed: Observed) -> bool:
    """Whether every pod of a deleted rollout's entry is gone or has found its place in another one."""
    for pod in entry.pods:
        known = observed.pods_by_uid.get(pod.uid)
        here = known is not None and not known.finished and known.node == state.name
        if here and not entries.taken_over(state, pod, entry.uid):
            return False
    return True
