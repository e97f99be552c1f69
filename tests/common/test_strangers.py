"""Who gives way when too many connect that have not proved who they are, and how much they have
written about them.
"""

from __future__ import annotations

import logging
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from hotweights_common.few_lines import FewLines
from hotweights_common.strangers import REFUSAL_SECONDS, REFUSALS_AT_ONCE, Strangers


def test_an_owner_takes_its_own_places_before_it_takes_others() -> None:
    strangers = Strangers[int](most=4, most_of_owner=2)
    assert [strangers.admit(n, "loud", 0.0) for n in range(3)] == [
        (True, None),
        (True, None),
        (True, 0),
    ]
    assert strangers.admit(10, "quiet", 0.0) == (True, None)
    assert strangers.admit(11, "other", 0.0) == (True, None)
    assert strangers.admit(12, "another", 0.0) == (True, 1), "the oldest of the loudest"


def test_whose_token_is_being_reviewed_stays() -> None:
    strangers = Strangers[int](most=2, most_of_owner=2)
    strangers.admit(1, "a", 0.0)
    strangers.admit(2, "a", 0.0)
    strangers.said_hello(1)
    assert strangers.admit(3, "a", 0.0) == (True, 2)
    strangers.said_hello(3)
    assert strangers.admit(4, "a", 0.0) == (False, None)
    strangers.refused(1, 0.0)
    assert strangers.admit(4, "a", 0.0) == (True, 1), "it was reviewed"
    strangers.leave(3)
    assert strangers.admit(5, "a", 0.0) == (True, None)


def test_an_owner_whose_tokens_are_refused_again_and_again_waits() -> None:
    strangers = Strangers[int](most=4, most_of_owner=4)
    numbers = count()

    def knocks(owner: str, now: float) -> bool:
        number = next(numbers)
        strangers.admit(number, owner, now)
        is_reviewed = strangers.may_be_reviewed(number, now)
        if is_reviewed:
            strangers.refused(number, now)
        strangers.leave(number)
        return is_reviewed

    assert sum(knocks("stranger", 0.0) for _ in range(100)) == REFUSALS_AT_ONCE
    assert knocks("agent", 0.0)
    assert not strangers.may_be_reviewed(-1, 0.0), "it has left already"
    assert strangers.admit(-1, "stranger", 0.0) == (False, None), "it would not be looked at"
    # from then on one for each time that a refusal is held against it
    assert sum(knocks("stranger", 0.1 * n * REFUSAL_SECONDS) for n in range(1, 101)) == 10


def test_whoever_was_let_in_from_there_is_heard_whatever_else_comes_from_there() -> None:
    strangers = Strangers[int](most=4, most_of_owner=4)
    strangers.admit(0, "shared", 0.0)
    strangers.accepted(0)
    for _ in range(2 * REFUSALS_AT_ONCE):
        strangers.refused(0, 0.0)
    assert strangers.admit(1, "shared", 0.0) == (True, None)
    assert not strangers.may_be_reviewed(1, 0.0)


@given(
    most=st.integers(1, 6),
    most_of_owner=st.integers(1, 6),
    steps=st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60),
)
def test_there_are_never_more_than_there_may_be(
    most: int, most_of_owner: int, steps: list[tuple[str, bool]]
) -> None:
    strangers = Strangers[int](most, most_of_owner)
    here: dict[int, str] = {}
    for number, (owner, says_hello) in enumerate(steps):
        stays, leaves = strangers.admit(number, owner, 0.0)
        if leaves is not None:
            del here[leaves]
        if stays:
            here[number] = owner
        if says_hello:
            strangers.said_hello(number)
        assert len(strangers) == len(here) <= most
        assert all(list(here.values()).count(of) <= most_of_owner for of in "abc")


def test_of_each_kind_only_some_lines_a_minute() -> None:
    now = 0.0
    few = FewLines(most=2, seconds=60.0, clock=lambda: now)

    def shown(text: str) -> str | None:
        record = logging.LogRecord("x", logging.WARNING, "", 0, text, ("stranger",), None)
        return record.getMessage() if few.filter(record) else None

    assert [shown("%s knocks") for _ in range(4)] == [
        "stranger knocks",
        "stranger knocks (and no more of these for a while)",
        None,
        None,
    ]
    assert shown("%s is refused") == "stranger is refused"
    now = 60.0
    assert shown("%s knocks") == "stranger knocks"
