"""Which revision a rollout is at: what `status` must remember because it cannot be seen in the fleet.

A revision begins when the version's digest changes, by a new versionRef, by an old one (that is a rollback), or because a
WeightVersion was made anew under its name. It ends Complete, Superseded or Aborted, and the end goes into the history; a
revision that was complete once stays so in the history, whatever happens to pods later. What was last complete is *previous*:
it stays staged, and it is what new pods get while the rollout holds still.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from hotweights_crds.weightrollout import (
    MAX_HISTORY,
    Counts,
    HistoryEntry,
    VersionStatus,
    WeightRolloutStatus,
)
from hotweights_operator import times
from hotweights_operator.model import Version

Outcome = Literal["Complete", "Superseded", "Aborted"]


def describe(version: Version) -> VersionStatus:
    """A resolved version as it goes into the status."""
    return VersionStatus(name=version.name, version=version.spec.version, digest=version.status.digest)


def is_completed(status: WeightRolloutStatus) -> bool:
    """Whether the current revision was complete at some time."""
    newest = next(iter(status.history), None)
    return newest is not None and newest.revision == status.revision and newest.outcome == "Complete"


def last_complete(status: WeightRolloutStatus) -> VersionStatus:
    """The version that the whole fleet served last; empty: what the engines booted."""
    return status.target if is_completed(status) else status.previous


def revised(status: WeightRolloutStatus, version: Version, now: datetime) -> WeightRolloutStatus:
    """The status with this version as its target. Unchanged, but for names, when the digest is the same."""
    target = describe(version)
    if status.revision and status.target.digest == target.digest:
        return status.model_copy(update={"target": target})
    moment = times.show(now)
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
            "previous": _previous(status, target),
            "history": history,
            "pods": Counts(),
            "failures": [],
            "failures_total": 0,
        }
    )


def completed(status: WeightRolloutStatus, now: datetime) -> WeightRolloutStatus:
    """The status with the current revision's end in its history, once."""
    if is_completed(status):
        return status
    return status.model_copy(update={"history": _entered(status, "Complete", times.show(now))})


def ended(old: WeightRolloutStatus, new: WeightRolloutStatus, now: datetime) -> list[tuple[Outcome, float]]:
    """What ended between two statuses: how, and after how many seconds. An abort counts when it happens, not when it is followed."""
    known = {entry.revision for entry in old.history}
    ends: list[tuple[Outcome, str, str]] = [
        (entry.outcome, entry.started_at, entry.finished_at)
        for entry in new.history
        if entry.revision not in known and entry.outcome != "Aborted"
    ]
    if new.aborted_revision and new.aborted_revision != old.aborted_revision:
        ends.append(("Aborted", new.revision_started_at, times.show(now)))
    spans = [(outcome, times.parse(start), times.parse(end)) for outcome, start, end in ends]
    return [(outcome, (end - start).total_seconds()) for outcome, start, end in spans if start and end]


def _previous(status: WeightRolloutStatus, target: VersionStatus) -> VersionStatus:
    """What to keep beside the new target: what was complete last, or, when that comes back, what it is to replace."""
    complete = last_complete(status)
    return status.target if complete.digest == target.digest else complete


def _entered(status: WeightRolloutStatus, outcome: Outcome, moment: str) -> list[HistoryEntry]:
    entry = HistoryEntry(
        revision=status.revision,
        version=status.target.version,
        outcome=outcome,
        started_at=status.revision_started_at,
        finished_at=moment,
    )
    return [entry, *status.history][:MAX_HISTORY]
