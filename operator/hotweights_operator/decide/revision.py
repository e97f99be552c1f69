"""Which revision a rollout is at: what `status` must remember because it cannot be seen in the
fleet.

A revision begins when the version's digest changes, by a new versionRef, by an old one (that is a
rollback), because a WeightVersion was made anew under its name, or when a retry of the same digest
is asked for. It ends Complete, Superseded or Aborted, and the end goes into the history; a revision
that was complete once stays so in the history, whatever happens to pods later.

*Stable* is what was complete last, and only that: it stays staged, and new pods and repairs get it
while the rollout holds. What else stays staged, so that one can go where one came from without the
network, is *held*.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from hotweights_common import timestamps
from hotweights_crds.weightrollout import (
    MAX_HISTORY,
    Counts,
    HighWater,
    HistoryEntry,
    VersionStatus,
    WeightRolloutStatus,
)
from hotweights_operator.model.objects import Rollout, Version

Outcome = Literal["Complete", "Superseded", "Aborted"]


def describe(version: Version) -> VersionStatus:
    """A resolved version as it goes into the status."""
    return VersionStatus(
        name=version.name, version=version.spec.version, digest=version.status.digest
    )


def is_completed(status: WeightRolloutStatus) -> bool:
    """Whether the current revision was complete at some time."""
    # the newest stands first; an entry of the revision under way says that it was complete once
    newest = next(iter(status.history), None)
    return (
        newest is not None and newest.revision == status.revision and newest.outcome == "Complete"
    )


def stable(status: WeightRolloutStatus) -> VersionStatus:
    """The version that the whole fleet served last; empty: what the engines booted."""
    if status.stable.digest:
        return status.stable
    # Written by a release before 0.2, which had one field for both: what was complete last, and
    # what one could go back to.
    return status.target if is_completed(status) else status.previous


def goes_back(status: WeightRolloutStatus) -> bool:
    """Whether the revision leads to a version that was complete before. That served everywhere, so
    it needs neither waves nor the gate.
    """
    return bool(status.target.digest) and (
        status.goes_back or status.target.digest == stable(status).digest
    )


def kept(status: WeightRolloutStatus) -> list[VersionStatus]:
    """What every node is to hold, without repetition: the target, what is stable, then what else is
    held. `assignments` counts on that order.
    """
    found = {v.digest: v for v in (status.target, stable(status), *status.held) if v.digest}
    return list(found.values())


def revised(rollout: Rollout, version: Version, now: datetime) -> WeightRolloutStatus:
    """The status with this version as its target. Unchanged, but for names, when the digest is the
    same and no retry is asked for, or when it asks to retry what was complete. `rollouts` calls it
    in every pass with a usable version; a new revision is one more than the last, from 1.
    """
    status, target = rollout.status, describe(version)
    retries, is_same = (
        bool(rollout.retry) and rollout.retry != status.retried,
        status.target.digest == target.digest,
    )
    if status.revision and is_same and (not retries or is_completed(status)):
        return status.model_copy(
            update={"target": target, "retried": rollout.retry or status.retried}
        )
    # what follows is read off the old status before anything of it is replaced
    moment = timestamps.show(now)
    was_stable = stable(status)
    before = (was_stable.digest, status.previous.digest)
    aborted = bool(status.revision) and status.aborted_revision == status.revision
    history = status.history
    if status.revision and not is_completed(status):
        history = _entered(status, "Aborted" if aborted else "Superseded", moment)
    return status.model_copy(
        update={
            "revision": status.revision + 1,
            "revision_started_at": moment,
            "last_progress_at": moment,
            "target": target,
            "stable": was_stable,
            "previous": _previous(status, was_stable, target),
            "goes_back": target.digest in before or (goes_back(status) and is_same),
            "held": _held(status, was_stable, target),
            "history": history,
            "most_failed": 0,
            "retried": rollout.retry or status.retried,
            "high_water": HighWater(),
            "pods": Counts(),
            "failures": [],
            "failures_total": 0,
        }
    )


def completed(status: WeightRolloutStatus, now: datetime) -> WeightRolloutStatus:
    """The status with the current revision's end in its history, once, and its target as what is
    stable. Called in every pass that finds the rollout complete.
    """
    if is_completed(status) and status.stable.digest == status.target.digest:
        return status
    history = (
        status.history
        if is_completed(status)
        else _entered(status, "Complete", timestamps.show(now))
    )
    was = stable(status)
    # a retry, or the first version of all, leaves nothing behind to go back to
    changed = was.digest not in ("", status.target.digest)
    return status.model_copy(
        update={
            "history": history,
            "stable": status.target,
            "previous": was if changed else status.previous,
            "held": [was] if changed else status.held,
        }
    )


def ended(
    old: WeightRolloutStatus, new: WeightRolloutStatus, now: datetime
) -> list[tuple[Outcome, float]]:
    """What ended between two statuses: how, and after how many seconds; for the metrics. An abort
    counts when it happens, not when it is followed. What has no times that can be read is left out.
    """
    known = {entry.revision for entry in old.history}
    ends: list[tuple[Outcome, str, str]] = [
        (entry.outcome, entry.started_at, entry.finished_at)
        for entry in new.history
        if entry.revision not in known and entry.outcome != "Aborted"
    ]
    if new.aborted_revision and new.aborted_revision != old.aborted_revision:
        ends.append(("Aborted", new.revision_started_at, timestamps.show(now)))
    spans = [
        (outcome, timestamps.parse(start), timestamps.parse(end)) for outcome, start, end in ends
    ]
    return [
        (outcome, (end - start).total_seconds()) for outcome, start, end in spans if start and end
    ]


def _previous(
    status: WeightRolloutStatus, was_stable: VersionStatus, target: VersionStatus
) -> VersionStatus:
    """What was complete before the target; empty when nothing else was."""
    if was_stable.digest != target.digest:
        return was_stable
    return status.previous if status.previous.digest != target.digest else VersionStatus()


def _held(
    status: WeightRolloutStatus, was_stable: VersionStatus, target: VersionStatus
) -> list[VersionStatus]:
    """Beside the target and what is stable: when one goes back to what is stable, that from which
    one comes.
    """
    if was_stable.digest != target.digest:
        return []
    # one: every version held costs each node its whole size
    return [v for v in (status.target, *status.held) if v.digest not in ("", target.digest)][:1]


def _entered(status: WeightRolloutStatus, outcome: Outcome, moment: str) -> list[HistoryEntry]:
    entry = HistoryEntry(
        revision=status.revision,
        version=status.target.version,
        outcome=outcome,
        started_at=status.revision_started_at,
        finished_at=moment,
    )
    # the newest first; the oldest goes
    return [entry, *status.history][:MAX_HISTORY]
