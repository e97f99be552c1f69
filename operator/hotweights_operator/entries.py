"""A rollout's entry in each NodeWeights: what it should be, and the writes that make it so.

An entry lists every live pod of the rollout on that node. A pod that is terminating stays in it until it is gone, and one that
the rollout does not select any more stays until another entry has taken it over: a pod that stands in no entry would not know
what to serve. An entry without pods is removed, and with it what the node holds for this rollout.

Of a thousand nodes one has changed: the others, found to be as they should be from the very same values, are not looked at again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hotweights_crds.nodeweights import MAX_PODS, MAX_STAGE, NodeWeightsSpec, PodAssignment, RolloutAssignment
from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_operator import activation, revision, staging, tokens
from hotweights_operator.actions import About, Assign, Event
from hotweights_operator.activation import Choice
from hotweights_operator.model import NodeState, Rollout
from hotweights_operator.observed import Observed
from hotweights_operator.targets import Target


class Settled(NamedTuple):
    """From what a node's entry was found to be as it should be. Compared by identity: the values are frozen."""

    state: NodeState
    targets: tuple[Target, ...]
    told: tuple[tuple[str | None, str | None], ...]
    common: tuple[Any, ...]

    def is_same(self, other: Settled) -> bool:
        """Whether the very same values are there again."""
        return (
            self.state is other.state
            and self.common is other.common
            and self.told == other.told
            and len(self.targets) == len(other.targets)
            and all(left is right for left, right in zip(self.targets, other.targets, strict=True))
        )


def writes(
    rollout: Rollout,
    base: WeightRolloutStatus,
    targets: Sequence[Target],
    choice: Choice,
    observed: Observed,
    *,
    stages: bool,
) -> list[Assign]:
    """The entries that differ from what they should be. Unless ``stages``, nothing is staged that is not staged yet, but for what
    single pods need."""
    here: dict[str, list[Target]] = {}
    for target in targets:
        if target.state is not None:
            here.setdefault(target.pod.node, []).append(target)
    common = _common(rollout, base, observed, stages=stages)
    facts = {
        node: _facts(observed, node, here.get(node, ()), choice, common) for node in _nodes(rollout, here, observed)
    }
    open_ = [node for node, now in facts.items() if not _is_settled(observed, rollout, node, now)]
    held = [version.digest for version in revision.kept(base)]
    pods = {node: _pods(rollout, base, observed.states[node], here.get(node, ()), choice, observed) for node in open_}
    wanted = {
        node: _digests(observed.states[node].entry(rollout.uid), found, held, stages=stages)
        for node, found in pods.items()
        if found
    }
    items = staging.stage_items(rollout, base, wanted, observed)
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
        if same(entry, state.entry(rollout.uid)):
            observed.settled[rollout.uid, node] = facts[node]
        else:
            actions.append(Assign(node, state.resource_version, rollout.uid, entry, _events(found, choice)))
    return actions


def without_room(rollout: Rollout, targets: Sequence[Target]) -> list[str]:
    """UIDs of pods that their node's entry has no room for."""
    if len(targets) <= MAX_PODS:
        return []
    count: dict[str, int] = {}
    found: list[str] = []
    for target in _first_those_listed(rollout, targets):
        count[target.pod.node] = count.get(target.pod.node, 0) + 1
        if target.pod.node and count[target.pod.node] > MAX_PODS:
            found.append(target.pod.uid)
    return found


def same(left: RolloutAssignment | None, right: RolloutAssignment | None) -> bool:
    """Whether two entries say the same, in whatever order."""
    return _normal(left) == _normal(right)


def others(spec: NodeWeightsSpec, pod_uid: str, uid: str) -> list[PodAssignment]:
    """The pod's assignments in all entries but this one."""
    return [pod for entry in spec.rollouts if entry.uid != uid for pod in entry.pods if pod.uid == pod_uid]


def taken_over(state: NodeState, pod: PodAssignment, uid: str) -> bool:
    """Whether another entry has given this pod a newer order than the entry ``uid``."""
    return any(other.token > pod.token for other in others(state.spec, pod.uid, uid))


def _common(rollout: Rollout, base: WeightRolloutStatus, observed: Observed, *, stages: bool) -> tuple[Any, ...]:
    """What all entries of the rollout depend on, as the very same tuple for as long as it is equal."""
    new = (
        rollout.spec,
        base.revision,
        tuple(revision.kept(base)),
        stages,
        observed.peers_epoch,
        observed.versions_epoch,
    )
    old = observed.commons.get(rollout.uid)
    if old != new:
        observed.commons[rollout.uid] = new
        return new
    return old


def _facts(
    observed: Observed, node: str, targets: Sequence[Target], choice: Choice, common: tuple[Any, ...]
) -> Settled:
    told = tuple((choice.digests.get(t.pod.uid), choice.prepares.get(t.pod.uid)) for t in targets)
    return Settled(observed.states[node], tuple(targets), told, common)


def _is_settled(observed: Observed, rollout: Rollout, node: str, now: Settled) -> bool:
    then = observed.settled.get((rollout.uid, node))
    if then is None or not then.is_same(now):
        return False
    # Pods that are no targets any more come and go unseen by the rest.
    return len(now.targets) == len((now.state.entry(rollout.uid) or RolloutAssignment(uid=rollout.uid)).pods)


def _nodes(rollout: Rollout, here: Mapping[str, Sequence[Target]], observed: Observed) -> list[str]:
    """Nodes with pods of the rollout, and nodes with an entry that is left over."""
    return sorted({*here, *observed.entered(rollout.uid)})


def _first_those_listed(rollout: Rollout, targets: Iterable[Target]) -> list[Target]:
    """Those that stand in the entry already keep their place."""

    def is_new(target: Target) -> bool:
        entry = target.state.entry(rollout.uid) if target.state else None
        return entry is None or all(pod.uid != target.pod.uid for pod in entry.pods)

    return sorted(targets, key=is_new)


def _pods(
    rollout: Rollout,
    base: WeightRolloutStatus,
    state: NodeState,
    targets: Sequence[Target],
    choice: Choice,
    observed: Observed,
) -> list[PodAssignment]:
    """The pods of one node's entry, at most as many as it has room for."""
    found: list[PodAssignment] = []
    for target in _first_those_listed(rollout, targets) if len(targets) > MAX_PODS else targets:
        uid = target.pod.uid
        if uid in choice.digests:
            digest = choice.digests[uid]
            name = _version_name(rollout, base, state, digest, observed) if digest else ""
            plain = activation.assignment(
                target, digest, choice.prepares.get(uid, ""), rollout.spec, name, base.revision
            )
            found.append(tokens.following(state, target.pod.restarts, plain, rollout.uid))
    listed = {pod.uid for pod in found}
    entry = state.entry(rollout.uid)
    left = [pod for pod in entry.pods if pod.uid not in listed] if entry else []
    found += [pod for pod in left if _stays(rollout, state, pod, observed)]
    return sorted(found[:MAX_PODS], key=lambda pod: pod.uid)


def _stays(rollout: Rollout, state: NodeState, pod: PodAssignment, observed: Observed) -> bool:
    """Whether a pod that is no target (any more) keeps its place."""
    known = observed.pods.get(pod.uid)
    if known is None or known.finished or known.node != state.name:
        return False
    owner = observed.owner(pod.uid)
    return (owner is not None and owner.uid == rollout.uid) or not taken_over(state, pod, rollout.uid)


def _digests(
    entry: RolloutAssignment | None, pods: Sequence[PodAssignment], held: Sequence[str], *, stages: bool
) -> list[str]:
    """What a node is to hold: what its pods need first, then the versions held everywhere; no more than it has room for."""
    there = {item.digest for item in entry.stage} if entry else set()
    everywhere = [digest for digest in held if stages or digest in there]
    needed = [digest for pod in pods for digest in (pod.digest, pod.prepare) if digest]
    return list(dict.fromkeys([*everywhere[:2], *needed, *everywhere[2:]]))[:MAX_STAGE]


def _version_name(
    rollout: Rollout, base: WeightRolloutStatus, state: NodeState, digest: str, observed: Observed
) -> str:
    """A version's name: as the rollout has it, as a WeightVersion of its namespace has it, or as the node has it."""
    own = (v.version for v in (base.target, base.stable, base.previous, *base.held) if v.digest == digest)
    version = observed.version_of_digest(rollout.namespace, digest)
    return next(own, "") or (version.spec.version if version else "") or known_name(state, digest)


def known_name(state: NodeState, digest: str) -> str:
    """A version's name as any entry of the node has it."""
    if not digest:
        return ""
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
