"""A rollout as people and programs look at it: its steps, its nodes, its pods, and why each waits.

Two things are never mixed: that a pod *serves* a version is said only by its engine's own word
(`objects.confirmed`); a pod's label is what it *shows*. Where the NodeWeights may not be read, only
the latter is known, and the picture says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hotweights.kubectl.views.snapshot import Snapshot
from hotweights_common import timestamps
from hotweights_common.reasons import POD_IS_AWAY
from hotweights_crds.base import camel, digest_label
from hotweights_crds.conditions import find
from hotweights_crds.weightrollout import CanaryStep, Failure
from hotweights_operator.model import failures
from hotweights_operator.model.objects import (
    STILL_SERVING_PHASES,
    NodeState,
    Rollout,
    confirmed,
)
from hotweights_operator.model.observed import Observed
from hotweights_operator.model.targets import Target

VERSION_LABEL = "hotweights.dev/version"
StepState = Literal["Done", "Current", "Coming", "Skipped"]
PodState = Literal[
    "Updated",
    "Changing",
    "Prepared",
    "Preparing",
    "Booting",
    "Waiting",
    "Failed",
    "Dirty",
    "NotConnected",
    "NotScheduled",
    "NoAgent",
    "Unknown",
]


@dataclass(frozen=True, slots=True)
class PodPicture:
    """One pod. ``serves`` is the version by its engine's word, ``shows`` that of its label; empty:
    none, or what it booted.
    """

    name: str
    uid: str
    state: PodState
    serves: str
    shows: str
    ready: bool
    way: str  # how what it has prepared waits; empty: nothing is, or nobody says
    probe: str  # what proved that it serves it
    pause_seconds: float  # of its last commit; 0: none yet
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class NodePicture:
    """One node with pods of the rollout. ``name`` is empty for pods that have none yet."""

    name: str
    staged: Literal["Staged", "Fetching", "Waiting", "Failed", "Unknown"]
    bytes_done: int
    bytes_total: int
    reason: str
    message: str
    pods: tuple[PodPicture, ...]


@dataclass(frozen=True, slots=True)
class StepPicture:
    """One step of the canary."""

    text: str
    state: StepState
    waits_for: str  # of the current one: Promotion, Time, Pods, Analysis
    seconds: float  # of the current one: since when it is
    message: str  # of an analysis: how it stands


@dataclass(frozen=True, slots=True)
class RolloutPicture:
    """One rollout."""

    namespace: str
    name: str
    version: str  # that it rolls out, or serves
    stable: str  # what was complete last
    phase: str
    reason: str  # for programs: that of the condition Ready
    message: str
    revision: int
    seconds: float  # since the revision began; 0: none has
    current: bool  # the status answers the spec as it stands
    paused: bool  # by the spec or by a command
    rolled_back_from: str
    desired: int
    prepared: int
    updated: int
    available: int
    failed: int
    bytes_done: int
    bytes_total: int
    nodes_staged: int
    rollback: str
    steps: tuple[StepPicture, ...]
    nodes: tuple[NodePicture, ...]
    last_command: Mapping[str, Any]
    unanswered: str  # a command that nobody has answered yet

    def to_dict(self) -> dict[str, Any]:
        """As ``-o json`` prints it: names in camelCase."""
        found: dict[str, Any] = _camelled(asdict(self))
        return found


def pictures(snapshot: Snapshot, name: str = "") -> list[RolloutPicture]:
    """The rollout of this name, or all of them."""
    observed = snapshot.observed()
    return [
        picture(rollout, snapshot, observed)
        for rollout in snapshot.rollouts
        if name in ("", rollout.name)
    ]


def picture(rollout: Rollout, snapshot: Snapshot, observed: Observed) -> RolloutPicture:
    """One rollout, with all of its pods as far as they were read."""
    status = rollout.status
    ready = find(status.conditions, "Ready")
    command = status.last_command
    failed = {failure.pod_uid: failure for failure in status.failures}
    nodes = tuple(
        _node(name, rollout, snapshot, observed, failed) for name in observed.nodes_of(rollout.uid)
    )
    return RolloutPicture(
        namespace=rollout.namespace,
        name=rollout.name,
        version=status.target.version or rollout.spec.version_ref.name,
        stable=status.stable.version,
        phase=status.phase,
        reason=ready.reason if ready else "",
        message=status.message,
        revision=status.revision,
        seconds=_age_seconds(status.revision_started_at, snapshot),
        current=status.observed_generation >= rollout.generation,
        paused=rollout.spec.paused or bool(status.paused_by),
        rolled_back_from=status.rolled_back.from_,
        desired=status.pods.desired,
        prepared=status.pods.prepared,
        updated=status.pods.updated,
        available=status.pods.available,
        failed=status.pods.failed,
        bytes_done=status.nbytes.done,
        bytes_total=status.nbytes.total,
        nodes_staged=status.nodes.staged,
        rollback=status.rollback,
        steps=_steps(rollout, snapshot),
        nodes=nodes,
        last_command=command.to_dict() if command.text else {},
        unanswered=rollout.command if rollout.command != command.text else "",
    )


def step_text(step: CanaryStep) -> str:
    """A step in a few words; one of a newer release by the name of its field."""
    if step.set_replicas is not None:
        return f"setReplicas {step.set_replicas}"
    if step.pause is not None:
        seconds = step.pause.duration_seconds
        return f"pause {seconds} s" if seconds is not None else "pause until promoted"
    if step.analysis is not None:
        return f"analysis {step.analysis.template_name or ''}".rstrip()
    return "a step of a newer release"


def _steps(rollout: Rollout, snapshot: Snapshot) -> tuple[StepPicture, ...]:
    status, spec = rollout.status, rollout.spec.strategy.canary
    canary = status.canary
    found = []
    for index, step in enumerate(spec.steps if spec else ()):
        state: StepState = "Coming"
        if index < canary.step:
            state = "Skipped" if status.goes_back else "Done"
        elif index == canary.step and canary.steps:
            state = "Current"
        is_current = state == "Current"
        found.append(
            StepPicture(
                text=step_text(step),
                state=state,
                waits_for=canary.waits_for if is_current else "",
                seconds=_age_seconds(canary.step_started_at, snapshot) if is_current else 0.0,
                message=status.analysis.message if is_current and step.analysis else "",
            )
        )
    return tuple(found)


def _node(
    name: str,
    rollout: Rollout,
    snapshot: Snapshot,
    observed: Observed,
    failed: Mapping[str, Failure],
) -> NodePicture:
    digest = rollout.status.target.digest
    state = observed.states.get(name)
    staged = state.staged(digest) if state is not None and digest else None
    pods = tuple(
        _pod(target, rollout, failed, knows=snapshot.states is not None)
        for target in observed.targets_on(rollout.uid, name)
    )
    if staged is None:
        unknown = snapshot.states is None or not name
        return NodePicture(name, "Unknown" if unknown else "Waiting", 0, 0, "", "", pods)
    return NodePicture(
        name,
        staged.phase,
        min(staged.bytes_done, staged.bytes_total),
        staged.bytes_total,
        staged.reason,
        staged.message,
        pods,
    )


def _pod(
    target: Target, rollout: Rollout, failed: Mapping[str, Failure], *, knows: bool
) -> PodPicture:
    """One pod; ``knows``: NodeWeights may be read."""
    engine, pod = target.engine, target.pod
    state, reason, message = _state(target, rollout, failed, knows=knows)
    return PodPicture(
        name=pod.name,
        uid=pod.uid,
        state=state,
        serves=_version(target.state, _served(target)),
        shows=pod.labels.get(VERSION_LABEL, ""),
        ready=pod.ready,
        way=engine.way if engine else "",
        probe=engine.probe if engine and _served(target) else "",
        pause_seconds=engine.pause_seconds if engine else 0.0,
        reason=reason,
        message=message,
    )


def _state(
    target: Target, rollout: Rollout, failed: Mapping[str, Failure], *, knows: bool
) -> tuple[PodState, str, str]:
    """The state with reason and message; the operator's word for a failure goes first."""
    status, engine, pod = rollout.status, target.engine, target.pod
    digest = status.target.digest
    if target.serves(digest):
        return "Updated", "", ""
    failure = failed.get(pod.uid)
    if failure is not None and failure.reason not in POD_IS_AWAY:
        return "Failed", failure.reason, failure.message
    if not pod.node:
        return "NotScheduled", "NotScheduled", "no node has taken it yet"
    if not knows:
        shown = bool(digest) and pod.digest_label == digest_label(digest)
        return "Unknown", "", f"its label shows {status.target.version}" if shown else ""
    found = failures.of_version(
        target, digest, rollout.uid, status.revision, is_back=status.goes_back
    )
    if digest and found:
        return "Failed", found.reason, found.message
    if engine is None:
        said = failures.of_circumstance(target, None, has_room=True)
        return "NoAgent", said.reason if said else "", said.message if said else ""
    if engine.phase == "Disconnected":
        return "NotConnected", engine.reason, engine.message
    if engine.phase == "Dirty":
        return "Dirty", engine.reason, engine.message
    if target.booting:
        return "Booting", "", ""
    if engine.phase == "Committing" or (target.outstanding and target.told == digest):
        return "Changing", "", ""
    if target.prepared(digest):
        return "Prepared", "", ""
    return (
        ("Preparing" if engine.phase == "Preparing" else "Waiting"),
        engine.reason,
        engine.message,
    )


def _served(target: Target) -> str:
    """The digest that its engine has confirmed, though it may have refused the next one since."""
    engine = target.engine
    if engine is None:
        return ""
    moment = timestamps.parse(engine.confirmed_at)
    is_so = confirmed(target.pod, engine, engine.digest, moment, STILL_SERVING_PHASES)
    return engine.digest if is_so else ""


def _version(state: NodeState | None, digest: str) -> str:
    """A digest's name, as the node has it; else its first digits; empty: none."""
    if not digest or state is None:
        return ""
    staged = state.staged(digest)
    named = {engine.digest: engine.version for engine in state.status.engines}
    return (staged.version if staged else "") or named.get(digest, "") or digest_label(digest)


def _age_seconds(moment: str, snapshot: Snapshot) -> float:
    since = timestamps.parse(moment)
    return max(0.0, (snapshot.now - since).total_seconds()) if since else 0.0


def _camelled(value: Any) -> Any:
    """Dictionaries with the names that custom resources would have."""
    match value:
        case dict():
            return {camel(key): _camelled(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_camelled(inner) for inner in value]
        case _:
            return value
