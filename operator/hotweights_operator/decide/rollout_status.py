"""What a rollout's status says: counts of what is proved, one sentence, and conditions with
kstatus' meaning.

A pod counts as updated by one proof only (`objects.confirmed`), and only while its node's agent
speaks. The status is bounded whatever the size of the fleet. The phase and the message are for
people; programs read the conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from hotweights_common import timestamps
from hotweights_common.reasons import POD_IS_AWAY, Reason
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
from hotweights_operator.decide import (
    conditions,
    disruption_budget,
    progress_deadline,
    revision,
    transports,
)
from hotweights_operator.decide.context import PassContext
from hotweights_operator.model.node_totals import NodeTotals

# later than any pod settles, so that minReadySeconds is not asked for
_FAR = datetime(9999, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a pass says of the rollout: a phase and a message for people, a reason for programs."""

    phase: Phase
    reason: str
    message: str
    stalled: bool = False


def settles_in_seconds(
    context: PassContext, status: WeightRolloutStatus, now: datetime
) -> float | None:
    """In how many seconds the next pod that serves the version will have been of service for long
    enough to count; None: none is waited for.
    """
    # whoever serves it has been of service for long enough; nearly always
    if status.pods.ready == status.pods.updated:
        return None
    seconds = context.query.min_ready_seconds
    waits = (
        t.wait_seconds(seconds, now)
        for totals in context.all_totals
        if now < totals.settles_at
        for t in totals.available
    )
    return min((wait for wait in waits if wait > 0), default=None)


def is_progress(old: WeightRolloutStatus, new: WeightRolloutStatus) -> bool:
    """Whether two statuses differ only in how many bytes were staged, and in the sentences that say
    so: nothing is lost if that is written a little later. `loop` asks before it writes.
    """
    return _without_bytes(old) == _without_bytes(new)


def _without_bytes(status: WeightRolloutStatus) -> WeightRolloutStatus:
    high = status.high_water.model_copy(update={"nbytes": 0})
    conditions_ = [condition.model_copy(update={"message": ""}) for condition in status.conditions]
    update = {
        "nbytes": ByteCounts(),
        "staged_percent": "",
        "message": "",
        "last_progress_at": "",
        "high_water": high,
    }
    return status.model_copy(update={**update, "conditions": conditions_})


def build(context: PassContext, now: datetime) -> WeightRolloutStatus:
    """The whole status of a pass, which `loop` compares with the one that was written. The order
    is of what needs what: counts, high-water marks of them, the end, the deadline, the verdict.
    """
    base = context.base
    counted = base.model_copy(update=_counts(context, now))
    counted = counted.model_copy(update={"high_water": _high_water(base, counted)})
    is_complete = _is_complete(context, counted)
    if is_complete:
        counted = revision.completed(counted, now)
    if context.blocked.kind == "Aborted":
        counted = counted.model_copy(update={"aborted_revision": counted.revision})
    if progress_deadline.has_moved(context, counted, is_complete=is_complete):
        counted = counted.model_copy(update={"last_progress_at": timestamps.show(now)})
    outcome = _outcome(context, counted, now, is_complete=is_complete)
    facts = conditions.ConditionInputs(
        outcome_phase=outcome.phase,
        reason=outcome.reason,
        message=outcome.message,
        is_complete=is_complete,
        is_stalled=outcome.stalled,
        paused_reason=_paused_reason(context, is_complete=is_complete),
        version_reason=(context.blocked.reason or context.blocked.kind)
        if context.blocked.rule.waits_for_version
        else "",
        version_message=context.blocked.message
        if context.blocked.rule.waits_for_version
        else f"digest {base.target.digest}",
        targets_reason="TargetConflict"
        if context.blocked.kind == "TargetConflict"
        else ""
        if context.all_totals
        else "NoTargets",
        targets_message=context.blocked.message or outcome.message
        if context.blocked.kind == "TargetConflict" or not context.all_totals
        else f"{counted.pods.desired} pods on {counted.nodes.desired} nodes",
        is_staged=counted.nodes.desired > 0 and counted.nodes.staged == counted.nodes.desired,
        staged_text=counted.nodes.summary,
        transport_text=_transport(context),
        is_available=_is_available(context, counted),
        available_text=f"{counted.pods.available} of {counted.pods.desired} pods are Ready",
    )
    return counted.model_copy(
        update={
            "observed_generation": context.rollout.generation,
            "phase": outcome.phase,
            # as much as the schema takes
            "message": outcome.message[:1024],
            "conditions": conditions.build(context.rollout, facts, now),
        }
    )


def _transport(context: PassContext) -> str:
    """What came of the choice of a transport; it changes only when the nodes, or what they serve,
    do.
    """
    asked, seen = context.rollout.spec.staging.transport, context.observed
    # looked at anew only then: it asks every node of the rollout
    facts = (asked, seen.peers_epoch, tuple(totals.node for totals in context.all_totals))
    known: tuple[object, str] | None = seen.interned.get(("transport", context.rollout.uid))
    if known is None or known[0] != facts:
        states = [
            seen.states[totals.node] for totals in context.all_totals if seen.follows(totals.node)
        ]
        known = (facts, transports.describe(asked, states))
        seen.interned["transport", context.rollout.uid] = known
    return f" ({known[1]})" if known[1] else ""


def _counts(context: PassContext, now: datetime) -> dict[str, object]:
    all_totals, previous = context.all_totals, context.base.previous
    # What was complete stays so though this process has not watched its pods for long enough yet.
    moment = _FAR if revision.is_completed(context.base) else now
    desired = sum(len(totals.targets) for totals in all_totals)
    updated = sum(totals.updated for totals in all_totals)
    # pods that are not scheduled yet count under the empty name, which is no node
    nodes = [totals for totals in all_totals if totals.node]
    holding = sum(totals.holds for totals in nodes)
    nbytes = _bytes(context, nodes)
    percent = 100 * nbytes.done // nbytes.total if nbytes.total else 0
    local = bool(nodes) and bool(previous.digest) and all(totals.holds_previous for totals in nodes)
    named = _named(context)
    return {
        "pods": Counts(
            desired=desired,
            prepared=sum(totals.prepared for totals in all_totals),
            updated=updated,
            ready=sum(
                totals.ready(context.query, moment) for totals in all_totals if totals.updated
            ),
            golden=sum(totals.golden for totals in all_totals),
            ran=sum(totals.ran for totals in all_totals),
            available=sum(len(totals.available) for totals in all_totals),
            failed=len(context.failures.failed),
        ),
        "nodes": NodeCounts(desired=len(nodes), staged=holding, summary=f"{holding}/{len(nodes)}"),
        "nbytes": nbytes,
        "progress": f"{updated}/{desired}",
        "staged_percent": f"{percent}%" if nbytes.total else "",
        "rollback": "" if not previous.digest else "Local" if local else "NotLocal",
        # those that failed come first
        "failures": named[:MAX_FAILURES],
        "failures_total": len(named),
    }


def _named(context: PassContext) -> list[Failure]:
    """What keeps pods back; and for as long as the version is given up, why it was, though nothing
    of it can be seen any more.
    """
    found = context.failures
    if found.failed or not context.blocked.rule.gives_up:
        return found.all
    # what was missing then may be back; only what failed is why it was given up
    then = [failure for failure in context.base.failures if failure.reason not in POD_IS_AWAY]
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


def _bytes(context: PassContext, nodes: Sequence[NodeTotals]) -> ByteCounts:
    each = context.version.status.nbytes if context.version else 0
    # an agent that has not begun yet says 0; one that has knows better than the WeightVersion
    total = sum(max(each, totals.bytes_total) for totals in nodes)
    # agents' words: never more than all of it
    return ByteCounts(total=total, done=min(sum(totals.bytes_done for totals in nodes), total))


def _is_complete(context: PassContext, status: WeightRolloutStatus) -> bool:
    pods = status.pods
    return (
        context.blocked.rule.may_be_complete
        and pods.desired > 0
        and pods.updated == pods.desired
        and pods.ready == pods.desired
    )


def _is_available(context: PassContext, status: WeightRolloutStatus) -> bool:
    # as a Deployment's Available: while no more are of no service than may be
    pods = status.pods
    return pods.desired > 0 and pods.available >= pods.desired - disruption_budget.limit(
        context.rollout.spec.strategy, pods.desired
    )


def _outcome(
    context: PassContext, status: WeightRolloutStatus, now: datetime, *, is_complete: bool
) -> Verdict:
    blocked, first = context.blocked, next(iter(status.failures), None)
    version = status.target.version
    counts = f"{status.pods.updated} of {status.pods.desired} pods serve {version}"
    # Aborted goes before Complete, which it may not be; TooManyFailures and Paused come after it
    match blocked.kind:
        case "Terminating":
            return Verdict("Pending", blocked.kind, blocked.message)
        case "TargetConflict":
            return Verdict("Stalled", blocked.kind, blocked.message, stalled=True)
        case "VersionFailed":
            return Verdict("Stalled", blocked.reason, blocked.message, stalled=True)
        case "NoTargets":
            return Verdict(
                "Pending",
                "NoTargets",
                "no pod of this namespace carries the selected labels and "
                "hotweights.dev/inject=true",
            )
        case "Aborted":
            return Verdict(
                "Aborted",
                _why(first),
                f"given up: {counts}, every pod keeps what it serves{_tell(first)}",
                True,
            )
        case _ if is_complete:
            return Verdict(
                "Complete", "Complete", f"all {status.pods.desired} pods serve {version}"
            )
        case "TooManyFailures":
            message = f"{counts}; nothing further is activated: {_RESUME}{_tell(first)}"
            return Verdict("Stalled", _why(first), message, stalled=True)
        case "Paused":
            return Verdict("Paused", "Paused", f"paused by spec.paused; {counts}")
        case _:
            return _working(context, status, now, counts)


def _working(
    context: PassContext, status: WeightRolloutStatus, now: datetime, counts: str
) -> Verdict:
    first = next(iter(status.failures), None)
    if context.blocked.rule.waits_for_version:
        doing = Verdict(
            "Pending" if context.blocked.kind == "NotFound" else "Resolving",
            context.blocked.kind,
            context.blocked.message,
        )
    elif status.nodes.staged < status.nodes.desired and status.pods.updated < status.pods.desired:
        text = f"{status.nodes.summary} nodes hold {status.target.version}"
        doing = Verdict(
            "Staging",
            "Staging",
            f"{text} ({status.staged_percent or '0%'} of the bytes){_tell(first)}",
        )
    elif status.pods.prepared < status.pods.desired:
        text = (
            f"{status.pods.prepared} of {status.pods.desired} pods have prepared "
            f"{status.target.version}"
        )
        if context.restarted:
            text += (
                f"; {context.restarted} restarted soon after they had started and are asked when "
                "they have been Ready for a minute"
            )
        doing = Verdict("Activating", "Preparing", text + _tell(first))
    else:
        doing = Verdict(
            "Activating",
            "Activating",
            f"{counts}, {status.pods.ready} of them are Ready{_tell(first)}",
        )
    # nobody is left to wait for, so it is said before the deadline passes
    if _only_failed_remain(context):
        return Verdict(
            "Stalled", _why(first), f"{counts}; the others failed{_tell(first)}", stalled=True
        )
    seconds = context.rollout.spec.progress_deadline_seconds
    if context.blocked.rule.deadline_runs and now >= progress_deadline.deadline(
        context, status, now
    ):
        message = f"no progress for {seconds} s: {doing.message}"
        return Verdict("Stalled", Reason.PROGRESS_DEADLINE_EXCEEDED, message, stalled=True)
    return doing


def _only_failed_remain(context: PassContext) -> bool:
    """Whether every pod either serves the version or failed to."""
    rest = sum(len(totals.targets) - totals.updated for totals in context.all_totals)
    return rest > 0 and rest == len(context.failures.failed)


_RESUME = (
    "change the version, or raise failurePolicy.maxFailed, or set the annotation "
    "hotweights.dev/retry to a new value"
)


def _why(failure: Failure | None) -> str:
    return failure.reason if failure else "TooManyFailures"


def _tell(failure: Failure | None) -> str:
    if failure is None:
        return ""
    return f"; {failure.pod} on {failure.node or 'no node'}: {failure.reason}: {failure.message}"


def _paused_reason(context: PassContext, *, is_complete: bool) -> str:
    if context.blocked.kind == "TooManyFailures" and not is_complete:
        return "TooManyFailures"
    return "Requested" if context.rollout.spec.paused else ""
