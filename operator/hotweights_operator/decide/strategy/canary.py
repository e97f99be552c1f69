"""A canary: how many pods may take the target now, which of them, and when its step has ended.

A step is a level and not an order: it says how many pods may be told the target, and whoever is told
it, or serves it, counts. So a canary that goes is replaced, also in a pause; and who is a canary
stands in the nodes' entries, where an operator that starts finds it again. Each step is a rollout of
its own: of the pods that it admits, all have prepared before the first one changes, and only they
prepare, since a second copy costs its whole size.

A way back takes no steps: what it leads to served everywhere. Neither does a revision that was
complete once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from hotweights_common import timestamps
from hotweights_crds.analysis import AnalysisPhase
from hotweights_crds.weightrollout import (
    CanaryStatus,
    CanaryStep,
    WeightRolloutSpec,
    WeightRolloutStatus,
)
from hotweights_operator.decide import revision
from hotweights_operator.decide.strategy import disruption_budget
from hotweights_operator.model import failures
from hotweights_operator.model.node_totals import NodeTotals
from hotweights_operator.model.targets import Target

WaitsFor = Literal["", "Promotion", "Time", "Pods", "Analysis"]


@dataclass(frozen=True, slots=True)
class Standing:
    """What says whether a step has ended."""

    allowed: int  # pods that may serve the target
    possible: int  # pods that could: those that failed it within the policy are waited for no more
    ready: int  # pods that serve it and have been of service for long enough
    started_at: datetime  # of the step, never later than now
    now: datetime
    analysis: AnalysisPhase  # of the step; empty: it has none


@dataclass(frozen=True, slots=True)
class StepKind:
    """What a kind of step means. A new kind is a row of `KINDS`."""

    waits_for: Callable[[CanaryStep], WaitsFor]
    is_over: Callable[[CanaryStep, Standing], bool]
    pauses: bool  # the phase is Paused while it lasts, and the progress deadline does not run
    promotable: bool  # `promote` ends it


def _has_its_pods(step: CanaryStep, standing: Standing) -> bool:
    # one must serve it in any case: else a version that fails everywhere would pass a lenient policy
    return standing.ready >= min(standing.allowed, max(1, standing.possible))


def _has_passed(step: CanaryStep, standing: Standing) -> bool:
    seconds = step.pause.duration_seconds if step.pause else None
    return seconds is not None and standing.now >= standing.started_at + timedelta(seconds=seconds)


def _has_succeeded(step: CanaryStep, standing: Standing) -> bool:
    return standing.analysis == "Successful"


def _paused_for(step: CanaryStep) -> WaitsFor:
    return "Time" if step.pause and step.pause.duration_seconds is not None else "Promotion"


# by the step's field that is set
KINDS: dict[str, StepKind] = {
    "set_replicas": StepKind(lambda _: "Pods", _has_its_pods, pauses=False, promotable=False),
    "pause": StepKind(_paused_for, _has_passed, pauses=True, promotable=True),
    "analysis": StepKind(lambda _: "Analysis", _has_succeeded, pauses=False, promotable=True),
}


def kind_of(step: CanaryStep) -> StepKind:
    """What a step means. One of a newer release is a pause: somebody has to look."""
    return next(
        (kind for name, kind in KINDS.items() if getattr(step, name) is not None), KINDS["pause"]
    )


def steps_of(spec: WeightRolloutSpec) -> Sequence[CanaryStep]:
    """The steps; none without a canary."""
    return spec.strategy.canary.steps if spec.strategy.canary else ()


def current(spec: WeightRolloutSpec, canary: CanaryStatus) -> CanaryStep | None:
    """The step that the revision is at; None: it limits nobody (any more)."""
    steps = steps_of(spec)
    return steps[canary.step] if canary.step < len(steps) else None


# -- where a revision is ------------------------------------------------------------------------


def placed(
    spec: WeightRolloutSpec, base: WeightRolloutStatus, desired: int, now: datetime
) -> WeightRolloutStatus:
    """The status at its step of the spec as it is: the steps may have been edited. Whoever had done
    all goes on so; whoever is beyond the last one is at the last one.
    """
    steps, was = steps_of(spec), base.canary
    walked = was.steps > 0 and was.step >= was.steps
    if not steps or walked or revision.goes_back(base) or revision.is_completed(base):
        step = len(steps)
    else:
        step = min(was.step, len(steps) - 1)
    is_same = step == was.step and was.steps > 0 and was.step_started_at
    return _at(spec, base, step, desired, was.step_started_at if is_same else timestamps.show(now))


def moved(
    spec: WeightRolloutSpec, base: WeightRolloutStatus, step: int, desired: int, now: datetime
) -> WeightRolloutStatus:
    """The status at another step, whose pods have yet to prepare."""
    found = _at(spec, base, step, desired, timestamps.show(now))
    return found.model_copy(update={"prepared_revision": 0})


def _at(
    spec: WeightRolloutSpec, base: WeightRolloutStatus, step: int, desired: int, since: str
) -> WeightRolloutStatus:
    steps = steps_of(spec)
    found = CanaryStatus()
    if steps:
        is_over = step >= len(steps)
        found = CanaryStatus(
            step=step,
            steps=len(steps),
            step_started_at=since,
            allowed=desired if is_over else allowance(steps, step, desired),
            waits_for="" if is_over else kind_of(steps[step]).waits_for(steps[step]),
        )
    return base if found == base.canary else base.model_copy(update={"canary": found})


def allowance(steps: Sequence[CanaryStep], step: int, desired: int) -> int:
    """How many of ``desired`` pods may serve the target at a step: what was set last. A percentage
    rounds up, so that one asked for is never none; before any is set, nobody may.
    """
    values = [s.set_replicas for s in steps[: step + 1] if s.set_replicas is not None]
    if not values:
        return 0
    value = values[-1]
    if isinstance(value, str):
        value = -(-desired * int(value.removesuffix("%")) // 100)
    return min(desired, value)


def advanced(
    spec: WeightRolloutSpec, status: WeightRolloutStatus, failed: int, now: datetime
) -> WeightRolloutStatus:
    """The status at the next step, if its step has ended; one step in each pass, so that each is
    written. ``status`` has this pass's counts.
    """
    step, canary, pods = current(spec, status.canary), status.canary, status.pods
    if step is None:
        return status
    standing = Standing(
        allowed=canary.allowed,
        possible=pods.desired - failed,
        ready=pods.ready,
        started_at=_started_at(canary, now),
        now=now,
        analysis=analysis_phase(spec, status),
    )
    if not kind_of(step).is_over(step, standing):
        return status
    return moved(spec, status, canary.step + 1, pods.desired, now)


def pauses(spec: WeightRolloutSpec, status: WeightRolloutStatus) -> bool:
    """Whether it waits for somebody, or for a time, and not for pods."""
    step = current(spec, status.canary)
    waits = analysis_phase(spec, status) == "Inconclusive"
    return step is not None and (kind_of(step).pauses or waits)


def analysis_phase(spec: WeightRolloutSpec, status: WeightRolloutStatus) -> AnalysisPhase:
    """How the analysis of the step stands (`analysis.step`); empty: it has none, or none yet."""
    step, found = current(spec, status.canary), status.analysis
    place = (status.revision, status.canary.step, status.canary.step_started_at)
    if step is None or step.analysis is None:
        return ""
    return found.phase if (found.revision, found.step, found.started_at) == place else ""


def ends_in_seconds(
    spec: WeightRolloutSpec, status: WeightRolloutStatus, now: datetime
) -> float | None:
    """In how many seconds a timed pause ends; None: time ends nothing."""
    step = current(spec, status.canary)
    if step is None or step.pause is None or step.pause.duration_seconds is None:
        return None
    end = _started_at(status.canary, now) + timedelta(seconds=step.pause.duration_seconds)
    # a second later: times in the status are cut to seconds
    return max(0.0, (end - now).total_seconds()) + 1.0


def _started_at(canary: CanaryStatus, now: datetime) -> datetime:
    # by an earlier process's clock, perhaps: never in the future, or a pause could last for ever
    return min(timestamps.parse(canary.step_started_at) or now, now)


def tell(spec: WeightRolloutSpec, status: WeightRolloutStatus) -> str:
    """The step for people; empty: it limits nobody."""
    canary, step = status.canary, current(spec, status.canary)
    if step is None:
        return ""
    where = f"step {canary.step + 1} of {canary.steps}"
    match canary.waits_for:
        case "Pods":
            return f"{where}: {canary.allowed} of {status.pods.desired} pods may change"
        case "Time" if step.pause is not None:
            return f"{where}: waits {step.pause.duration_seconds} s since {canary.step_started_at}"
        case "Analysis":
            known = analysis_phase(spec, status)
            return f"{where}: analysis{f': {status.analysis.message}' if known else ''}"
        case "Promotion":
            if analysis_phase(spec, status) == "Inconclusive":
                where = f"{where}: the analysis is inconclusive: {status.analysis.message}"
            return (
                f"{where}: waits for a promotion (annotate it with hotweights.dev/command="
                f'"promote {status.revision}")'
            )
        case _:
            return f"{where}: waits for {canary.waits_for or 'nothing'}"


# -- who may take the target --------------------------------------------------------------------


def admitted(
    rollout_uid: str,
    base: WeightRolloutStatus,
    all_totals: Sequence[NodeTotals],
    failed: Collection[str],
    now: datetime,
) -> frozenset[str]:
    """UIDs of the pods that may be told the target, and prepare it: as many as the step allows. Those
    that are told it, or serve it, come first, whatever became of them; then who was asked to prepare
    it; then who boots, to whom it costs nothing; then the others, spread over zones.
    """
    target, allowed = base.target.digest, base.canary.allowed
    holding: list[str] = []
    others: list[tuple[int, int, str]] = []
    rank = {t.pod.uid: place for place, t in enumerate(spread(all_totals))}
    for totals in all_totals:
        for target_ in totals.targets:
            uid = target_.pod.uid
            if target_.told == target or target_.serves(target):
                holding.append(uid)
            elif uid not in failed and uid not in totals.unreachable:
                was_asked = _was_asked(target_, rollout_uid, base)
                turn = _turn(target_, target, now, was_asked=was_asked)
                if turn is not None:
                    others.append((turn, rank[uid], uid))
    places = max(0, allowed - len(holding))
    return frozenset([*holding, *(uid for _, _, uid in sorted(others)[:places])])


def _was_asked(target: Target, rollout_uid: str, base: WeightRolloutStatus) -> bool:
    """Whether it was asked to prepare the target, and did so or ended of it perhaps."""
    order = target.assigned
    asked = order is not None and order.prepare == base.target.digest
    ended = failures.ends_preparing(target, rollout_uid, base.revision) > 0
    return asked or ended or target.prepared(base.target.digest)


def _turn(target: Target, digest: str, now: datetime, *, was_asked: bool) -> int | None:
    """When it is a pod's turn, the lower the sooner; None: an order does not reach it now."""
    # It keeps its place while its container starts again: else a version that kills engines would
    # kill one after the other, each for the first time, though the step allows one.
    if was_asked and target.follows and disruption_budget.waited_for_seconds(target, now):
        return 0
    if not target.connected:
        return None
    if target.booting:
        if target.state is None or not target.state.holds(digest):
            return None
        # last of all one that ends again and again: the target may be what mends it
        return 4 if target.crashes else 1
    # what ended a moment ago is left alone for a while (`activation._ask`)
    return 3 if target.calm_seconds(now) else 2


def spread(all_totals: Sequence[NodeTotals]) -> list[Target]:
    """All pods in the order in which they become canaries: one of each zone, then the next of each;
    within a zone one of each node; then by name. A node without a zone is one of its own.
    """
    zones: dict[str, list[tuple[int, str, Target]]] = defaultdict(list)
    for totals in all_totals:
        by_name = sorted(totals.targets, key=lambda t: t.pod.name)
        for place, target in enumerate(by_name):
            zone = (target.node.zone if target.node else "") or totals.node
            zones[zone].append((place, target.pod.name, target))
    ordered = [
        (place, zone, name, target)
        for zone, found in zones.items()
        for place, (_, name, target) in enumerate(sorted(found, key=lambda item: item[:2]))
    ]
    return [target for *_, target in sorted(ordered, key=lambda item: item[:3])]
