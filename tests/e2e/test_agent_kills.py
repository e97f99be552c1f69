"""What counts as a kill that was not survived."""

from __future__ import annotations

import dataclasses

import pytest

from e2e.agent_kills import Result, Row

ROW = Row(1, "node-0", 2, 7.0, 12.0, 0.0, 1 << 29, 48, 0)
GOOD = Result([ROW], 300, 900, 0, [])


def test_nothing_is_wrong_with_one_that_nobody_noticed() -> None:
    assert GOOD.problems() == []


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (dataclasses.replace(GOOD, oom_kills=1), "1 processes ended for want of memory"),
        (dataclasses.replace(GOOD, unready=["pod-a"]), "pod pod-a was not Ready"),
        (
            dataclasses.replace(GOOD, rows=[dataclasses.replace(ROW, fetched_nbytes=4096.0)]),
            "kill 1: 4096 bytes were fetched again",
        ),
        (
            dataclasses.replace(GOOD, rows=[dataclasses.replace(ROW, failed=3)]),
            "kill 1: 3 requests failed",
        ),
        (
            dataclasses.replace(GOOD, rows=[dataclasses.replace(ROW, requests=0)]),
            "kill 1: nobody asked the pods anything",
        ),
    ],
)
def test_each_fault_is_named(result: Result, problem: str) -> None:
    assert result.problems() == [problem]
