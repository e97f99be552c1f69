"""What the measurements of an analysis say, and which one is due.

A metric counts: it is Failed, Inconclusive or Error as soon as a limit is exceeded, and Successful
after ``count`` measurements that gave a result. One that is Failed or Error ends the analysis at
once; one that is Inconclusive lets the others come to their end, since one of them may still fail.
What was decided stays decided. An edit of the metrics counts from the next measurement on: counts
are kept by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from hotweights_common import timestamps
from hotweights_crds.analysis import (
    MAX_MEASUREMENTS,
    AnalysisStatus,
    Measurement,
    Metric,
    MetricStatus,
    Verdict,
)
from hotweights_operator.decide.analysis import expressions
from hotweights_operator.model.measurements import Reading

DECIDED = frozenset({"Successful", "Failed", "Inconclusive", "Error"})
AT_ONCE: tuple[Verdict, ...] = ("Failed", "Error")
"""Verdicts of one metric that are the analysis', the gravest first."""

_NO_DATA: dict[str, Verdict] = {
    "Error": "Error",
    "Success": "Successful",
    "Inconclusive": "Inconclusive",
}

Read = Callable[[Metric, int], Reading | None]
"""What the number-th measurement of a metric gave; None: nothing yet."""


@dataclass(frozen=True, slots=True)
class Due:
    """The measurement of a metric that comes next."""

    metric: Metric
    number: int
    in_seconds: float  # 0: now


def judge(
    status: AnalysisStatus, metrics: Sequence[Metric], read: Read, now: datetime
) -> AnalysisStatus:
    """The status with what was read since; each metric takes one measurement at most."""
    if status.phase in DECIDED:
        return status
    known = {metric.name: metric for metric in status.metrics}
    found: list[MetricStatus] = []
    for metric in metrics:
        state = known.get(metric.name, MetricStatus(name=metric.name))
        reading = read(metric, taken(state) + 1) if state.phase == "Running" else None
        if reading is not None:
            state = _noted(state, metric, reading, now)
        found.append(state.model_copy(update={"phase": _phase(state, metric)}))
    phase, message = _overall(found)
    return status.model_copy(update={"phase": phase, "message": message[:512], "metrics": found})


def due(status: AnalysisStatus, metrics: Sequence[Metric], now: datetime) -> list[Due]:
    """What is to be measured next of each metric that is not decided."""
    if status.phase in DECIDED:
        return []
    known = {metric.name: metric for metric in status.metrics}
    found: list[Due] = []
    for metric in metrics:
        state = known.get(metric.name, MetricStatus(name=metric.name))
        if state.phase == "Running":
            wait = (_next_at(status, state, metric, now) - now).total_seconds()
            found.append(Due(metric, taken(state) + 1, max(0.0, wait)))
    return found


def taken(state: MetricStatus) -> int:
    """How many measurements were made, those without a result included."""
    return state.successful + state.failed + state.inconclusive + state.errors


def _next_at(
    status: AnalysisStatus, state: MetricStatus, metric: Metric, now: datetime
) -> datetime:
    # written by another process's clock, perhaps: never in the future
    if not state.measurements:
        since = min(timestamps.parse(status.started_at) or now, now)
        return since + timedelta(seconds=metric.initial_delay_seconds)
    since = min(timestamps.parse(state.measurements[0].at) or now, now)
    return since + timedelta(seconds=metric.interval_seconds)


# -- one measurement ----------------------------------------------------------------------------


def assess(metric: Metric, reading: Reading) -> tuple[Verdict, str, str]:
    """What a reading is, its value, and why it is no success, for people."""
    if reading.error:
        return "Error", "", reading.error
    value = reading.value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        text = reading.text or "there is no value"
        return _NO_DATA[metric.on_no_data], "" if value is None else "NaN", f"no data: {text}"
    shown = expressions.shown(value)
    try:
        verdict, message = _compared(metric, value, shown)
    except (expressions.Incomparable, expressions.NotACondition) as error:
        return "Error", shown, str(error)
    return verdict, shown, f"{message}; {reading.text}" if reading.text and message else message


def _compared(metric: Metric, value: expressions.Value, shown: str) -> tuple[Verdict, str]:
    success, failure = conditions(metric)
    succeeds = expressions.parse(success).holds(value) if success else None
    # the failure first: a result that is both is no success
    if failure and expressions.parse(failure).holds(value):
        return "Failed", f"{shown} satisfies the failureCondition {failure}"
    if succeeds or succeeds is None:
        return "Successful", ""
    if failure:
        return "Inconclusive", f"{shown} satisfies neither {success} nor {failure}"
    return "Failed", f"{shown} does not satisfy {success}"


def conditions(metric: Metric) -> tuple[str, str]:
    """A metric's success and failure condition, with the provider's own where none is written;
    empty: there is none.
    """
    success, failure = metric.success_condition or "", metric.failure_condition or ""
    if not success and not failure:
        success = "result == true" if metric.job is not None else "result >= 1"
    return success, failure


def _noted(state: MetricStatus, metric: Metric, reading: Reading, now: datetime) -> MetricStatus:
    verdict, value, message = assess(metric, reading)
    measurement = Measurement(
        number=taken(state) + 1,
        phase=verdict,
        value=value[:64],
        message=message[:256],
        at=timestamps.show(min(reading.at, now)),
    )
    return state.model_copy(
        update={
            "successful": state.successful + (verdict == "Successful"),
            "failed": state.failed + (verdict == "Failed"),
            "inconclusive": state.inconclusive + (verdict == "Inconclusive"),
            "errors": state.errors + (verdict == "Error"),
            "consecutive_errors": state.consecutive_errors + 1 if verdict == "Error" else 0,
            "measurements": [measurement, *state.measurements][:MAX_MEASUREMENTS],
        }
    )


# -- all of them --------------------------------------------------------------------------------


def _phase(state: MetricStatus, metric: Metric) -> str:
    if state.failed > metric.failure_limit:
        return "Failed"
    if state.consecutive_errors > metric.consecutive_error_limit:
        return "Error"
    if state.inconclusive > metric.inconclusive_limit:
        return "Inconclusive"
    results = state.successful + state.failed + state.inconclusive
    return "Successful" if results >= metric.count else "Running"


def _overall(metrics: Sequence[MetricStatus]) -> tuple[str, str]:
    for verdict in AT_ONCE:
        if found := [m for m in metrics if m.phase == verdict]:
            return verdict, _decided(found[0])
    if running := [m for m in metrics if m.phase == "Running"]:
        return "Running", "; ".join(f"{m.name}: {_counted(m)}" for m in running)
    if found := [m for m in metrics if m.phase == "Inconclusive"]:
        return "Inconclusive", _decided(found[0])
    return "Successful", "; ".join(f"{m.name}: {_last(m)}" for m in metrics)


def _counted(state: MetricStatus) -> str:
    if not state.measurements:
        return "not measured yet"
    return f"{taken(state)} measured, the last: {_last(state)}"


def _last(state: MetricStatus) -> str:
    newest = state.measurements[0]
    return f"{newest.value or 'no value'} ({newest.phase})" + (
        f": {newest.message}" if newest.message else ""
    )


def _decided(state: MetricStatus) -> str:
    """The measurement that a metric was decided by: the newest of its verdict."""
    by = next((m for m in state.measurements if m.phase == state.phase), state.measurements[0])
    counts = {
        "Failed": state.failed,
        "Inconclusive": state.inconclusive,
        "Error": state.consecutive_errors,
    }
    return f"metric {state.name}, measurement {by.number} ({counts[state.phase]} {state.phase}): {by.message}"
