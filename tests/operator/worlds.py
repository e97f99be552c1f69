"""Small worlds for the tests of decisions: an old and a new version, nodes that hold both, pods
whose engines serve the old one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from hotweights_crds.base import digest_label
from hotweights_crds.conditions import find
from hotweights_crds.nodeweights import (
    UNASSIGNED,
    EngineStatus,
    GivenUp,
    NodeWeightsStatus,
    PodAssignment,
    RolloutAssignment,
    StagedVersion,
    StageItem,
)
from hotweights_crds.weightrollout import WeightRolloutSpec, WeightRolloutStatus
from hotweights_crds.weightversion import WeightVersionSpec, WeightVersionStatus
from hotweights_operator.decide.rollouts import decide
from hotweights_operator.model.actions import Assign, RolloutDecision
from hotweights_operator.model.objects import DIGEST_LABEL, Node, NodeState, Pod, Rollout, Version
from hotweights_operator.model.observed import Observed

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
OLD, NEW, OTHER = "sha256:old", "sha256:new", "sha256:other"
CONFIRMED = "2026-01-01T11:00:00Z"
REVISION = 2
Fields = dict[str, Any]

AT_NEW: Fields = {
    "revision": REVISION,
    "target": {"name": "new", "version": "new", "digest": NEW},
    "stable": {"name": "old", "version": "old", "digest": OLD},
    "previous": {"name": "old", "version": "old", "digest": OLD},
    "revisionStartedAt": "2026-01-01T11:58:00Z",
    "lastProgressAt": "2026-01-01T11:59:00Z",
}
"""The status of a rollout from the old version, which was complete, to the new one."""

DONE: Fields = {
    **AT_NEW,
    "stable": AT_NEW["target"],
    "history": [{"revision": 2, "version": "new", "outcome": "Complete"}],
}
"""The status of that rollout when it is complete."""

LENIENT: Fields = {"failurePolicy": {"maxFailed": 1}}
BACK: Fields = {
    "revision": 3,
    "target": {"name": "old", "version": "old", "digest": OLD},
    "stable": {"name": "old", "version": "old", "digest": OLD},
    "lastProgressAt": "2026-01-01T11:59:00Z",
}
"""The status of a rollback to the old version."""


def version(name: str, digest: str, namespace: str = "models") -> Version:
    """A WeightVersion; resolved if it has a digest."""
    spec = WeightVersionSpec.from_dict(
        {"model": "m", "version": name, "source": {"uri": f"file:///{name}"}}
    )
    ready = {"type": "Ready", "status": "True", "reason": "Resolved", "lastTransitionTime": "x"}
    status = WeightVersionStatus.from_dict(
        {"digest": digest, "conditions": [ready] if digest else []}
    )
    return Version(f"uid-{namespace}-{name}", name, namespace, 1, "1", spec, status)


def rollout(status: Fields | None = None, **spec: Any) -> Rollout:
    """A WeightRollout to the new version."""
    full = {
        "versionRef": {"name": "new"},
        "target": {"selector": {"matchLabels": {"app": "llm"}}},
        **spec,
    }
    known = WeightRolloutStatus.from_dict(status or {})
    return Rollout("r", "llm", "models", 3, "1", "2026", WeightRolloutSpec.from_dict(full), known)


def pod(number: int, node: str = "n0", shows: str = OLD, **more: Any) -> Pod:
    """A pod that has been Ready for long, and shows a version."""
    labels = {"app": "llm", DIGEST_LABEL: digest_label(shows)}
    long_ago = datetime(2026, 1, 1, 10, tzinfo=UTC)
    return replace(
        Pod(
            f"p{number}",
            f"p{number}",
            "models",
            node,
            labels,
            ready=True,
            was_ready=True,
            gate=True,
            engine_started_at=long_ago,
        ),
        **more,
    )


def engine(number: int, digest: str = OLD, **more: Any) -> EngineStatus:
    """An engine that serves a version."""
    fields = {
        "pod_uid": f"p{number}",
        "phase": "Serving",
        "digest": digest,
        "confirmed_at": CONFIRMED,
        "token": 1,
    }
    return EngineStatus(**{**fields, **more})


def gave_up(digest: str = NEW, revision: int = REVISION, token: int = 1, **more: Any) -> GivenUp:
    """What an engine says of a version that it failed to take."""
    fields = {
        "step": "Commit",
        "reason": "ProbeMismatch",
        "message": "the golden tokens differ",
        **more,
    }
    return GivenUp(digest=digest, revision=revision, token=token, **fields)


def prepared(count: int, digest: str = NEW, **more: Any) -> list[EngineStatus]:
    """Engines that have a version at hand."""
    return [engine(number, phase="Prepared", prepared=digest, **more) for number in range(count)]


def order(uid: str, digest: str, **more: Any) -> PodAssignment:
    """What a pod is told."""
    named = {"name": uid, "namespace": "models", "version": digest.removeprefix("sha256:")}
    fields = {**named, "token": 1, "rollout": "r", "revision": REVISION, "prepare": NEW, **more}
    return PodAssignment(uid=uid, digest=digest, **fields)


def state(
    node: str,
    engines: Sequence[EngineStatus] = (),
    told: Mapping[str, str | PodAssignment] | None = None,
    entry: str = "r",
    staged: Sequence[StagedVersion] | None = None,
    listed: Sequence[str] = (OLD, NEW),
) -> NodeState:
    """A node that holds both versions, with what its pods are told."""
    held = [StagedVersion(digest=d, phase="Staged", bytes_done=1, bytes_total=1) for d in listed]
    names = {d: d.removeprefix("sha256:") for d in listed}
    items = [
        StageItem(
            digest=d, namespace="models", model="m", version=names[d], uri=f"file:///{names[d]}"
        )
        for d in listed
    ]
    orders = [
        given if isinstance(given, PodAssignment) else order(uid, given)
        for uid, given in (told or {}).items()
    ]
    named = {} if entry == UNASSIGNED else {"namespace": "models", "name": "llm"}
    entries = [RolloutAssignment(uid=entry, **named, stage=items, pods=orders)] if told else []
    spec = NodeState("x").spec.model_copy(update={"rollouts": entries})
    status = NodeWeightsStatus(
        observed_generation=5,
        boot_id="b",
        endpoint=f"tcp://{node}:1",
        staged=list(staged if staged is not None else held),
        engines=list(engines),
    )
    return NodeState(node, 5, "50", spec, status)


def world(pods: Sequence[Pod], states: Sequence[NodeState], **more: Any) -> Observed:
    """All of it; seen as it is since an hour ago."""
    names = {p.node for p in pods if p.node} | {s.name for s in states}
    fields: Fields = {
        "rollouts": [rollout()],
        "versions": [version("old", OLD), version("new", NEW)],
        "nodes": {name: Node(name, f"uid-{name}") for name in names},
        "agents": dict.fromkeys(names, True),
        "states": {s.name: s for s in states},
        "pods": pods,
        "clock": lambda: datetime(2026, 1, 1, 11, tzinfo=UTC),
    }
    return Observed(**{**fields, **more})


def served(*engines: EngineStatus, **more: Any) -> Observed:
    """Pods that are told the new version and show it, with these engines."""
    pods = [pod(n, shows=NEW, **more) for n in range(len(engines))]
    return world(pods, [state("n0", engines, {f"p{n}": NEW for n in range(len(engines))})])


def entry_on(decision: RolloutDecision, node: str = "n0") -> RolloutAssignment | None:
    """What is written for a node. Raises `LookupError` when nothing is."""
    written = [
        action.entry
        for action in decision.actions
        if isinstance(action, Assign) and action.node == node
    ]
    if not written:
        raise LookupError(f"nothing is written to {node}")
    return written[0]


def staged_on(decision: RolloutDecision, node: str = "n0") -> list[str]:
    """Versions that the node is to hold."""
    entry = entry_on(decision, node)
    return [item.digest for item in entry.stage] if entry else []


def orders(decision: RolloutDecision) -> dict[str, PodAssignment]:
    """What the pods are told by all writes of a decision, by UID."""
    return {
        given.uid: given
        for action in decision.actions
        if isinstance(action, Assign) and action.entry
        for given in action.entry.pods
    }


def told(decision: RolloutDecision) -> dict[str, str]:
    """Pod → digest, over all writes."""
    return {uid: given.digest for uid, given in orders(decision).items()}


def told_to_change(decision: RolloutDecision, digest: str = NEW) -> set[str]:
    """Pods that are given another order than before, for this version."""
    return {
        uid for uid, given in orders(decision).items() if given.digest == digest and given.token > 1
    }


def asked_to_prepare(decision: RolloutDecision, digest: str = NEW) -> set[str]:
    """Pods that are to have it at hand."""
    return {uid for uid, given in orders(decision).items() if given.prepare == digest}


def status_after(known: Rollout, seen: Observed, now: datetime = NOW) -> WeightRolloutStatus:
    """The status that a step writes."""
    return status_of(decide(known, seen, now))


def after(known: Rollout, seen: Observed, now: datetime = NOW) -> Rollout:
    """The rollout when that status was written."""
    return replace(known, status=status_after(known, seen, now))


def reason_of(status: WeightRolloutStatus, type_: str) -> str:
    """Of a condition that is True; empty: it is not."""
    found = find(status.conditions, type_)
    return found.reason if found and found.status == "True" else ""


def status_of(decision: RolloutDecision) -> WeightRolloutStatus:
    """The status; every decision about a rollout has one."""
    if decision.status is None:
        raise LookupError("a decision without a status")
    return decision.status


def next_pass(known: Rollout, decision: RolloutDecision) -> Rollout:
    """The rollout when the status was written."""
    return replace(known, status=status_of(decision))


def looping(number: int, restarts: int, **more: Any) -> Pod:
    """A pod whose container ends soon after it starts."""
    return pod(
        number, ready=False, gate=False, shows="", restarts=restarts, last_run_seconds=5.0, **more
    )
