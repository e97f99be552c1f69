"""The table of what a failure leaves behind: docs/vllm.md shows what is played, and every row is one
that can be told apart.
"""

from __future__ import annotations

from e2e.engine.failures.table import FAILURES, PAGE, Outcome, page


def test_the_page_shows_the_table_that_is_played() -> None:
    assert PAGE.read_text() == page(), "write it anew: python -m e2e.engine.failures.table"


def test_no_row_is_there_twice_and_each_breaks_something() -> None:
    assert len({failure.name for failure in FAILURES}) == len(FAILURES)
    assert all(failure.orders or failure.by_agent for failure in FAILURES)


def test_an_answer_has_a_reason_and_no_answer_has_none() -> None:
    for failure in FAILURES:
        answers = "{}" in failure.outcome.value[0]
        assert answers == bool(failure.reason) or failure.outcome is Outcome.ENDED, failure.name
