"""``decide(rollout, observed, now)``: the one next step of a rollout, from what is observed and from nothing else.

It is pure: no clock, no API, no memory. What cannot be seen in the fleet (the revision, when it last progressed, whether it was
given up or paused for its failures) stands in the status and is written before it is acted on: the pass that begins a revision
does nothing else. Everything a pass does may be lost or done twice; the next pass sees what is there and goes on. The order:
which revision, which pods, what they say, may the rollout act (`Hold`), what each pod is to serve, what to report.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from hotweights_crds.conditions import find, is_true
from hotweights_crds.weightrollout import VersionStatus, WeightRolloutStatus
from hotweights_operator import activation, entries, failures, news, revision, summary, targets, times
from hotweights_operator.actions import Assign, RolloutDecision
from hotweights_operator.activation import Course
from hotweights_operator.failures import Failures
from hotweights_operator.model import Observed, Rollout, Version
from hotweights_operator.summary import Hold, View
from hotweights_operator.versions import is_failure


def decide(rollout: Rollout, observed: Observed, now: datetime) -> RolloutDecision:
    """One step."""
    version = observed.version(rollout.namespace, rollout.spec.version_ref.name)
    usable = version is not None and version.usable
    base = revision.revised(rollout.status, version, now) if version and usable else rollout.status
    begins = base.revision != rollout.status.revision
    own = targets.gather(rollout, observed)
    found = failures.find(own, base.target.digest)
    hold = _hold(rollout, base, version, observed, found, len(own))
    view = View(rollout, base, tuple(own), found, hold, version, observed)
    status = summary.describe(view, now)
    actions: tuple[Assign, ...] = () if begins else _actions(view)
    return RolloutDecision(
        actions=actions,
        status=status,
        events=news.events(rollout, status, view),
        again_in_seconds=0.0 if begins else _again(view, status, now),
    )


def _hold(
    rollout: Rollout,
    base: WeightRolloutStatus,
    version: Version | None,
    observed: Observed,
    found: Failures,
    desired: int,
) -> Hold:
    """Why the rollout may not act, if it may not; the gravest reason first."""
    if clash := targets.conflicts(rollout, observed):
        pod, owner = clash[0]
        return Hold(
            "TargetConflict",
            f"{len(clash)} selected pods, {pod.name} among them, belong to the older WeightRollout {owner.name}:"
            " change one of the two selectors or delete one of the two",
        )
    if version is None:
        name = rollout.spec.version_ref.name
        return Hold("NotFound", f"WeightVersion {name} does not exist in namespace {rollout.namespace}: create it")
    if not version.usable:
        resolved = find(version.status.conditions, "Resolved")
        reason = resolved.reason if resolved else "Resolving"
        message = resolved.message if resolved else "it is being resolved"
        text = f"WeightVersion {version.name}: {message}"
        return Hold("VersionFailed" if is_failure(reason) else "Resolving", text, reason)
    if base.revision and base.aborted_revision == base.revision:
        return Hold("Aborted", "")
    if len(found.failed) > rollout.spec.failure_policy.max_failed:
        return Hold("Aborted" if rollout.spec.failure_policy.action == "Abort" else "TooManyFailures", "")
    if _is_paused_for_failures(rollout) and base.revision == rollout.status.revision:
        return Hold("TooManyFailures", "")
    if rollout.spec.paused:
        return Hold("Paused", "")
    return Hold("NoTargets", "") if not desired else Hold("", "")


def _is_paused_for_failures(rollout: Rollout) -> bool:
    """Paused for its failures at this very generation: a change of the spec is what lets it go on."""
    paused = find(rollout.status.conditions, "Paused")
    return (
        paused is not None
        and paused.status == "True"
        and paused.reason == "TooManyFailures"
        and paused.observed_generation == rollout.generation
    )


def _actions(view: View) -> tuple[Assign, ...]:
    rollout, base = view.rollout, view.base
    goes = view.hold.kind in ("", "NoTargets")
    course = Course(
        target=base.target,
        fallback=revision.last_complete(base),
        prepares="All" if goes else "None" if view.hold.gives_up else "Kept",
        activates=goes and bool(base.target.digest),
        gives_up=view.hold.gives_up,
    )
    choice = activation.choose(rollout.spec, course, view.targets, view.failures)
    held: tuple[VersionStatus, ...] = (base.target, base.previous)
    return tuple(entries.writes(rollout, view.targets, choice, held, view.observed, stages=goes))


def _again(view: View, status: WeightRolloutStatus, now: datetime) -> float | None:
    """When the progress deadline passes, if it runs."""
    if is_true(status.conditions, "Ready") or not summary.deadline_runs(view.hold):
        return None
    since = times.parse(status.last_progress_at)
    if since is None:
        return None
    left = since + timedelta(seconds=view.rollout.spec.progress_deadline_seconds) - now
    return left.total_seconds() + 1.0 if left > timedelta(0) else None
