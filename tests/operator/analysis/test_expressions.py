"""Conditions: what is one, what it says, and that schema and operator read the same grammar."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hotweights_crds.analysis import CONDITION_PATTERN
from hotweights_operator.decide.analysis.expressions import (
    Incomparable,
    NotACondition,
    parse,
)

HOLDS: list[tuple[str, float | str | bool, bool]] = [
    ("result < 0.05", 0.04, True),
    ("result < 0.05", 0.05, False),
    ("result<=0.05", 0.05, True),
    ("result > -1e3", -999.0, True),
    ("result >= 0.99 && result <= 1.2", 1.0, True),
    ("result >= 0.99 && result <= 1.2", 1.3, False),
    ("result < 1 || result > 3", 2.0, False),
    ("result < 1 || result > 3", 4.0, True),
    # && binds tighter: (0 and 0) or 1
    ("result < 1 && result < 2 || result == 5", 5.0, True),
    ("result == 5 || result < 1 && result < 2", 5.0, True),
    ("result != 3", 3.0, False),
    ("  result  ==  1  ", 1.0, True),
    ('result == "ok"', "ok", True),
    ('result != "ok" && result != ""', "bad", True),
    ("result == true", True, True),
    ("result != false", False, False),
    ("result < 1", float("inf"), False),
]


@pytest.mark.parametrize(("text", "value", "holds"), HOLDS)
def test_what_a_condition_says(text: str, value: float | str | bool, holds: bool) -> None:
    assert re.search(CONDITION_PATTERN, text)
    assert parse(text).holds(value) is holds


NONE = {
    "": "column 1",
    "value < 1": "column 1",
    "result": "column 1",
    "result < ": "column 1",
    "result < x": "column 1",
    "(result < 1)": "column 1",
    "!result == true": "column 1",
    "result < 1 &&": "at column 14 there should be a comparison",
    "result < 1 & result > 0": "at column 11 there should be && or ||",
    "result < 1; import os": "at column 11",
    "result < 1 result": "at column 11",
    'result < "a"': "< is for numbers",
    "result >= true": ">= is for numbers",
    "result == 'ok'": "column 1",
    "result < 1\n": "at column 11",
    "result == nan": "column 1",
}


@pytest.mark.parametrize("text", NONE)
def test_what_is_none_is_named_with_its_place(text: str) -> None:
    assert not re.search(CONDITION_PATTERN, text) or text.endswith("\n")
    with pytest.raises(NotACondition, match=re.escape(NONE[text])):
        parse(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("result == 1", True),
        ("result == 1", "1"),
        ("result == true", 1.0),
        ('result == "true"', True),
        ("result < 1", "0"),
        # found in the first measurement, though the other comparison decides
        ('result < 1 || result == "ok"', 0.5),
    ],
)
def test_kinds_are_not_taken_for_each_other(text: str, value: float | str | bool) -> None:
    with pytest.raises(Incomparable, match="the result is the"):
        parse(text).holds(value)


WORDS = ["result", " ", "<", "<=", "==", "!=", "&&", "||", "|", "1", "-", ".", "e", "5", '"', "a"]


@given(st.lists(st.sampled_from([*WORDS, "true", "\\", "(", "{{args.x}}"]), max_size=24))
@example(["result", "<", "1", "&&", "result", "!=", '"', "a", '"'])
def test_the_schema_takes_what_the_operator_reads_and_nothing_else(words: list[str]) -> None:
    text = "".join(words)
    # an argument is replaced before it is read; what it becomes is checked then
    plain = re.sub(r"\{\{args.x\}\}", "7", text)
    if plain != text and re.search(r"[0-9.e-]7|7[0-9.e]|\"[^\"]*7", plain):
        return
    try:
        parse(plain)
    except NotACondition:
        read = False
    else:
        read = True
    assert bool(re.search(CONDITION_PATTERN, text)) == read


@given(st.text(max_size=60))
def test_any_text_is_a_condition_or_says_where_it_is_none(text: str) -> None:
    with contextlib.suppress(NotACondition):
        parse(text)
