"""What measurements say: limits, no data, errors, and which one is due."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotweights_crds.analysis import MAX_MEASUREMENTS, AnalysisStatus, Metric
from hotweights_operator.decide.analysis import judge
from hotweights_operator.model.measurements import Reading

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
BEGUN = AnalysisStatus(phase="Running", revision=2, step=1, started_at="2026-01-01T12:00:00Z")
ERROR, NOTHING = "error", None
Given = float | str | bool | None


def metric(name: str = "errors", **fields: Any) -> Metric:
    plain = {"http": {"url": "http://a"}, "successCondition": "result < 0.05"}
    given = {key: value for key, value in {**plain, **fields}.items() if value is not None}
    return Metric.from_dict({"name": name, **given})


def reading(value: Given, at: datetime = NOW) -> Reading:
    return Reading(at, error="nobody answers") if value == ERROR else Reading(at, value)


def played(
    metrics: Sequence[Metric], *values: Given, status: AnalysisStatus = BEGUN
) -> AnalysisStatus:
    """What comes of these values, one after the other, of every metric."""
    for number, value in enumerate(values, 1):
        status = judge.judge(
            status,
            metrics,
            lambda m, n, number=number, value=value: reading(value) if n == number else None,  # type: ignore[misc]
            NOW,
        )
    return status


TABLE: dict[str, tuple[dict[str, Any], list[Given], str, str]] = {
    "one success": ({}, [0.01], "Successful", "0.01"),
    "one failure": ({}, [0.07], "Failed", "0.07 does not satisfy result < 0.05"),
    "a failure within the limit": (
        {"count": 3, "failureLimit": 1},
        [0.07, 0.01, 0.01],
        "Successful",
        "0.01",
    ),
    "one more": ({"count": 3, "failureLimit": 1}, [0.07, 0.01, 0.07], "Failed", "measurement 3"),
    "it is over before count": ({"count": 5}, [0.01, 0.07], "Failed", "measurement 2"),
    "it goes on": ({"count": 3}, [0.01, 0.01], "Running", "2 measured, the last: 0.01"),
    "nothing was measured": ({}, [], "Running", "errors: not measured yet"),
    "an error is no result": ({}, [ERROR, ERROR, 0.01], "Successful", "0.01"),
    "errors in a row": ({}, [ERROR] * 5, "Error", "(5 Error): nobody answers"),
    "not quite in a row": (
        {"count": 2},
        [*[ERROR] * 4, 0.01, *[ERROR] * 4],
        "Running",
        "9 measured",
    ),
    "no error is allowed": ({"consecutiveErrorLimit": 0}, [ERROR], "Error", "nobody answers"),
    "NaN is an error": ({"consecutiveErrorLimit": 0}, [math.nan], "Error", "no data"),
    "no value is an error": ({"consecutiveErrorLimit": 0}, [NOTHING], "Error", "no data"),
    "NaN as a success": ({"onNoData": "Success"}, [math.nan], "Successful", "NaN (Successful)"),
    "nothing as inconclusive": ({"onNoData": "Inconclusive"}, [NOTHING], "Inconclusive", "no data"),
    "infinity is a value": ({}, [math.inf], "Failed", "inf does not satisfy"),
    "a failureCondition alone": (
        {"successCondition": None, "failureCondition": "result >= 0.1"},
        [0.01],
        "Successful",
        "0.01",
    ),
    "it is met": (
        {"failureCondition": "result >= 0.1"},
        [0.2],
        "Failed",
        "0.2 satisfies the failureCondition result >= 0.1",
    ),
    "both are met": ({"failureCondition": "result < 0.1"}, [0.01], "Failed", "failureCondition"),
    "neither is met": (
        {"failureCondition": "result >= 0.1"},
        [0.07],
        "Inconclusive",
        "0.07 satisfies neither result < 0.05 nor result >= 0.1",
    ),
    "inconclusive within the limit": (
        {"failureCondition": "result >= 0.1", "count": 2, "inconclusiveLimit": 1},
        [0.07, 0.01],
        "Successful",
        "0.01",
    ),
    "a text where a number is meant": (
        {"consecutiveErrorLimit": 0},
        ["fast"],
        "Error",
        'the result is the text "fast"',
    ),
    "a text that is meant": ({"successCondition": 'result == "ok"'}, ["ok"], "Successful", '"ok"'),
    "a Job that is complete": (
        {"http": None, "job": {"spec": {}}, "successCondition": None},
        [True],
        "Successful",
        "true",
    ),
    "a Job that failed": (
        {"http": None, "job": {"spec": {}}, "successCondition": None},
        [False],
        "Failed",
        "false does not satisfy",
    ),
    "the golden probe": (
        {"http": None, "goldenProbe": {}, "successCondition": None},
        [0.5],
        "Failed",
        "0.5 does not satisfy result >= 1",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_what_measurements_say(name: str) -> None:
    fields, values, phase, said = TABLE[name]
    found = [metric(**fields)]
    status = played(found, *values) if values else judge.judge(BEGUN, found, lambda *_: None, NOW)
    assert status.phase == phase
    assert said in status.message
    assert "errors" in status.message


def test_one_failure_ends_all() -> None:
    both = [metric("a", count=5), metric("b")]
    status = judge.judge(BEGUN, both, lambda m, n: reading(1.0) if m.name == "b" else None, NOW)
    assert (status.phase, status.message[:8]) == ("Failed", "metric b")
    assert judge.due(status, both, NOW) == []


def test_what_is_inconclusive_lets_the_others_end_since_one_may_fail() -> None:
    unsure = metric("a", failureCondition="result >= 0.1")
    slow = metric("b", count=2)
    first = judge.judge(
        BEGUN, [unsure, slow], lambda m, n: reading(0.07 if m.name == "a" else 0.0), NOW
    )
    assert first.phase == "Running"
    assert [due.metric.name for due in judge.due(first, [unsure, slow], NOW)] == ["b"]
    good = judge.judge(first, [unsure, slow], lambda m, n: reading(0.0), NOW)
    bad = judge.judge(first, [unsure, slow], lambda m, n: reading(1.0), NOW)
    assert (good.phase, bad.phase) == ("Inconclusive", "Failed")
    assert good.message.startswith("metric a, measurement 1")


def test_an_error_goes_before_what_is_inconclusive_and_a_failure_before_both() -> None:
    metrics = [
        metric("a", failureCondition="result >= 0.1"),
        metric("b", consecutiveErrorLimit=0),
        metric("c"),
    ]
    values: dict[str, Given] = {"a": 0.07, "b": ERROR, "c": 1.0}
    all_three = judge.judge(BEGUN, metrics, lambda m, n: reading(values[m.name]), NOW)
    assert all_three.phase == "Failed"
    two = judge.judge(BEGUN, metrics[:2], lambda m, n: reading(values[m.name]), NOW)
    assert two.phase == "Error"


def test_what_was_decided_stays_so_whatever_is_read_or_edited() -> None:
    failed = played([metric()], 1.0)
    assert judge.judge(failed, [metric(failureLimit=0)], lambda *_: reading(0.0), NOW) == failed
    assert judge.judge(failed, [], lambda *_: None, NOW) == failed


def test_an_edit_keeps_what_was_counted_by_name() -> None:
    first = played([metric("a", count=3), metric("b", count=3)], 0.0)
    edited = judge.judge(first, [metric("a", count=2), metric("c", count=2)], lambda *_: None, NOW)
    assert [(m.name, m.successful) for m in edited.metrics] == [("a", 1), ("c", 0)]


def test_a_measurement_counts_once() -> None:
    """The next one is asked for by its number, so that a reading which lies there still is not
    taken again.
    """
    one = metric(count=3)
    first = judge.judge(BEGUN, [one], lambda m, n: reading(0.0) if n == 1 else None, NOW)
    again = judge.judge(first, [one], lambda m, n: reading(0.0) if n == 1 else None, NOW)
    assert again == first


# -- when ---------------------------------------------------------------------------------------


def test_the_first_comes_after_its_delay_and_the_next_after_the_interval() -> None:
    one = metric(count=3, initialDelaySeconds=30, intervalSeconds=20)
    (first,) = judge.due(BEGUN, [one], NOW + timedelta(seconds=10))
    assert (first.number, first.in_seconds) == (1, 20.0)
    (now,) = judge.due(BEGUN, [one], NOW + timedelta(seconds=31))
    assert now.in_seconds == 0.0
    late = NOW + timedelta(seconds=40)
    after = judge.judge(BEGUN, [one], lambda *_: reading(0.0, at=late), late)
    (second,) = judge.due(after, [one], late + timedelta(seconds=5))
    assert (second.number, second.in_seconds) == (2, 15.0)


def test_a_clock_that_was_ahead_delays_by_no_more_than_it_was_ahead() -> None:
    ahead = BEGUN.model_copy(update={"started_at": "2026-01-01T13:00:00Z"})
    (due,) = judge.due(ahead, [metric(initialDelaySeconds=30)], NOW)
    assert due.in_seconds == 30.0


# -- any course ---------------------------------------------------------------------------------

VALUES = st.one_of(st.sampled_from([0.0, 0.07, 1.0, math.nan, math.inf, None, ERROR, "text", True]))


@given(
    values=st.lists(VALUES, max_size=40),
    count=st.integers(1, 6),
    limit=st.integers(0, 5),
    unsure=st.integers(0, 5),
    errors=st.integers(0, 3),
    no_data=st.sampled_from(["Error", "Success", "Inconclusive"]),
)
def test_any_course_is_bounded_and_right(
    values: list[Given], count: int, limit: int, unsure: int, errors: int, no_data: str
) -> None:
    one = metric(
        count=count,
        failureLimit=limit,
        inconclusiveLimit=unsure,
        consecutiveErrorLimit=errors,
        onNoData=no_data,
        failureCondition="result >= 0.1",
    )
    status, taken = BEGUN, list[str]()
    for value in values:
        before = status
        status = judge.judge(status, [one], lambda *_, value=value: reading(value), NOW)
        if before.phase in judge.DECIDED:
            assert status == before
            break
        taken.append(status.metrics[0].measurements[0].phase)
    if not taken:
        return
    state = status.metrics[0]
    assert len(state.measurements) == min(len(taken), MAX_MEASUREMENTS)
    assert [m.number for m in state.measurements] == list(
        range(len(taken), len(taken) - len(state.measurements), -1)
    )
    assert judge.taken(state) == len(taken)
    row = 0
    for phase in taken:
        row = row + 1 if phase == "Error" else 0
    expected = (
        "Failed"
        if taken.count("Failed") > limit
        else "Error"
        if row > errors
        else "Inconclusive"
        if taken.count("Inconclusive") > unsure
        else "Successful"
        if len(taken) - taken.count("Error") >= count
        else "Running"
    )
    assert status.phase == expected
    # nothing is decided later than it could be
    assert (judge.due(status, [one], NOW) == []) == (expected != "Running")
    AnalysisStatus.from_dict(status.to_dict())
