"""What a rollout's status says: counts of what is proved, one sentence, and conditions with kstatus' meaning.

A pod counts as updated by one proof only (`objects.confirmed`), and only while its node's agent speaks. The status is bounded
whatever the size of the fleet. The phase and the message are for people; programs read the conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from hotweights_common import timestamps
from hotweights_crds.conditions import is_true
from hotweights_crds.weightrollout import (
    MAX_FAILURES,
    ByteCounts,
    Counts,
    Failure,
    HighWater,
    NodeCounts,
    Phase,
    WeightRolloutStatus,
)
from hotweights_operator.decide import conditions, disruption_budget, revision, transports
from hotweights_operator.decide.blocked import Hold
from hotweights_operator.model.failures import MISSING_REASONS, Failures
from hotweights_operator.model.objects import Rollout, Version
from hotweights_operator.model.observed import Observed
from hotweights_operator.model.shares import Question, Share

_FAR = datetime(9999, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class View:
    """All that a pass has found out."""

    rollout: Rollout
    base: WeightRolloutStatus  # the old status at the right revision
    question: Question
    shares: tuple[Share, ...]
    failures: Failures
    hold: Hold
    version: Version | None
    observed: Observed
    restarted: int = 0  # pods that are not asked to prepare yet, because their containers ended soon after they started
    started_at: datetime | None = None  # since when this process decides


@dataclass(frozen=True, slots=True)
class Outcome:
    """The verdict of a pass."""

    phase: Phase
    reason: str
    message: str
    stalled: bool = False


def deadline_in_seconds(view: View, status: WeightRolloutStatus, now: datetime) -> float | None:
    """When the progress deadline passes, if it runs."""
    if is_true(status.conditions, "Ready") or not view.hold.rule.deadline_runs:
        return None
    left = _deadline(view, status, now) - now
    return left.total_seconds() + 1.0 if left > timedelta(0) else None


def settles_in_seconds(view: View, status: WeightRolloutStatus, now: datetime) -> float | None:
    """When the next pod that serves the version will have been of service for long enough to count."""
    if status.pods.ready == status.pods.updated:
        return None
    seconds = view.question.min_ready_seconds
    waits = (t.wait_seconds(seconds, now) for share in view.shares if now < share.settles_at for t in share.available)
    return min((wait for wait in waits if wait > 0), default=None)


def is_progress(old: WeightRolloutStatus, new: WeightRolloutStatus) -> bool:
    """Whether two statuses differ only in how many bytes were staged, and in the sentences that say so: nothing is lost if that is
    written a little later."""
    return _without_bytes(old) == _without_bytes(new)


def _without_bytes(status: WeightRolloutStatus) -> WeightRolloutStatus:
    high = status.high_water.model_copy(update={"nbytes": 0})
    conditions_ = [condition.model_copy(update={"message": ""}) for condition in status.conditions]
    update = {"nbytes": ByteCounts(), "staged_percent": "", "message": "", "last_progress_at": "", "high_water": high}
    return status.model_copy(update={**update, "conditions": conditions_})


def _deadline(view: View, status: WeightRolloutStatus, now: datetime) -> datetime:
    """When the progress deadline passes. ``last_progress_at`` may be another process's word, by another clock: it counts from when
    this one began to decide at the earliest, and from now at the latest."""
    since = min(timestamps.parse(status.last_progress_at) or now, now)
    if view.started_at is not None:
        since = max(since, view.started_at)
    return since + timedelta(seconds=view.rollout.spec.progress_deadline_seconds)


def describe(view: View, now: datetime) -> WeightRolloutStatus:
    """The whole status."""
    base = view.base
    counted = base.model_copy(update=_counts(view, now))
    counted = counted.model_copy(update={"high_water": _high_water(base, counted)})
    is_complete = _is_complete(view, counted)
    if is_complete:
        counted = revision.completed(counted, now)
    if view.hold.kind == "Aborted":
        counted = counted.model_copy(update={"aborted_revision": counted.revision})
    if _progressed(view, counted, is_complete=is_complete):
        counted = counted.model_copy(update={"last_progress_at": timestamps.show(now)})
    outcome = _outcome(view, counted, now, is_complete=is_complete)
    facts = conditions.Facts(
        outcome_phase=outcome.phase,
        reason=outcome.reason,
        message=outcome.message,
        is_complete=is_complete,
        is_stalled=outcome.stalled,
        paused_reason=_paused_reason(view, is_complete=is_complete),
        version_reason=(view.hold.reason or view.hold.kind) if view.hold.rule.waits_for_version else "",
        version_message=view.hold.message if view.hold.rule.waits_for_version else f"digest {base.target.digest}",
        targets_reason="TargetConflict" if view.hold.kind == "TargetConflict" else "" if view.shares else "NoTargets",
        targets_message=view.hold.message or outcome.message
        if view.hold.kind == "TargetConflict" or not view.shares
        else f"{counted.pods.desired} pods on {counted.nodes.desired} nodes",
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
    """What came of the choice of a transport; it changes only when the nodes, or what they serve, do."""
    asked, seen = view.rollout.spec.staging.transport, view.observed
    facts = (asked, seen.peers_epoch, tuple(share.node for share in view.shares))
    known: tuple[object, str] | None = seen.interned.get(("transport", view.rollout.uid))
    if known is None or known[0] != facts:
        states = [seen.states[share.node] for share in view.shares if seen.follows(share.node)]
        known = (facts, transports.describe(asked, states))
        seen.interned["transport", view.rollout.uid] = known
    return f" ({known[1]})" if known[1] else ""


def _counts(view: View, now: datetime) -> dict[str, object]:
    shares, previous = view.shares, view.base.previous
    # What was complete stays so though this process has not watched its pods for long enough yet.
    moment = _FAR if revision.is_completed(view.base) else now
    desired = sum(len(share.targets) for share in shares)
    updated = sum(share.updated for share in shares)
    nodes = [share for share in shares if share.node]
    holding = sum(share.holds for share in nodes)
    nbytes = _bytes(view, nodes)
    percent = 100 * nbytes.done // nbytes.total if nbytes.total else 0
    local = bool(nodes) and bool(previous.digest) and all(share.holds_previous for share in nodes)
    named = _named(view)
    return {
        "pods": Counts(
            desired=desired,
            prepared=sum(share.prepared for share in shares),
            updated=updated,
            ready=sum(share.ready(view.question, moment) for share in shares if share.updated),
            available=sum(len(share.available) for share in shares),
            failed=len(view.failures.failed),
        ),
        "nodes": NodeCounts(desired=len(nodes), staged=holding, summary=f"{holding}/{len(nodes)}"),
        "nbytes": nbytes,
        "progress": f"{updated}/{desired}",
        "staged_percent": f"{percent}%" if nbytes.total else "",
        "rollback": "" if not previous.digest else "Local" if local else "NotLocal",
        "failures": named[:MAX_FAILURES],
        "failures_total": len(named),
    }


def _named(view: View) -> list[Failure]:
    """What keeps pods back; and for as long as the version is given up, why it was, though nothing of it can be seen any more."""
    found = view.failures
    if found.failed or not view.hold.rule.gives_up:
        return found.all
    then = [failure for failure in view.base.failures if failure.reason not in MISSING_REASONS]
    return [*then, *found.missing.values()]


def _high_water(base: WeightRolloutStatus, now: WeightRolloutStatus) -> HighWater:
    old = base.high_water
    return HighWater(
        desired=max(old.desired, now.pods.desired),
        nodes=max(old.nodes, now.nodes.staged),
        nbytes=max(old.nbytes, now.nbytes.done),
        prepared=max(old.prepared, now.pods.prepared),
        updated=max(old.updated, now.pods.updated),
        ready=max(old.ready, now.pods.ready),
    )


def _bytes(view: View, nodes: Sequence[Share]) -> ByteCounts:
    each = view.version.status.nbytes if view.version else 0
    total = sum(max(each, share.bytes_total) for share in nodes)
    return ByteCounts(total=total, done=min(sum(share.bytes_done for share in nodes), total))


def _is_complete(view: View, status: WeightRolloutStatus) -> bool:
    pods = status.pods
    return (
        view.hold.rule.may_be_complete
        and pods.desired > 0
        and pods.updated == pods.desired
        and pods.ready == pods.desired
    )


def _is_available(view: View, status: WeightRolloutStatus) -> bool:
    pods = status.pods
    return pods.desired > 0 and pods.available >= pods.desired - disruption_budget.limit(
        view.rollout.spec.strategy, pods.desired
    )


def _progressed(view: View, status: WeightRolloutStatus, *, is_complete: bool) -> bool:
    """Whether something moved since the last status, or the deadline's clock has to start anew."""
    old = view.rollout.status
    if not old.last_progress_at or old.revision != status.revision:
        return True
    was_held = is_true(old.conditions, "Paused") and view.hold.kind not in ("Paused", "TooManyFailures")
    was_complete = is_true(old.conditions, "Ready") and not is_complete
    waits, waited = view.hold.rule.waits_for_version, not is_true(old.conditions, "VersionResolved")
    return was_held or was_complete or waits != waited or status.high_water != old.high_water


def _outcome(view: View, status: WeightRolloutStatus, now: datetime, *, is_complete: bool) -> Outcome:
    hold, first = view.hold, next(iter(status.failures), None)
    version = status.target.version
    counts = f"{status.pods.updated} of {status.pods.desired} pods serve {version}"
    match hold.kind:
        case "Terminating":
            return Outcome("Pending", hold.kind, hold.message)
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
            message = f"{counts}; nothing further is activated: {_RESUME}{_tell(first)}"
            return Outcome("Stalled", _why(first), message, stalled=True)
        case "Paused":
            return Outcome("Paused", "Paused", f"paused by spec.paused; {counts}")
        case _:
            return _working(view, status, now, counts)


def _working(view: View, status: WeightRolloutStatus, now: datetime, counts: str) -> Outcome:
    first = next(iter(status.failures), None)
    if view.hold.rule.waits_for_version:
        doing = Outcome("Pending" if view.hold.kind == "NotFound" else "Resolving", view.hold.kind, view.hold.message)
    elif status.nodes.staged < status.nodes.desired and status.pods.updated < status.pods.desired:
        text = f"{status.nodes.summary} nodes hold {status.target.version}"
        doing = Outcome("Staging", "Staging", f"{text} ({status.staged_percent or '0%'} of the bytes){_tell(first)}")
    elif status.pods.prepared < status.pods.desired:
        text = f"{status.pods.prepared} of {status.pods.desired} pods have prepared {status.target.version}"
        if view.restarted:
            text += f"; {view.restarted} restarted soon after they had started and are asked when they have been Ready for a minute"
        doing = Outcome("Activating", "Preparing", text + _tell(first))
    else:
        doing = Outcome("Activating", "Activating", f"{counts}, {status.pods.ready} of them are Ready{_tell(first)}")
    if _only_failed_remain(view):
        return Outcome("Stalled", _why(first), f"{counts}; the others failed{_tell(first)}", stalled=True)
    seconds = view.rollout.spec.progress_deadline_seconds
    if view.hold.rule.deadline_runs and now >= _deadline(view, status, now):
        message = f"no progress for {seconds} s: {doing.message}"
        return Outcome("Stalled", "ProgressDeadlineExceeded", message, stalled=True)
    return doing


def _only_failed_remain(view: View) -> bool:
    """Whether every pod either serves the version or failed to."""
    rest = sum(len(share.targets) - share.updated for share in view.shares)
    return rest > 0 and rest == len(view.failures.failed)


_RESUME = (
    "change the version, or raise failurePolicy.maxFailed, or set the annotation hotweights.dev/retry to a new value"
)


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
