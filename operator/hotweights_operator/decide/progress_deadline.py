"""When a rollout that gets no further counts as stalled: ``spec.progressDeadlineSeconds`` after the
last time that something moved, as a Deployment's progress deadline.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from hotweights_common import timestamps
from hotweights_crds.conditions import is_true
from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_operator.decide.context import PassContext


def deadline_in_seconds(
    context: PassContext, status: WeightRolloutStatus, now: datetime
) -> float | None:
    """In how many seconds the progress deadline passes; None: it does not run, or has passed."""
    # nothing is waited for, or not by this rollout
    if is_true(status.conditions, "Ready") or not context.blocked.rule.deadline_runs:
        return None
    left = deadline(context, status, now) - now
    # a second later: times in the status are cut to seconds, and the next pass is to find it passed
    return left.total_seconds() + 1.0 if left > timedelta(0) else None


def deadline(context: PassContext, status: WeightRolloutStatus, now: datetime) -> datetime:
    """When the progress deadline passes. ``last_progress_at`` may be another process's word, by
    another clock: it counts from when this one began to decide at the earliest, and from now at the
    latest.
    """
    # never in the future: progress that a clock ahead of ours noted would put the deadline off
    since = min(timestamps.parse(status.last_progress_at) or now, now)
    if context.started_at is not None:
        since = max(since, context.started_at)
    return since + timedelta(seconds=context.rollout.spec.progress_deadline_seconds)


def has_moved(context: PassContext, status: WeightRolloutStatus, *, is_complete: bool) -> bool:
    """Whether something moved since the last status, or the deadline's clock has to start anew."""
    old = context.rollout.status
    # a new revision has its whole time
    if not old.last_progress_at or old.revision != status.revision:
        return True
    # what was held, complete or without its version was not expected to move
    was_held = is_true(old.conditions, "Paused") and context.blocked.kind not in (
        "Paused",
        "TooManyFailures",
    )
    was_complete = is_true(old.conditions, "Ready") and not is_complete
    waits, waited = (
        context.blocked.rule.waits_for_version,
        not is_true(old.conditions, "VersionResolved"),
    )
    return was_held or was_complete or waits != waited or status.high_water != old.high_water
