"""Frames from processes that we do not trust: what is decoded can be counted on."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotweights_transports.handoff import frames

NUMBERS = [
    (cls, f.name, str(f.type))
    for cls in (
        frames.Hello,
        frames.State,
        frames.Prepared,
        frames.Committed,
        frames.CommitFailed,
        frames.Kept,
        frames.Pong,
    )
    for f in dataclasses.fields(cls)
    if str(f.type) in ("int", "float")
]
HUGE = (
    "1" + "0" * 30,
    "9007199254740992",
    "-1e400",
    "1e400",
    "NaN",
    "Infinity",
    "-Infinity",
    "1" + "0" * 400,
)
NOT_INTS = ("-1", "1.5", "true", "null", '"1"', "[]")


@pytest.mark.parametrize(
    ("cls", "name", "kind"), NUMBERS, ids=lambda value: str(getattr(value, "op", value))
)
def test_a_number_that_cannot_be_meant_is_no_frame(
    cls: type[frames.Frame], name: str, kind: str
) -> None:
    for text in HUGE + (NOT_INTS if kind == "int" else ("true", "null", '"1"')):
        with pytest.raises(frames.WireError, match=f"{cls.op}.{name} is no {kind}"):
            frames.decode(f'{{"op":"{cls.op}","{name}":{text}}}'.encode())


def test_the_largest_number_passes() -> None:
    frame = frames.Committed(frames.MAX_NUMBER, commit_token=frames.MAX_NUMBER, pause_seconds=0.0)
    assert frames.decode(frames.encode(frame)) == frame


def test_numbers_within_lists_and_tables_are_looked_at_too() -> None:
    for body in ('"protocols":[1,1e30]', f'"protocols":[{10**30}]'):
        with pytest.raises(frames.WireError):
            frames.decode(f'{{"op":"hello",{body}}}'.encode())
    with pytest.raises(frames.WireError):
        frames.decode(b'{"op":"committed","timings":{"copy":NaN}}')


def test_more_digits_than_python_reads_are_no_frame() -> None:
    with pytest.raises(frames.WireError):
        frames.decode(b'{"op":"hello","commit_token":' + b"9" * 10000 + b"}")


@given(
    st.sampled_from(["hello", "state", "committed", "prepared"]),
    st.dictionaries(
        st.sampled_from(
            [
                "commit_token",
                "id",
                "rank",
                "world_size",
                "pause_seconds",
                "nbytes",
                "seconds",
                "state",
            ]
        ),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    ),
)
def test_whatever_comes_is_refused_or_bounded(op: str, fields: dict[str, object]) -> None:
    try:
        frame = frames.decode(json.dumps({"op": op, **fields}).encode())
    except frames.WireError:
        return
    for f in dataclasses.fields(frame):
        value = getattr(frame, f.name)
        if str(f.type) == "int":
            assert type(value) is int
            assert 0 <= value <= frames.MAX_NUMBER
        elif str(f.type) == "float":
            assert abs(value) <= frames.MAX_NUMBER
