"""What a rollout's status says: counts of what is proved, one sentence, and conditions with kstatus' meaning.

A pod counts as updated by one proof only (`model.confirmed`), and only while its node's agent speaks. The status is bounded
whatever the size of the fleet. The phase and the message are for people; programs read the conditions.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from hotweights_crds.conditions import is_true
from hotweights_crds.weightrollout import (
    MAX_FAILURES,
    ByteCounts,
    Counts,
    Failure,
    NodeCounts,
    Phase,
    WeightRolloutStatus,
)
from hotweights_operator import budget, conditions, revision, staging, times, transports
from hotweights_operator.failures import Failures
from hotweights_operator.model import Observed, Rollout, Version
from hotweights_operator.targets import Target

HoldKind = Literal[
    "", "TargetConflict", "NotFound", "VersionFailed", "Resolving", "Aborted", "TooManyFailures", "Paused", "NoTargets"
]

MISSING_REASONS = frozenset({"NotScheduled", "NodeNotReady", "AgentMissing", "EngineNotConnected"})


@dataclass(frozen=True, slots=True)
class Hold:
    """Why a rollout starts nothing; the empty kind: it acts."""

    kind: HoldKind
    message: str
    reason: str = ""

    @property
    def gives_up(self) -> bool:
        """Whether pods that failed are set back to what they serve."""
        return self.kind in ("Aborted", "TooManyFailures")

    @property
    def waits_for_version(self) -> bool:
        """Whether there is no version to roll out yet."""
        return self.kind in ("NotFound", "VersionFailed", "Resolving")


@dataclass(frozen=True, slots=True)
class View:
    """All that a pass has found out."""

    rollout: Rollout
    base: WeightRolloutStatus  # the old status at the right revision
    targets: tuple[Target, ...]
    failures: Failures
    hold: Hold
    version: Version | None
    observed: Observed


@dataclass(frozen=True, slots=True)
class Outcome:
    """The verdict of a pass."""

    phase: Phase
    reason: str
    message: str
    stalled: bool = False


def deadline_runs(hold: Hold) -> bool:
    """Whether lack of progress counts: not while somebody holds the rollout, nor when there is nothing to do."""
    return hold.kind in ("", "NotFound", "Resolving")


def describe(view: View, now: datetime) -> WeightRolloutStatus:
    """The whole status."""
    base = view.base
    counted = base.model_copy(update=_counts(view))
    is_complete = _is_complete(view, counted)
    if is_complete:
        counted = revision.completed(counted, now)
    if view.hold.kind == "Aborted":
        counted = counted.model_copy(update={"aborted_revision": counted.revision})
    if _progressed(view, counted, is_complete=is_complete):
        counted = counted.model_copy(update={"last_progress_at": times.show(now)})
    outcome = _outcome(view, counted, now, is_complete=is_complete)
    facts = conditions.Facts(
        outcome_phase=outcome.phase,
        reason=outcome.reason,
        message=outcome.message,
        is_complete=is_complete,
        is_stalled=outcome.stalled,
        paused_reason=_paused_reason(view, is_complete=is_complete),
        version_reason="" if not view.hold.waits_for_version else view.hold.reason or view.hold.kind,
        version_message=view.hold.message if view.hold.waits_for_version else f"digest {base.target.digest}",
        targets_reason="TargetConflict" if view.hold.kind == "TargetConflict" else "" if view.targets else "NoTargets",
        targets_message=view.hold.message or outcome.message
        if view.hold.kind == "TargetConflict" or not view.targets
        else f"{len(view.targets)} pods on {counted.nodes.desired} nodes",
        is_staged=counted.nodes.desired > 0 and counted.nodes.staged == counted.nodes.desired,
        staged_text=counted.nodes.summary,
        transport_text=_transport(view),
        is_available=_is_available(view, counted),
        available_text=f"{counted.pods.available} of {counted.pods.desired} pods are Ready",
    )
    return counted.model_copy(
        update={
            "observed_generation": view.rollout.generation,
            "phase": outcome.phase,
            "message": outcome.message[:1024],
            "conditions": conditions.build(view.rollout, facts, now),
        }
    )


def _transport(view: View) -> str:
    nodes = sorted({target.pod.node for target in view.targets} & set(view.observed.states))
    text = transports.describe(
        view.rollout.spec.staging.transport,
        [view.observed.states[node] for node in nodes if view.observed.follows(node)],
    )
    return f" ({text})" if text else ""


def _counts(view: View) -> dict[str, object]:
    digest = view.base.target.digest
    targets = view.targets
    updated = [t for t in targets if t.serves(digest)]
    nodes = sorted({t.pod.node for t in targets if t.pod.node})
    staged = staging.holding(nodes, digest, view.observed) if digest else []
    named = _failures(view)
    failed = sum(1 for failure in named if failure.reason not in MISSING_REASONS)
    nbytes = _bytes(view, nodes, digest)
    percent = 100 * nbytes.done // nbytes.total if nbytes.total else 0
    previous = view.base.previous
    local = bool(nodes) and bool(previous.digest) and staging.is_local(nodes, previous, view.observed)
    return {
        "pods": Counts(
            desired=len(targets),
            prepared=sum(1 for t in targets if t.serves(digest) or (digest and t.prepared(digest))),
            updated=len(updated),
            ready=sum(1 for t in updated if t.pod.ready),
            available=sum(1 for t in targets if t.pod.ready and not t.unavailable),
            failed=failed,
        ),
        "nodes": NodeCounts(desired=len(nodes), staged=len(staged), summary=f"{len(staged)}/{len(nodes)}"),
        "nbytes": nbytes,
        "progress": f"{len(updated)}/{len(targets)}",
        "staged_percent": f"{percent}%" if nbytes.total else "",
        "rollback": "" if not previous.digest else "Local" if local else "NotLocal",
        "failures": named[:MAX_FAILURES],
        "failures_total": len(named),
    }


def _failures(view: View) -> list[Failure]:
    """What keeps pods back now, and, while the rollout was given up for it, what kept them back then."""
    now = view.failures.all
    if not view.hold.gives_up or view.base.revision != view.rollout.status.revision:
        return now
    named = {failure.pod for failure in view.failures.failed.values()}
    waiting = {t.pod.name for t in view.targets if not t.serves(view.base.target.digest)}
    then = [
        failure
        for failure in view.rollout.status.failures
        if failure.reason not in MISSING_REASONS and failure.pod in waiting - named
    ]
    return [*view.failures.failed.values(), *then, *view.failures.missing.values()]


def _bytes(view: View, nodes: list[str], digest: str) -> ByteCounts:
    each = view.version.status.nbytes if view.version else 0
    total = done = 0
    for node in nodes:
        state = view.observed.states.get(node)
        staged = state.staged(digest) if state and view.observed.follows(node) else None
        total += max(each, staged.bytes_total if staged else 0)
        done += staged.bytes_done if staged else 0
    return ByteCounts(total=total, done=min(done, total))


def _is_complete(view: View, status: WeightRolloutStatus) -> bool:
    pods = status.pods
    held = view.hold.waits_for_version or view.hold.kind in ("Aborted", "TargetConflict")
    return not held and pods.desired > 0 and pods.updated == pods.desired and pods.ready == pods.desired


def _is_available(view: View, status: WeightRolloutStatus) -> bool:
    pods = status.pods
    return pods.desired > 0 and pods.available >= pods.desired - budget.limit(view.rollout.spec.strategy, pods.desired)


def _progressed(view: View, status: WeightRolloutStatus, *, is_complete: bool) -> bool:
    """Whether something moved since the last status, or the deadline's clock has to start anew."""
    old = view.rollout.status
    if not old.last_progress_at or old.revision != status.revision:
        return True
    was_held = is_true(old.conditions, "Paused") and view.hold.kind not in ("Paused", "TooManyFailures")
    was_complete = is_true(old.conditions, "Ready") and not is_complete
    was_waiting = not is_true(old.conditions, "VersionResolved") and not view.hold.waits_for_version
    wants_other = view.hold.waits_for_version and is_true(old.conditions, "VersionResolved")
    return (
        was_held
        or was_complete
        or was_waiting
        or wants_other
        or status.pods.desired > old.pods.desired
        or status.pods.updated > old.pods.updated
        or status.pods.ready > old.pods.ready
        or status.pods.prepared > old.pods.prepared
        or status.nodes.staged > old.nodes.staged
        or status.nbytes.done > old.nbytes.done
    )


def _outcome(view: View, status: WeightRolloutStatus, now: datetime, *, is_complete: bool) -> Outcome:
    hold, first = view.hold, next(iter(status.failures), None)
    version = status.target.version
    counts = f"{status.pods.updated} of {status.pods.desired} pods serve {version}"
    match hold.kind:
        case "TargetConflict":
            return Outcome("Stalled", hold.kind, hold.message, stalled=True)
        case "VersionFailed":
            return Outcome("Stalled", hold.reason, hold.message, stalled=True)
        case "NoTargets":
            return Outcome(
                "Pending",
                "NoTargets",
                "no pod of this namespace carries the selected labels and hotweights.dev/inject=true",
            )
        case "Aborted":
            return Outcome(
                "Aborted", _why(first), f"given up: {counts}, every pod keeps what it serves{_tell(first)}", True
            )
        case _ if is_complete:
            return Outcome("Complete", "Complete", f"all {status.pods.desired} pods serve {version}")
        case "TooManyFailures":
            message = f"{counts}; nothing further is activated until the spec changes{_tell(first)}"
            return Outcome("Stalled", _why(first), message, stalled=True)
        case "Paused":
            return Outcome("Paused", "Paused", f"paused by spec.paused; {counts}")
        case _:
            return _working(view, status, now, counts)


def _working(view: View, status: WeightRolloutStatus, now: datetime, counts: str) -> Outcome:
    first = next(iter(status.failures), None)
    if view.hold.waits_for_version:
        doing = Outcome("Pending" if view.hold.kind == "NotFound" else "Resolving", view.hold.kind, view.hold.message)
    elif status.nodes.staged < status.nodes.desired and status.pods.updated < status.pods.desired:
        text = f"{status.nodes.summary} nodes hold {status.target.version}"
        doing = Outcome("Staging", "Staging", f"{text} ({status.staged_percent or '0%'} of the bytes){_tell(first)}")
    elif status.pods.prepared < status.pods.desired:
        text = f"{status.pods.prepared} of {status.pods.desired} pods have prepared {status.target.version}"
        doing = Outcome("Activating", "Preparing", text + _tell(first))
    else:
        doing = Outcome("Activating", "Activating", f"{counts}, {status.pods.ready} of them are Ready{_tell(first)}")
    if _only_failed_remain(view):
        return Outcome("Stalled", _why(first), f"{counts}; the others failed{_tell(first)}", stalled=True)
    since = times.parse(status.last_progress_at)
    seconds = view.rollout.spec.progress_deadline_seconds
    if since is not None and deadline_runs(view.hold) and now >= since + timedelta(seconds=seconds):
        message = f"no progress for {seconds} s: {doing.message}"
        return Outcome("Stalled", "ProgressDeadlineExceeded", message, stalled=True)
    return doing


def _only_failed_remain(view: View) -> bool:
    """Whether every pod either serves the version or failed to."""
    digest = view.base.target.digest
    open_ = [t for t in view.targets if not t.serves(digest)]
    return bool(open_) and all(t.pod.uid in view.failures.failed for t in open_)


def _why(failure: Failure | None) -> str:
    return failure.reason if failure else "TooManyFailures"


def _tell(failure: Failure | None) -> str:
    if failure is None:
        return ""
    return f"; {failure.pod} on {failure.node or 'no node'}: {failure.reason}: {failure.message}"


def _paused_reason(view: View, *, is_complete: bool) -> str:
    if view.hold.kind == "TooManyFailures" and not is_complete:
        return "TooManyFailures"
    return "Requested" if view.rollout.spec.paused else ""
