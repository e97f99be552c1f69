"""What counts as a swap that somebody noticed, and what as growth."""

from __future__ import annotations

import dataclasses
import json
import os
import socket

import pytest

from e2e.soak.footprint import Footprint, growth, least
from e2e.soak.play import Account, Row

HELD = Footprint(500 << 20, 4 << 20, 900, 60)


def _rows(*descriptors: int) -> list[Row]:
    return [
        Row(number, "sha256:a", 1.0, 0.1, {"server": dataclasses.replace(HELD, descriptors=count)})
        for number, count in enumerate(descriptors, 1)
    ]


def _account(*descriptors: int) -> Account:
    account = Account(_rows(*descriptors), requests=90)
    account.judged["sha256:a"] = 20
    return account


def test_nothing_is_wrong_with_swaps_that_nobody_noticed() -> None:
    assert _account(*[60] * 20).problems() == []


def test_it_is_written_as_json() -> None:
    written = json.loads(json.dumps(_account(*[60] * 20).to_json()))
    assert (written["judged"], written["problems"]) == ({"sha256:a": 20}, [])
    assert written["rows"][0]["footprints"]["server"] == dataclasses.asdict(HELD)


def test_each_fault_is_named() -> None:
    account = _account(*[60] * 20)
    account.failures.append("a: timed out")
    account.false.append("sha256:a is named, and the answer is [1]")
    assert account.problems() == ["a request failed: a: timed out", account.false[0]]
    account = _account(*[60] * 20)
    account.judged.clear()
    assert account.problems() == ["no answer of sha256:a was judged"]


def test_what_grows_with_every_swap_is_found_and_requests_under_way_are_not() -> None:
    leaking = _account(*range(60, 260))
    assert leaking.problems() == ["server: descriptors grew from 70 to 250"]
    busy = _account(*[60 + 30 * (number % 2) for number in range(200)])
    assert busy.problems() == []


def test_what_grows_before_it_has_settled_is_no_leak() -> None:
    assert _account(*range(0, 100, 10), *[100] * 10).problems() == []


@pytest.mark.parametrize("swaps", [1, 10, 11])
def test_of_a_few_swaps_nothing_is_said(swaps: int) -> None:
    account = _account(*range(0, 100 * swaps, 100))
    assert account.windows("server") == ([], [])
    assert account.problems() == []


@pytest.mark.parametrize("figure", [field.name for field in dataclasses.fields(Footprint)])
def test_each_figure_counts(figure: str) -> None:
    more = dataclasses.replace(HELD, **{figure: 2 * getattr(HELD, figure)})
    assert growth([HELD, more], [HELD, more]) == []
    (found,) = growth([HELD, more], [more, more])
    assert found.startswith(f"{figure} grew from {getattr(HELD, figure)} to ")
    assert least([more, HELD]) == HELD


def test_it_is_read_from_the_kernel() -> None:
    before = Footprint.of(os.getpid())
    with socket.socket(), socket.socket():
        during = Footprint.of(os.getpid())
    assert during.descriptors == before.descriptors + 2
    assert min(dataclasses.astuple(before)) > 0
