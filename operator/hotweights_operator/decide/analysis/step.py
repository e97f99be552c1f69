"""An analysis as a step of a canary: which metrics it has, what was read, what is to be measured, and
whether it speaks against the version.

The status remembers one analysis, that of the step that was measured last, by revision, index and
beginning of the step. While something else holds the rollout nothing is measured and nothing counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from hotweights_common.reasons import Reason
from hotweights_crds.analysis import AnalysisStatus, AnalysisStep, Metric
from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_operator.decide import revision
from hotweights_operator.decide.analysis import arguments, expressions, judge
from hotweights_operator.decide.strategy import canary
from hotweights_operator.model.failures import Failures
from hotweights_operator.model.measurements import Measure, MeasurementId, Reading
from hotweights_operator.model.node_totals import NodeTotals
from hotweights_operator.model.objects import Rollout
from hotweights_operator.model.observed import Observed


@dataclass(frozen=True, slots=True)
class Analysis:
    """The status with what was read in it, and what of it can be measured on."""

    status: WeightRolloutStatus
    due: tuple[judge.Due, ...] = ()


class CannotMeasure(Exception):
    """Why a step cannot be measured; it says what to do."""


def looked_at(
    rollout: Rollout,
    base: WeightRolloutStatus,
    all_totals: Sequence[NodeTotals],
    found: Failures,
    observed: Observed,
    now: datetime,
) -> Analysis:
    """The analysis of the canary's step, if it has one. `rollouts` calls it in every pass in which
    nothing holds the rollout.
    """
    step = _step(rollout, base)
    if step is None:
        return Analysis(base)
    was = _of_this_step(base)
    try:
        metrics = _metrics(rollout, base, step, observed)
    except CannotMeasure as error:
        if was.phase in judge.DECIDED:
            return Analysis(_with(base, was))
        waiting = was.model_copy(update={"phase": "Waiting", "message": str(error)[:512]})
        return Analysis(_with(base, waiting))
    now_due = {due.metric.name for due in judge.due(was, metrics, now) if due.in_seconds <= 0}

    def read(metric: Metric, number: int) -> Reading | None:
        if metric.golden_probe is None:
            return observed.readings.get(_id(rollout, was, metric, number))
        return _proved(all_totals, found, now) if metric.name in now_due else None

    after = judge.judge(was, metrics, read, now)
    return Analysis(_with(base, after), tuple(judge.due(after, metrics, now)))


def measures(rollout: Rollout, analysis: Analysis) -> tuple[Measure, ...]:
    """What is to be asked now: golden tokens need no asking."""
    return tuple(
        Measure(
            _id(rollout, analysis.status.analysis, due.metric, due.number),
            due.metric,
            rollout.namespace,
            rollout.name,
        )
        for due in analysis.due
        if due.in_seconds <= 0 and due.metric.golden_probe is None
    )


def due_in_seconds(analysis: Analysis) -> float | None:
    """In how many seconds the next measurement is due; None: what is due is asked already, or
    nothing is.
    """
    return min((due.in_seconds for due in analysis.due if due.in_seconds > 0), default=None)


def against(rollout: Rollout, status: WeightRolloutStatus) -> tuple[Reason, str] | None:
    """Why the step's analysis speaks against the version; None: it does not. A promotion, or an edit
    of the steps, ends that: the step is another one then.
    """
    analysis = status.analysis
    if _step(rollout, status) is None or _place(analysis) != _place(_of_this_step(status)):
        return None
    match analysis.phase:
        case "Failed":
            return Reason.ANALYSIS_FAILED, f"the analysis failed: {analysis.message}"
        case "Error":
            return Reason.ANALYSIS_ERROR, f"the analysis has no result: {analysis.message}"
        case _:
            return None


def _step(rollout: Rollout, status: WeightRolloutStatus) -> AnalysisStep | None:
    step = canary.current(rollout.spec, status.canary)
    return step.analysis if step is not None and status.target.digest else None


def _place(analysis: AnalysisStatus) -> tuple[int, int, str]:
    return (analysis.revision, analysis.step, analysis.started_at)


def _of_this_step(status: WeightRolloutStatus) -> AnalysisStatus:
    """What is remembered of the step's analysis; a new one if that is of another step."""
    new = AnalysisStatus(
        phase="Running",
        revision=status.revision,
        step=status.canary.step,
        started_at=status.canary.step_started_at,
    )
    return status.analysis if _place(status.analysis) == _place(new) else new


def _with(base: WeightRolloutStatus, analysis: AnalysisStatus) -> WeightRolloutStatus:
    waits_for = "Promotion" if analysis.phase == "Inconclusive" else "Analysis"
    step = base.canary.model_copy(update={"waits_for": waits_for})
    return base.model_copy(update={"analysis": analysis, "canary": step})


def _metrics(
    rollout: Rollout, base: WeightRolloutStatus, step: AnalysisStep, observed: Observed
) -> list[Metric]:
    """The step's metrics with their arguments in place. Raises `CannotMeasure`."""
    written, defaults = step.metrics or [], dict[str, str]()
    if step.template_name is not None:
        template = observed.templates.get((rollout.namespace, step.template_name))
        if template is None:
            raise CannotMeasure(
                f"WeightAnalysisTemplate {step.template_name} does not exist in namespace "
                f"{rollout.namespace}: create it"
            )
        written, defaults = template.spec.metrics, template.spec.args
    given = {f"args.{name}": value for name, value in {**defaults, **step.args}.items()}
    names = {**arguments.built_in(rollout, revision.stable(base), base.target), **given}
    return [_checked(metric, names) for metric in written]


def _checked(metric: Metric, names: Mapping[str, str]) -> Metric:
    try:
        found = arguments.filled(metric, names)
        for condition in judge.conditions(found):
            if condition:
                expressions.parse(condition)
    # pydantic's is a ValueError too: an argument may make a value that the schema would refuse
    except ValueError as error:
        raise CannotMeasure(f"metric {metric.name}: {error}") from error
    return found


def _id(rollout: Rollout, analysis: AnalysisStatus, metric: Metric, number: int) -> MeasurementId:
    return MeasurementId(
        rollout.uid, analysis.revision, analysis.step, analysis.started_at, metric.name, number
    )


def _proved(all_totals: Sequence[NodeTotals], found: Failures, now: datetime) -> Reading:
    """Of the pods that could compare, the share that answered as a cold load does."""
    agreed = sum(totals.golden for totals in all_totals)
    ran = sum(totals.ran for totals in all_totals)
    differed = sum(one.reason == Reason.PROBE_MISMATCH for one in found.failed.values())
    could = agreed + differed
    text = f"{agreed} of {could} pods that could compare golden tokens agreed"
    if ran:
        text += f"; {ran} could not"
    return Reading(now, agreed / could if could else None, text)
