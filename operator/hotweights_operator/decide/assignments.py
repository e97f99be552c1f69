"""A rollout's entry in each NodeWeights: what it should be, and the writes that make it so.

An entry lists every live pod of the rollout on that node. A pod that is terminating stays in it
until it is gone, and one that the rollout does not select any more stays until another entry has
taken it over: a pod that stands in no entry would not know what to serve. An entry without pods is
removed, and with it what the node holds for this rollout.

Of a thousand nodes one has changed: the others, found to be as they should be from the very same
values, are not looked at again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hotweights_crds.nodeweights import (
    MAX_PODS,
    MAX_STAGE,
    NodeWeightsSpec,
    PodAssignment,
    RolloutAssignment,
)
from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_operator.decide import activation, held_versions, revision
from hotweights_operator.decide.activation import ActivationPlan
from hotweights_operator.model import failures, fencing
from hotweights_operator.model.actions import Assign, Event, ObjectRef
from hotweights_operator.model.objects import NodeState, Rollout
from hotweights_operator.model.observed import Observed


def writes(
    rollout: Rollout,
    base: WeightRolloutStatus,
    plan: ActivationPlan,
    observed: Observed,
    *,
    stages: bool,
) -> list[Assign]:
    """The entries that differ from what they should be, each fenced by the resourceVersion that it
    was decided on. Unless ``stages``, nothing is staged that is not staged yet, but for what single
    pods need.
    """
    kept = revision.kept(base)
    held = [version.digest for version in kept]
    common = (rollout.spec, base.revision, tuple(kept), stages)
    # the epochs: a parent that went, and a WeightVersion that came, change routes on other nodes
    common = observed.intern(
        "entries", rollout.uid, (*common, observed.peers_epoch, observed.version_index.epoch)
    )
    pods: dict[str, list[PodAssignment]] = {}
    for node in _nodes(rollout, plan, observed):
        if node in plan.nodes or not _is_settled(rollout, node, plan, common, observed):
            pods[node] = _pods(rollout, base, observed.states[node], plan, observed)
    wanted = {
        node: _digests(observed.states[node].entry(rollout.uid), found, held, stages=stages)
        for node, found in pods.items()
        if found
    }
    items = held_versions.stage_items(rollout, base, wanted, observed)
    actions: list[Assign] = []
    for node, found in pods.items():
        state = observed.states[node]
        entry = (
            RolloutAssignment(
                uid=rollout.uid,
                namespace=rollout.namespace,
                name=rollout.name,
                stage=list(items[node]),
                pods=found,
            )
            if found
            else None
        )
        if not same(entry, state.entry(rollout.uid)):
            actions.append(
                Assign(node, state.resource_version, rollout.uid, entry, _events(found, plan))
            )
        elif (
            node in plan.node_plans
            and node not in plan.nodes
            and len(found) == len(plan.node_plans[node].digests)
        ):
            # (With a pod that is no target any more it never is: that one may have to go at any
            # time.)
            settled = (plan.node_plans.get(node), common)
            observed.remembered.setdefault(node, {})["entry", rollout.uid] = settled
    return actions


def same(left: RolloutAssignment | None, right: RolloutAssignment | None) -> bool:
    """Whether two entries say the same, in whatever order: both lists are maps to the API server
    (``x-kubernetes-list-type``), which may order them anew. None: there is no entry.
    """
    return _normal(left) == _normal(right)


def others(spec: NodeWeightsSpec, pod_uid: str, uid: str) -> list[PodAssignment]:
    """The pod's assignments in all entries but this one."""
    return [
        pod
        for entry in spec.rollouts
        if entry.uid != uid
        for pod in entry.pods
        if pod.uid == pod_uid
    ]


def taken_over(state: NodeState, pod: PodAssignment, uid: str) -> bool:
    """Whether another entry has given this pod a newer order than the entry ``uid``: only then may
    it go there, so that it always stands in one.
    """
    return any(other.token > pod.token for other in others(state.spec, pod.uid, uid))


def _is_settled(
    rollout: Rollout, node: str, plan: ActivationPlan, common: tuple[Any, ...], observed: Observed
) -> bool:
    """Whether the node's entry was found to be as it should be, from the very same values as
    now.
    """
    known = observed.remembered.get(node, {}).get(("entry", rollout.uid))
    return known is not None and known[0] is plan.node_plans.get(node) and known[1] is common


def _nodes(rollout: Rollout, plan: ActivationPlan, observed: Observed) -> list[str]:
    """Nodes with pods of the rollout, and nodes with an entry that is left over."""
    left = [node for node in observed.entered(rollout.uid) if node not in plan.node_plans]
    return [*(node for node in plan.node_plans if node in observed.states), *sorted(left)]


def _pods(
    rollout: Rollout,
    base: WeightRolloutStatus,
    state: NodeState,
    plan: ActivationPlan,
    observed: Observed,
) -> list[PodAssignment]:
    """The pods of one node's entry, at most as many as it has room for."""
    targets = observed.targets_on(rollout.uid, state.name)
    without_room, is_back = failures.without_room(rollout.uid, targets), revision.goes_back(base)
    found: list[PodAssignment] = []
    for target in targets:
        told = plan.told(target)
        # the API server refuses an entry with more pods as a whole
        if told is None or target.pod.uid in without_room:
            continue
        digest, prepare = told
        name = _version_name(rollout, base, state, digest, observed) if digest else ""
        # on the way back an end speaks against what the pod serves, not against what it prepares
        ended = 0 if is_back else failures.ends_preparing(target, rollout.uid, base.revision)
        plain = activation.assignment(target, digest, prepare, rollout, name, base, ended)
        given = fencing.next_token(
            state,
            target.pod.restarts,
            plain,
            rollout.uid,
            counts_anew=target.ran_long,
            asks_anew=target.is_doubted,
        )
        found.append(given)
    listed = {pod.uid for pod in found}
    entry = state.entry(rollout.uid)
    left = [pod for pod in entry.pods if pod.uid not in listed] if entry else []
    found += [pod for pod in left if _stays(rollout, state, pod, observed)]
    # cut before sorting: targets go before pods that are none any more
    return sorted(found[:MAX_PODS], key=lambda pod: pod.uid)


def _stays(rollout: Rollout, state: NodeState, pod: PodAssignment, observed: Observed) -> bool:
    """Whether a pod that is no target (any more) keeps its place."""
    known = observed.pods.get(pod.uid)
    # it is gone, has ended, or is on another node: nobody here asks what it serves
    if known is None or known.finished or known.node != state.name:
        return False
    owner = observed.owners.owner(pod.uid)
    return (owner is not None and owner.uid == rollout.uid) or not taken_over(
        state, pod, rollout.uid
    )


def _digests(
    entry: RolloutAssignment | None,
    pods: Sequence[PodAssignment],
    held: Sequence[str],
    *,
    stages: bool,
) -> list[str]:
    """What a node is to hold: what its pods need first, then the versions held everywhere; no more
    than it has room for.
    """
    # what is there stays under every hold: a pause throws away nothing that was fetched
    there = {item.digest for item in entry.stage} if entry else set()
    everywhere = [digest for digest in held if stages or digest in there]
    needed = [digest for pod in pods for digest in (pod.digest, pod.prepare) if digest]
    # the first two are the target and what is stable (`revision.kept`); what else is held gives way
    # to what pods serve
    return list(dict.fromkeys([*everywhere[:2], *needed, *everywhere[2:]]))[:MAX_STAGE]


def _version_name(
    rollout: Rollout, base: WeightRolloutStatus, state: NodeState, digest: str, observed: Observed
) -> str:
    """A version's name: as the rollout has it, as a WeightVersion of its namespace has it, or as
    the node has it.
    """
    own = (
        v.version
        for v in (base.target, base.stable, base.previous, *base.held)
        if v.digest == digest
    )
    version = observed.version_index.of_digest(rollout.namespace, digest)
    return next(own, "") or (version.spec.version if version else "") or known_name(state, digest)


def known_name(state: NodeState, digest: str) -> str:
    """A version's name as any entry of the node has it; empty: none names it."""
    if not digest:
        return ""
    names = (
        item.version
        for entry in state.spec.rollouts
        for item in entry.stage
        if item.digest == digest
    )
    return next(names, "")


def _events(pods: Sequence[PodAssignment], plan: ActivationPlan) -> tuple[Event, ...]:
    return tuple(
        Event(
            ObjectRef("Pod", pod.namespace, pod.name, pod.uid),
            "WeightsActivating",
            f"Told to serve version {pod.version or pod.digest} (token {pod.token})",
        )
        for pod in pods
        if pod.uid in plan.activated
    )


def _normal(entry: RolloutAssignment | None) -> object:
    if entry is None:
        return None
    stage = sorted(entry.stage, key=lambda item: item.digest)
    pods = sorted(entry.pods, key=lambda pod: pod.uid)
    return entry.model_copy(update={"stage": stage, "pods": pods})
