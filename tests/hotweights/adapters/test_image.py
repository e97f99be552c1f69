"""What an agent hands over is mapped only if every promise in it holds."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2e.engine import images
from hotweights.adapters.vllm.rank import table as tables
from hotweights.adapters.vllm.rank.image import Image
from hotweights.adapters.vllm.rank.table import (
    ITEM_BYTES,
    PAGE,
    TORCH_NAMES,
    ImageError,
    parse_table,
    torch_shape,
)
from hotweights_planner.header import BITS_OF_DTYPE, MAX_DIMENSIONS, TensorEntry, tensor_nbytes
from hotweights_planner.layout import Layout, lay_out, table_json
from hotweights_planner.manifest import build

DIGEST = "sha256:" + "0" * 64


def table(*tensors: dict[str, Any], **values: Any) -> bytes:
    return json.dumps(
        {"digest": DIGEST, "version": "v1", "tensors": list(tensors), **values}
    ).encode()


def tensor(**values: Any) -> dict[str, Any]:
    return {
        "name": "w",
        "dtype": "F32",
        "shape": [1024],
        "nbytes": 4096,
        "extents": [[0, 0, 4096]],
        **values,
    }


def opened(*fds: int, digest: str = DIGEST) -> Image:
    try:
        return Image.open(fds, digest)
    finally:
        for fd in fds:
            os.close(fd)


def test_a_tensor_in_many_extents_is_contiguous() -> None:
    data = os.urandom(5 * images.CHUNK + 123)
    built = images.build(
        [images.Tensor("a", "U8", [len(data)], data), images.Tensor("b", "U8", [3], b"xyz")]
    )
    image = Image.open(built.fds, built.digest)
    built.close()
    assert [bytes(image.view(entry)) for entry in image.table.entries] == [data, b"xyz"]
    assert len(image.table.entries[0].extents) == 6


def test_what_is_published_can_be_mapped() -> None:
    assert set(BITS_OF_DTYPE) == set(ITEM_BYTES) == set(TORCH_NAMES)
    assert tables.MAX_DIMENSIONS == MAX_DIMENSIONS
    for dtype in BITS_OF_DTYPE:
        nbytes = tensor_nbytes(dtype, (2, 4))
        text = table(tensor(dtype=dtype, shape=[2, 4], nbytes=nbytes, extents=[[0, 0, nbytes]]))
        assert parse_table(text, [4096]).entries[0].shape == (2, 4)


def test_two_float4_are_one_item_of_torch() -> None:
    assert torch_shape("F4", (3, 8)) == (3, 4)
    assert torch_shape("F8_E4M3", (3, 8)) == (3, 8)
    assert torch_shape("F4", ()) == ()


def test_the_mapping_outlives_the_image_as_long_as_a_view_does() -> None:
    built = images.build([images.Tensor("a", "U8", [4], b"abcd")])
    view = (lambda image: image.view(image.table.entries[0]))(Image.open(built.fds, built.digest))
    built.close()
    assert bytes(view) == b"abcd"


def test_what_nobody_reads_takes_no_page_tables() -> None:
    """The kernel enters 64 KiB or so around a page that is read, not the image."""
    nbytes = 8 << 20
    image = opened_of(images.Tensor("w", "U8", [nbytes], bytes(nbytes)))
    assert _mapped_nbytes(image) == 0
    assert image.view(image.table.entries[0])[nbytes // 2] == 0
    assert 0 < _mapped_nbytes(image) <= nbytes // 2
    image.populate()  # in kernels before 5.14 without effect
    assert _mapped_nbytes(image) == nbytes or _mapped_nbytes(image) <= nbytes // 2


def _mapped_nbytes(image: Image) -> int:
    """Bytes of its first tensor that this process has in its page tables (proc_pid_smaps(5))."""
    view = image.view(image.table.entries[0])
    begin = np.frombuffer(view, np.uint8).ctypes.data
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = begin <= int(bounds[1], 16) < int(bounds[2], 16) <= begin + len(view)
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


def test_what_is_written_into_a_tensor_stays_here_and_can_be_forgotten() -> None:
    """Memory that cannot be written would end the serving process."""
    built = images.build([images.Tensor("a", "U8", [4], b"abcd")])
    one, other = (Image.open(built.fds, built.digest) for _ in range(2))
    built.close()
    entry = one.table.entries[0]
    one.view(entry)[:2] = b"XY"
    assert bytes(one.view(entry)) == b"XYcd"
    assert bytes(other.view(entry)) == b"abcd"
    one._lent = True  # as `tensors` notes it, which needs torch
    one.restore()
    assert bytes(one.view(entry)) == b"abcd"


def test_tensors_that_lie_in_one_place_are_known() -> None:
    def at(name: str, offset: int) -> dict[str, Any]:
        return tensor(name=name, extents=[[0, offset, 4096]])

    none = {"shape": [0], "nbytes": 0, "extents": []}
    entries = at("a", 0), at("b", 4096), at("c", 0), *(tensor(name=n, **none) for n in "de")
    assert Image(parse_table(table(*entries), [8192]), None).shared() == {"a", "c"}


def test_empty_tensors_and_scalars_have_their_place() -> None:
    built = images.build(
        [images.Tensor("empty", "F32", [0, 7], b""), images.Tensor("scalar", "F32", [], b"1234")]
    )
    image = Image.open(built.fds, built.digest)
    built.close()
    assert [bytes(image.view(entry)) for entry in image.table.entries] == [b"", b"1234"]


def test_equal_bytes_are_seen_as_equal() -> None:
    built = images.build(
        [
            images.Tensor(n, "U8", [9000], d)
            for n, d in (("a", b"q" * 9000), ("b", b"q" * 9000), ("c", b"r" * 9000))
        ]
    )
    image = Image.open(built.fds, built.digest)
    built.close()
    assert image.same_bytes("a", "b")
    assert not image.same_bytes("a", "c")
    assert not image.same_bytes("a", "nowhere")


def opened_of(*tensors: images.Tensor) -> Image:
    built = images.build(list(tensors))
    image = Image.open(built.fds, built.digest)
    built.close()
    return image


def test_what_changed_is_told_by_names_of_contents() -> None:
    def one(name: str, data: bytes, shape: int = 8) -> images.Tensor:
        return images.Tensor(name, "U8", [shape], data)

    first = opened_of(one("a", b"aaaaaaaa"), one("b", b"bbbbbbbb"))
    second = opened_of(one("a", b"aaaaaaaa"), one("b", b"cccccccc"), one("new", b"aaaaaaaa"))
    assert second.changed_from(first) == frozenset({"b", "new"})
    assert second.changed_from(second) == frozenset()
    assert first.changed_from(second) is None, "nobody knows what a tensor that went had filled"
    turned = opened_of(one("b", b"bbbbbbbb"), one("a", b"aaaaaaaa"))
    assert turned.changed_from(first) is None, "the one may be written over the other"


def test_an_older_agent_names_no_contents_so_everything_may_have_changed() -> None:
    image = Image(parse_table(table(tensor()), [4096]), None)
    assert image.changed_from(image) == frozenset({"w"})


def test_equal_tensors_are_mapped_once_and_part_nobody() -> None:
    """As INT4 experts are saved: numbers, a scale, and a shape that is the same everywhere."""
    tensors = []
    for expert in range(300):
        numbers, scale = expert.to_bytes(2, "big") * PAGE, expert.to_bytes(2, "big") * 8
        tensors += [
            images.Tensor(f"{expert}.weight_packed", "U8", [len(numbers)], numbers),
            images.Tensor(f"{expert}.weight_scale", "BF16", [8], scale),
            images.Tensor(f"{expert}.weight_shape", "I64", [2], bytes(16)),
        ]
    entries = [TensorEntry(t.name, t.dtype, tuple(t.shape), len(t.data), 0) for t in tensors]
    digests = {t.name: [hashlib.blake2s(t.data).hexdigest()] for t in tensors}
    offset = 100
    for at, entry in enumerate(entries):
        entries[at] = replace(entry, offset=offset)
        offset += entry.nbytes
    manifest = build("experts", "v1", {"model.safetensors": entries}, digests)
    layout: Layout[str] = lay_out(manifest, {})
    (slab,) = layout.slabs
    content = bytearray(slab.nbytes)  # type: ignore[union-attr]
    for tensor in tensors:
        _, begin, nbytes = layout.places[digests[tensor.name][0]]
        content[begin : begin + nbytes] = tensor.data
    fds = [images.sealed(table_json(manifest, layout)), images.sealed(bytes(content))]
    mappings: list[int] = []
    image = Image.open(fds, manifest.digest, mappings.append)
    for fd in fds:
        os.close(fd)
    assert mappings == [layout.mapping_count] == [1]
    found = {entry.name: bytes(image.view(entry)) for entry in image.table.entries}
    assert found == {tensor.name: tensor.data for tensor in tensors}


def test_an_unsealed_slab_is_refused() -> None:
    with pytest.raises(ImageError, match="slab 0 is not sealed"):
        opened(images.sealed(table(tensor())), images.sealed(b"\0" * 4096, seals=0x2 | 0x4))


def test_a_file_that_is_no_memfd_is_refused() -> None:
    with pytest.raises(ImageError, match="slab 0 is no"):
        opened(images.sealed(table(tensor())), os.open("/dev/null", os.O_RDONLY))


def test_a_table_of_another_version_is_refused() -> None:
    with pytest.raises(ImageError, match="the table is of"):
        opened(images.sealed(table(tensor())), images.sealed(b"\0" * 4096), digest="sha256:other")


def test_nothing_at_all_is_refused() -> None:
    with pytest.raises(ImageError, match="no table"):
        Image.open([], DIGEST)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extents": [[1, 0, 4096]]}, "slab 1"),
        ({"extents": [[0, 4096, 4096]]}, "beyond its slab"),
        ({"extents": [[0, 0, 4095]]}, "do not add up"),
        ({"extents": [[0, 1, 4096]]}, "not aligned"),
        ({"extents": [[0, 0, 2048], [0, 0, 2048]]}, "not aligned"),
        ({"extents": [[0, 0, 0], [0, 0, 4096]]}, "empty"),
        ({"extents": [[0, 0, -4096]]}, "no extent"),
        ({"extents": [[0, 0, True]]}, "no extent"),
        ({"extents": None}, "no extents"),
        ({"nbytes": 4092}, "do not hold"),
        ({"dtype": "F33"}, "unknown dtype"),
        ({"shape": [-1]}, "no shape"),
        ({"shape": [1] * 33}, "no shape"),
        ({"shape": [1 << 59, 1 << 59]}, "do not hold"),
        ({"name": ""}, "name"),
        ({"name": "x" * 513}, "name"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_entry_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        parse_table(table(tensor(**change)), [4096])


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(ImageError, match="twice"):
        parse_table(table(tensor(), tensor()), [4096])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.binary(max_size=64))
def test_no_bytes_crash_the_parser(data: bytes) -> None:
    with pytest.raises(ImageError):
        parse_table(data, [4096])


@given(
    st.dictionaries(st.sampled_from(["name", "dtype", "shape", "nbytes", "extents"]), json_values),
    json_values,
)
def test_no_json_crashes_the_parser(change: dict[str, Any], probes: Any) -> None:
    try:
        parsed = parse_table(table(tensor(**change), probes=probes), [4096])
    except ImageError:
        return
    for entry in parsed.entries:
        assert all(
            offset + nbytes <= 4096 and offset % PAGE == 0 for _, offset, nbytes in entry.extents
        )
