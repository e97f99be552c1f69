"""A rollout's entry in each NodeWeights: what it should be, and the writes that make it so.

An entry lists every live pod of the rollout on that node. A pod that is terminating stays in it until it is gone, and one that
the rollout does not select any more stays until another entry has taken it over: a pod that stands in no entry would not know
what to serve. An entry without pods is removed, and with it what the node holds for this rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hotweights_crds.nodeweights import NodeWeightsSpec, PodAssignment, RolloutAssignment
from hotweights_crds.weightrollout import VersionStatus
from hotweights_operator import activation, staging, tokens
from hotweights_operator.actions import About, Assign, Event
from hotweights_operator.activation import Choice
from hotweights_operator.model import NodeState, Observed, Rollout
from hotweights_operator.targets import Target


def writes(
    rollout: Rollout,
    targets: Sequence[Target],
    choice: Choice,
    held: Sequence[VersionStatus],
    observed: Observed,
    *,
    stages: bool,
) -> list[Assign]:
    """The entries that differ from what they should be. ``held`` is held on every node, unless nothing new is staged now."""
    here: dict[str, list[Target]] = {}
    for target in targets:
        here.setdefault(target.pod.node, []).append(target)
    names = _version_names(rollout, observed)
    pods = {
        node: _pods(rollout, observed.states[node], here.get(node, ()), choice, names, observed)
        for node in _nodes(rollout, targets, observed)
    }
    occupied = {node: found for node, found in pods.items() if found}
    wanted = {
        node: _digests(current(observed.states[node], rollout.uid), found, held, stages=stages)
        for node, found in occupied.items()
    }
    items = staging.stage_items(rollout, wanted, observed)
    actions: list[Assign] = []
    for node, found in pods.items():
        state = observed.states[node]
        entry = (
            RolloutAssignment(
                uid=rollout.uid, namespace=rollout.namespace, name=rollout.name, stage=list(items[node]), pods=found
            )
            if found
            else None
        )
        if not same(entry, current(state, rollout.uid)):
            events = _events(found, choice)
            actions.append(Assign(node, state.resource_version, rollout.uid, entry, events))
    return actions


def current(state: NodeState, uid: str) -> RolloutAssignment | None:
    """The entry as it stands."""
    return next((entry for entry in state.spec.rollouts if entry.uid == uid), None)


def same(left: RolloutAssignment | None, right: RolloutAssignment | None) -> bool:
    """Whether two entries say the same, in whatever order."""
    return _normal(left) == _normal(right)


def others(spec: NodeWeightsSpec, pod_uid: str, uid: str) -> list[PodAssignment]:
    """The pod's assignments in all entries but this one."""
    return [pod for entry in spec.rollouts if entry.uid != uid for pod in entry.pods if pod.uid == pod_uid]


def taken_over(state: NodeState, pod: PodAssignment, uid: str) -> bool:
    """Whether another entry has given this pod a newer order than the entry ``uid``."""
    return any(other.token > pod.token for other in others(state.spec, pod.uid, uid))


def _nodes(rollout: Rollout, targets: Sequence[Target], observed: Observed) -> list[str]:
    """Nodes with pods of the rollout, and nodes with an entry that is left over."""
    own = {target.pod.node for target in targets if target.state is not None}
    left = {name for name, state in observed.states.items() if current(state, rollout.uid) is not None}
    return sorted(own | left)


def _pods(
    rollout: Rollout,
    state: NodeState,
    targets: Sequence[Target],
    choice: Choice,
    names: Mapping[str, str],
    observed: Observed,
) -> list[PodAssignment]:
    """The pods of one node's entry."""
    found: list[PodAssignment] = []
    for target in targets:
        uid = target.pod.uid
        if uid in choice.digests:
            digest = choice.digests[uid]
            name = names.get(digest, "") or _known_name(state, digest)
            plain = activation.assignment(target, digest, choice.prepares.get(uid, ""), rollout.spec, name)
            found.append(tokens.following(state, uid, plain, rollout.uid))
    listed = {pod.uid for pod in found}
    entry = current(state, rollout.uid)
    left = [pod for pod in entry.pods if pod.uid not in listed] if entry else []
    found += [pod for pod in left if _stays(rollout, state, pod, observed)]
    return sorted(found, key=lambda pod: pod.uid)


def _stays(rollout: Rollout, state: NodeState, pod: PodAssignment, observed: Observed) -> bool:
    """Whether a pod that is no target (any more) keeps its place."""
    known = observed.pods_by_uid.get(pod.uid)
    if known is None or known.finished or known.node != state.name:
        return False
    owner = observed.claims.get(pod.uid)
    return (owner is not None and owner.uid == rollout.uid) or not taken_over(state, pod, rollout.uid)


def _digests(
    entry: RolloutAssignment | None, pods: Sequence[PodAssignment], held: Sequence[VersionStatus], *, stages: bool
) -> list[str]:
    """What a node is to hold: what its pods need, and the versions held everywhere."""
    there = {item.digest for item in entry.stage} if entry else set()
    everywhere = [v.digest for v in held if v.digest and (stages or v.digest in there)]
    needed = [digest for pod in pods for digest in (pod.digest, pod.prepare) if digest]
    return list(dict.fromkeys([*everywhere, *needed]))


def _version_names(rollout: Rollout, observed: Observed) -> Mapping[str, str]:
    status = rollout.status
    known = {v.digest: v.version for v in (status.previous, status.target) if v.digest}
    present = {
        v.status.digest: v.spec.version
        for v in observed.versions
        if v.namespace == rollout.namespace and v.status.digest and v.status.digest not in known
    }
    return {**present, **known}


def _known_name(state: NodeState, digest: str) -> str:
    """A version's name as any entry of the node has it."""
    names = (item.version for entry in state.spec.rollouts for item in entry.stage if item.digest == digest)
    return next(names, "")


def _events(pods: Sequence[PodAssignment], choice: Choice) -> tuple[Event, ...]:
    return tuple(
        Event(
            About("Pod", pod.namespace, pod.name, pod.uid),
            "WeightsActivating",
            f"Told to serve version {pod.version or pod.digest} (token {pod.token})",
        )
        for pod in pods
        if pod.uid in choice.activated
    )


def _normal(entry: RolloutAssignment | None) -> object:
    if entry is None:
        return None
    stage = sorted(entry.stage, key=lambda item: item.digest)
    pods = sorted(entry.pods, key=lambda pod: pod.uid)
    return entry.model_copy(update={"stage": stage, "pods": pods})
