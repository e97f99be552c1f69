"""What a seed stands for: the same rounds each time, and all that can happen soon."""

from __future__ import annotations

import itertools

import pytest

from e2e.chaos.play import ENOUGH, Row
from e2e.chaos.rounds import (
    BEGIN_REPLICAS,
    BEGIN_VERSION,
    MAX_DELAY_SECONDS,
    MAX_FAULT_SECONDS,
    MIN_FAULT_SECONDS,
    REPLICAS,
    Change,
    Fault,
    choose,
    other,
)

SEEDS = range(20)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_is_the_same_rounds_and_more_begin_with_them(seed: int) -> None:
    assert choose(seed, 200) == choose(seed, 200)
    assert choose(seed, 200)[:6] == choose(seed, 6)
    assert choose(seed, 20) != choose(seed + 1, 20)


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_happens_soon(seed: int) -> None:
    rounds = choose(seed, 200)
    assert {each.change for each in rounds[:4]} == set(Change)
    assert {each.fault for each in rounds[:10]} == set(Fault)
    for change in Change:
        both = {each.is_fault_first for each in rounds if each.change is change}
        assert both == {True, False}, f"{change} always comes on the same side of the fault"


def test_every_change_meets_every_fault() -> None:
    met = {(each.change, each.fault) for seed in SEEDS for each in choose(seed, 200)}
    assert met == set(itertools.product(Change, Fault))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_round_ends_as_its_change_says(seed: int) -> None:
    version, replicas = BEGIN_VERSION, BEGIN_REPLICAS
    for number, each in enumerate(choose(seed, 200), start=1):
        assert each.number == number
        assert each.version == (other(version) if each.change is Change.FLIP else version)
        assert (each.replicas != replicas) == (each.change is Change.SCALE)
        assert each.replicas in REPLICAS
        assert 0 <= each.delay_seconds <= MAX_DELAY_SECONDS
        assert MIN_FAULT_SECONDS <= each.fault_seconds <= MAX_FAULT_SECONDS
        version, replicas = each.version, each.replicas


def test_a_round_that_showed_little_or_took_too_long_is_a_failed_one() -> None:
    (planned, *_) = (each for each in choose(1, 200) if each.harms_nobody)
    assert Row(planned, 1, seconds=3.0, compared=ENOUGH).problems() == []
    assert "only 9 statements" in Row(planned, 1, seconds=3.0, compared=ENOUGH - 1).problems()[0]
    slow = Row(planned, 1, compared=ENOUGH, lacking=["1 pods, not 2"])
    assert slow.problems() == ["not within 300 s: 1 pods, not 2"]
    lied = Row(planned, 1, seconds=3.0, compared=ENOUGH, false=["llm-0 lied"])
    assert lied.problems() == ["false: llm-0 lied"]


def test_requests_may_fail_only_where_engines_end_or_are_cut_off() -> None:
    for planned in choose(1, 200):
        row = Row(planned, 1, seconds=3.0, compared=ENOUGH, failed=["connection refused"])
        ends = planned.change in (Change.SCALE, Change.DELETE_POD)
        cut = planned.fault in (Fault.KILL_ENGINE, Fault.CUT_NODE)
        assert bool(row.problems()) == (not ends and not cut)
