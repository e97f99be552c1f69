"""Headers: what is refused, with what and where; and that the library accepts whatever we
accept.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotweights_planner.errors import BadCheckpoint
from hotweights_planner.header import (
    BITS_OF_DTYPE,
    MAX_HEADER_NBYTES,
    header_nbytes,
    parse_header,
    tensor_nbytes,
)

safetensors = pytest.importorskip("safetensors")


def file_of(header: bytes, data_nbytes: int) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(data_nbytes)


def read(content: bytes) -> Any:
    nbytes = header_nbytes(content[:8], len(content), "f")
    return parse_header(content[8 : 8 + nbytes], len(content), "f")


def entry(
    begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8"
) -> dict[str, object]:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def library_accepts(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return False
    return True


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    content = file_of(
        json.dumps(
            {"b": entry(4, 10), "a": entry(0, 4), "__metadata__": {"format": "pt"}}
        ).encode(),
        10,
    )
    found = read(content)
    assert [(tensor.name, tensor.nbytes) for tensor in found] == [("a", 4), ("b", 6)]
    assert found[0].offset == len(content) - 10
    assert library_accepts(content)


@pytest.mark.parametrize(
    ("prefix", "file_nbytes", "what"),
    [
        (b"", 0, "truncated"),
        (b"\x00" * 7, 7, "truncated"),
        ((10**9).to_bytes(8, "little"), 2 * 10**9, "claims a header of 1000000000 bytes"),
        ((2**64 - 1).to_bytes(8, "little"), 100, "claims a header"),
        ((100).to_bytes(8, "little"), 50, "truncated: the header ends at byte 108 of 50"),
        ((1).to_bytes(8, "little"), 50, "a header of 1 bytes cannot be"),
    ],
)
def test_a_length_is_judged_before_anything_is_read(
    prefix: bytes, file_nbytes: int, what: str
) -> None:
    with pytest.raises(BadCheckpoint, match=f"^w: {what}"):
        header_nbytes(prefix, file_nbytes, "w")


def test_the_largest_header_is_read() -> None:
    assert header_nbytes(MAX_HEADER_NBYTES.to_bytes(8, "little"), 1 << 40, "w") == MAX_HEADER_NBYTES


REFUSED = {
    "twice": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
              1, "'a' stands twice"),
    "twice inside": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', 1, "'dtype' stands twice"),
    "not JSON": (b'{"a":', 0, "not JSON"),
    "not an object": (b"[1,2]", 0, "does not begin with"),
    "not UTF-8": (b'{"\xff":1}', 0, "not UTF-8"),
    "nested": (b'{"a":' + b"[" * 100_000, 0, "nested too deeply"),
    "NaN": (b'{"a":NaN}', 0, "NaN"),
    "long number": (b'{"a":' + b"9" * 5000 + b"}", 0, "5000 digits"),
    "metadata": (b'{"__metadata__":{"a":1}}', 0, "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_text_that_is_refused(case: str) -> None:
    header, data_nbytes, what = REFUSED[case]
    with pytest.raises(BadCheckpoint, match=what) as caught:
        read(file_of(header, data_nbytes))
    assert caught.value.where == "f"


@pytest.mark.parametrize(
    ("tensors", "data_nbytes", "what"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "a and b overlap by 2"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "overlap by 4"),
        ({"a": entry(0, 4), "b": entry(6, 8)}, 8, "hole of 2 bytes between tensors a and b"),
        ({"a": entry(1, 4)}, 4, "hole of 1 bytes before tensor a"),
        ({"a": entry(0, 8)}, 4, "truncated or out of range"),
        ({"a": entry(0, 4)}, 5, "1 bytes after the last tensor"),
        ({}, 3, "3 bytes after the last tensor"),
        ({"a": entry(0, 4, [2])}, 4, "is 2 bytes, data_offsets span 4"),
        ({"a": entry(0, 4, [4], "F32")}, 4, "is 16 bytes"),
        ({"a": entry(4, 0, [4])}, 4, "span -4"),
        ({"a": entry(0, 4, [2**40, 2**40, 0])}, 0, "overflows"),
        ({"a": entry(0, 4, [2**62, 2**62])}, 4, "overflows"),
        ({"a": entry(0, 4, [-4])}, 4, "shape"),
        ({"a": entry(0, 4, [2**64])}, 4, "shape"),
        ({"a": entry(0, 4) | {"shape": [4.0]}}, 4, "shape"),
        ({"a": entry(0, 1) | {"shape": [True]}}, 1, "shape"),
        ({"a": entry(0, 4) | {"shape": "4"}}, 4, "shape"),
        ({"a": entry(0, 1, [1] * 40)}, 1, "shape"),
        ({"a": entry(0, 4) | {"data_offsets": [0]}}, 4, "two offsets"),
        ({"a": entry(0, 4) | {"data_offsets": [0, "4"]}}, 4, "two offsets"),
        ({"a": entry(0, 4) | {"more": 1}}, 4, "nothing else"),
        ({"a": {"dtype": "U8"}}, 4, "needs dtype, shape"),
        ({"a": 1}, 4, "needs dtype, shape"),
        ({"a": entry(0, 4, [4], "Q4_K")}, 4, "unknown dtype 'Q4_K'"),
        ({"a": entry(0, 4) | {"dtype": 1}}, 4, "unknown dtype 1"),
        ({"a": entry(0, 1, [1], "F4")}, 1, "no whole number of bytes"),
        ({"../../etc/passwd": entry(0, 4)}, 4, "looks like a path"),
        ({"/etc/passwd": entry(0, 4)}, 4, "looks like a path"),
        ({"a/../b": entry(0, 4)}, 4, "looks like a path"),
        ({"a/..": entry(0, 4)}, 4, "looks like a path"),
        ({".hidden": entry(0, 4)}, 4, "looks like a path"),
        ({"a\\b": entry(0, 4)}, 4, "looks like a path"),
        ({"a\nb": entry(0, 4)}, 4, "unprintable"),
        ({"a\u202eb": entry(0, 4)}, 4, "unprintable"),
        ({"\ud800": entry(0, 4)}, 4, "unprintable"),
        ({"": entry(0, 4)}, 4, "is empty"),
        ({"é" * 300: entry(0, 4)}, 4, "longer than 512 bytes"),
    ],
)
def test_tensors_that_are_refused(tensors: dict[str, object], data_nbytes: int, what: str) -> None:
    with pytest.raises(BadCheckpoint, match=what) as caught:
        read(file_of(json.dumps(tensors).encode(), data_nbytes))
    assert caught.value.remedy


def test_too_many_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotweights_planner.header.MAX_FILE_TENSORS", 3)
    with pytest.raises(BadCheckpoint, match="4 tensors; at most 3"):
        read(file_of(json.dumps({f"t{index}": entry(0, 0) for index in range(4)}).encode(), 0))


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20),
        st.tuples(st.sampled_from(sorted(BITS_OF_DTYPE)), st.lists(st.integers(0, 5), max_size=4)),
        max_size=6,
    ),
    st.integers(0, 8),
)
def test_what_we_accept_the_library_accepts(
    tensors: dict[str, tuple[str, list[int]]], padding: int
) -> None:
    fields: dict[str, object] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = tensor_nbytes(dtype, shape) or 0
        fields[name] = entry(end, end + nbytes, shape, dtype)
        end += nbytes
    content = file_of(json.dumps(fields).encode() + b" " * padding, end)
    try:
        found = read(content)
    except BadCheckpoint:
        return
    assert {tensor.name for tensor in found} == set(tensors)
    assert library_accepts(content)


VALID = file_of(
    json.dumps(
        {
            "a": entry(0, 8, [2], "F32"),
            "b.c": entry(8, 12, [2, 2], "U8"),
            "__metadata__": {"k": "v"},
        }
    ).encode(),
    12,
)


@given(
    st.lists(
        st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4
    ),
    st.integers(0, 20),
)
def test_a_damaged_file_is_refused_or_sound(flips: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(VALID)
    for at, value in flips:
        content[at] = value
    damaged = bytes(content[: len(content) - cut])
    try:
        found = read(damaged)
    except BadCheckpoint:
        return
    assert library_accepts(damaged)
    assert (
        sum(tensor.nbytes for tensor in found) == len(damaged) - found[0].offset if found else True
    )


@given(st.binary(max_size=200))
def test_noise_is_refused_in_words(noise: bytes) -> None:
    with pytest.raises(BadCheckpoint):
        parse_header(b"{" + noise + b"\x00", 300, "f")
