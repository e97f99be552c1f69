"""Tokens: an order that changes is newer than any that stands anywhere; one that does not is the
very same; and restarts since.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotweights_crds.nodeweights import MAX_TOKEN, EngineStatus, PodAssignment, RolloutAssignment
from hotweights_operator.model import fencing
from hotweights_operator.model.objects import NodeState
from tests.operator.worlds import NEW, OLD, engine, order, state


def node(
    own: PodAssignment | None, other: PodAssignment | None = None, said: EngineStatus | None = None
) -> NodeState:
    """A node where the rollout `r` has this order for p0, and another entry that one."""
    known = state("n0", [said] if said else [])
    entries = [
        RolloutAssignment(uid=uid, pods=[given])
        for uid, given in (("r", own), ("other", other))
        if given is not None
    ]
    return replace(known, spec=known.spec.model_copy(update={"rollouts": entries}))


def following(
    known: NodeState, digest: str, restarts: int = 0, prepare: str = "", **more: Any
) -> PodAssignment:
    """What is written for this digest."""
    return fencing.next_token(
        known, restarts, order("p0", digest, token=0, prepare=prepare, **more), "r"
    )


def test_what_does_not_change_keeps_its_token() -> None:
    assert following(node(order("p0", OLD, token=7)), OLD).token == 7
    assert following(node(order("p0", OLD, token=7)), NEW).token == 8


@pytest.mark.parametrize("digest", [OLD, NEW])
def test_what_another_entry_said_since_is_overruled(digest: str) -> None:
    assert following(node(order("p0", OLD, token=7), order("p0", OLD, token=9)), digest).token == 10


@pytest.mark.parametrize("own", [None, order("p0", OLD, token=2)])
def test_after_the_object_was_lost_the_engine_s_answer_counts(own: PodAssignment | None) -> None:
    assert following(node(own, said=engine(0, token=41)), OLD).token == 42


def test_a_token_fits_the_schema_whatever_an_engine_says() -> None:
    assert following(node(None, said=engine(0, token=MAX_TOKEN)), NEW).token == MAX_TOKEN


def test_a_first_order_has_a_token() -> None:
    assert following(node(None), OLD).token == 1
    assert following(node(order("p0", OLD, token=0)), OLD).token == 1


def test_restarts_count_from_an_order_until_the_next_one() -> None:
    asked = node(order("p0", OLD, token=7, prepare=NEW, restarts=2))
    assert following(asked, OLD, 5, NEW).restarts == 2, "it is the same"
    assert following(asked, OLD, 5, "").restarts == 2, (
        "taking back what was to be prepared is no order"
    )
    assert following(asked, NEW, 5).restarts == 5
    ended = following(asked, OLD, 5, "", ended_preparing=1)
    assert (ended.restarts, ended.token) == (5, 7), (
        "what ended meanwhile is counted, and counted once"
    )
    forgiven = fencing.next_token(asked, 5, order("p0", OLD, token=0), "r", counts_anew=True)
    assert (forgiven.restarts, forgiven.token) == (5, 7)
    once_more = fencing.next_token(asked, 5, order("p0", OLD, token=0), "r", asks_anew=True)
    assert (once_more.restarts, once_more.token) == (2, 8)
    idle = node(order("p0", OLD, token=7, prepare="", restarts=2))
    assert following(idle, OLD, 5, NEW).restarts == 5, (
        "what ended before says nothing about what it is asked now"
    )


TOKENS = st.integers(0, 50)


@given(
    own=TOKENS,
    other=TOKENS,
    said=TOKENS,
    old=st.sampled_from((OLD, NEW)),
    new=st.sampled_from((OLD, NEW)),
)
def test_an_order_is_the_newest_or_the_very_same(
    own: int, other: int, said: int, old: str, new: str
) -> None:
    known = node(order("p0", old, token=own), order("p0", OLD, token=other), engine(0, token=said))
    highest = max(own, other, said)
    assert following(known, new).token == (
        own if old == new and own == highest > 0 else highest + 1
    )
