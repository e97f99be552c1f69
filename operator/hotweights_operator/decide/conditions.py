"""The conditions of a WeightRollout, as a table over the facts of a pass.

Ready, Progressing, Available, Staged, VersionResolved and TargetsFound are always there. Paused,
Reconciling and Stalled are abnormal when True and absent otherwise, so that kstatus, Helm and Argo
CD read them right: Stalled is a failure, Reconciling is work under way, and neither beside
Ready=True is success (https://github.com/kubernetes-sigs/cli-utils/tree/master/pkg/kstatus).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from hotweights_common import timestamps
from hotweights_common.reasons import Reason
from hotweights_crds.conditions import MAX_MESSAGE, Condition, ConditionStatus
from hotweights_crds.weightrollout import Phase
from hotweights_operator.model.objects import Rollout


@dataclass(frozen=True, slots=True)
class ConditionInputs:
    """What the conditions are made of. Empty reasons mean that all is well."""

    outcome_phase: Phase
    reason: str
    message: str
    is_complete: bool
    is_stalled: bool
    paused_reason: str
    version_reason: str
    version_message: str
    targets_reason: str
    targets_message: str
    is_staged: bool
    staged_text: str
    transport_text: str
    is_available: bool
    available_text: str


Row = tuple[str, ConditionStatus, str, str]  # type, status, reason, message


def build(rollout: Rollout, facts: ConditionInputs, now: datetime) -> list[Condition]:
    """All conditions, each with the time of its last change of status (whole seconds, our clock).
    `rollout_status` calls it once in a pass.
    """
    old = {condition.type: condition for condition in rollout.status.conditions}
    moment = timestamps.show(now)
    return [_condition(row, old.get(row[0]), rollout.generation, moment) for row in _rows(facts)]


def _condition(row: Row, old: Condition | None, generation: int, moment: str) -> Condition:
    """One row as a condition; what has not changed stays the very same."""
    type_, status, reason, message = row
    message = message[:MAX_MESSAGE]  # before the comparison: the old one was cut as well
    same_status = old is not None and old.status == status
    if (
        same_status
        and old
        and (old.reason, old.message, old.observed_generation) == (reason, message, generation)
    ):
        return old
    return Condition(
        type=type_,
        status=status,
        observed_generation=generation,
        last_transition_time=old.last_transition_time if old and same_status else moment,
        reason=reason,
        message=message,
    )


def _rows(facts: ConditionInputs) -> list[Row]:
    # each of these is a state of its own to kstatus; only what is in none of them is under way
    working = not (facts.is_complete or facts.is_stalled or facts.paused_reason)
    rows: list[Row] = [
        ("Ready", _truth(facts.is_complete), facts.reason, facts.message),
        ("Progressing", _truth(working), facts.reason, facts.message),
        (
            "Available",
            _truth(facts.is_available),
            "EnoughPodsReady" if facts.is_available else "TooFewPodsReady",
            facts.available_text,
        ),
        (
            "Staged",
            _truth(facts.is_staged),
            "Staged" if facts.is_staged else Reason.NOT_STAGED,
            f"{facts.staged_text} nodes hold the version{facts.transport_text}",
        ),
        (
            "VersionResolved",
            _truth(not facts.version_reason),
            facts.version_reason or "Resolved",
            facts.version_message,
        ),
        (
            "TargetsFound",
            _truth(not facts.targets_reason),
            facts.targets_reason or "Found",
            facts.targets_message,
        ),
    ]
    if facts.paused_reason:
        rows.append(("Paused", "True", facts.paused_reason, facts.message))
    if working:
        rows.append(("Reconciling", "True", facts.reason, facts.message))
    if facts.is_stalled:
        rows.append(("Stalled", "True", facts.reason, facts.message))
    return rows


def _truth(value: bool) -> ConditionStatus:
    return "True" if value else "False"
