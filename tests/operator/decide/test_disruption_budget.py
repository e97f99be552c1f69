"""How many pods may be of no service at once: arithmetic, and who counts."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from hotweights_crds.weightrollout import Strategy
from hotweights_operator.decide import disruption_budget
from hotweights_operator.decide.rollouts import decide
from tests.operator.worlds import (
    AT_NEW,
    NEW,
    NOW,
    OLD,
    Fields,
    engine,
    order,
    pod,
    prepared,
    rollout,
    state,
    told_to_change,
    world,
)

PASSED: Fields = {**AT_NEW, "preparedRevision": 2}


def rolling(most: int | str) -> Fields:
    """At most so many at once."""
    return {"strategy": {"type": "Rolling", "rolling": {"maxUnavailable": most}}}


@pytest.mark.parametrize(
    ("most", "desired", "expected"),
    [("10%", 19, 1), ("10%", 20, 2), ("99%", 1, 1), ("100%", 7, 7), (3, 2, 3)],
)
def test_a_percentage_is_rounded_down_but_not_to_nothing(
    most: int | str, desired: int, expected: int
) -> None:
    assert (
        disruption_budget.limit(Strategy.from_dict(rolling(most)["strategy"]), desired) == expected
    )


def looping(number: int) -> Any:
    """A pod that ends again and again with what it was told in an earlier revision, since just
    now.
    """
    return pod(number, ready=False, gate=False, restarts=3, last_run_seconds=5.0)


def loops(number: int) -> Any:
    """What it is told."""
    return order(f"p{number}", OLD, prepare="", revision=1)


def test_a_pod_that_still_looks_well_though_its_engine_starts_again_costs_the_budget() -> None:
    engines = [engine(0, "", phase="Booting"), *prepared(2)[1:]]
    seen = world([pod(0, shows=NEW), pod(1)], [state("n0", engines, {"p0": NEW, "p1": OLD})])
    assert told_to_change(decide(rollout(PASSED), seen, NOW)) == set()


def test_a_crash_loop_is_left_out_at_once() -> None:
    engines = [engine(0, "", phase="Booting"), *prepared(3)[1:]]
    given = {"p0": loops(0), "p1": OLD, "p2": OLD}
    seen = world([looping(0), pod(1), pod(2)], [state("n0", engines, given)], clock=lambda: NOW)
    assert told_to_change(decide(rollout(PASSED), seen, NOW + timedelta(seconds=60))) & {
        "p1",
        "p2",
    } == {"p1"}


def test_a_pod_of_too_short_service_is_not_what_the_last_one_leans_on() -> None:
    seconds, began = 30, NOW - timedelta(seconds=20)
    now = began
    engines = [
        engine(0, NEW),
        engine(1, phase="Prepared", prepared=NEW),
        engine(2, "", phase="Booting"),
    ]
    given = {"p0": NEW, "p1": OLD, "p2": loops(2)}
    seen = world([pod(1), looping(2)], [state("n0", engines, given)], clock=lambda: now)
    now = NOW
    seen.put("pod", "p0", pod(0, shows=NEW, gate_since=NOW, ready_since=NOW))
    slow = rollout(PASSED, minReadySeconds=seconds, **rolling(2))
    assert "p1" not in told_to_change(decide(slow, seen, NOW + timedelta(seconds=15)))
    assert "p1" in told_to_change(decide(slow, seen, NOW + timedelta(seconds=30)))


def test_one_is_left_however_large_the_budget_is() -> None:
    engines = [*prepared(3), engine(3, "", phase="Booting")]
    given = {**{f"p{n}": OLD for n in range(3)}, "p3": loops(3)}
    seen = world([*(pod(n) for n in range(3)), looping(3)], [state("n0", engines, given)])
    changed = told_to_change(decide(rollout(PASSED, **rolling(3)), seen, NOW)) & {"p0", "p1", "p2"}
    assert changed == {"p0", "p1"}


def test_it_is_looked_at_again_when_the_first_has_been_of_service_for_long_enough() -> None:
    since = NOW - timedelta(seconds=20)
    seen = world(
        [pod(n) for n in (0, 1)],
        [state("n0", prepared(2), {"p0": OLD, "p1": OLD})],
        clock=lambda: since,
    )
    decision = decide(rollout(PASSED, minReadySeconds=30), seen, NOW)
    assert told_to_change(decision) == set()
    assert decision.again_in_seconds == pytest.approx(10.0)
