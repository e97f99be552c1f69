"""What an image consists of, as the agent says in its table: each tensor's dtype, shape and place.

Whoever sends it is a process of its own with its own bugs, so every promise in it is checked before
any of it is believed. Needs neither torch nor the memory itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PAGE = 4096  # bytes; the kernel maps files in these
MAX_NAME_BYTES = 512  # as docs/design/001-contracts.md promises of manifests
MAX_DIMENSIONS = 32  # as the planner allows

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8, "F4": 1,
}  # fmt: skip
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64",
    "F4": "float4_e2m1fn_x2",
}  # fmt: skip


def torch_shape(dtype: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that torch gives a tensor of the checkpoint: two F4 are one item of it, along the
    last dimension, as safetensors loads them too.
    """
    return (*shape[:-1], shape[-1] // 2) if dtype == "F4" and shape else tuple(shape)


class ImageError(Exception):
    """What was handed over cannot be mapped; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the table, checked against the slabs; ``address`` is its offset in the mapped
    region.
    """

    name: str
    dtype: str
    """As safetensors spells it, ``BF16``."""
    shape: tuple[int, ...]
    nbytes: int
    extents: tuple[tuple[int, int, int], ...]
    """Slab's number, offset in it and length, both in bytes."""
    address: int
    """Tensors with the same extents have the same: quantized experts bring tens of thousands of
    small equal ones; mapped one by one, each would be a mapping more, and part its neighbours.
    """
    content: str
    """Names its bytes, whatever memory they lie in; empty: an older agent says nothing of them."""


@dataclass(frozen=True, slots=True)
class Table:
    """What an image consists of, as the agent says; every promise in it is checked."""

    digest: str
    version: str
    """The label that people read."""
    entries: tuple[TensorEntry, ...]
    probes: tuple[dict[str, Any], ...]
    files: dict[str, str]
    """Side files of the version: name → BLAKE3."""
    texts: dict[str, str]
    """What is in them, by name, where the agent has it."""
    region_bytes: int
    """Addresses that the mapping needs: every tensor begins at a page, and equal ones share it."""


def parse_table(data: bytes, slab_bytes: Sequence[int]) -> Table:
    """The table, every promise in it checked. Raises `ImageError` naming the tensor."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"the table is no JSON: {error}") from error
    if not isinstance(body, dict) or not isinstance(body.get("tensors"), list):
        raise ImageError("the table has no list of tensors")
    digest, version, probes = body.get("digest"), body.get("version", ""), body.get("probes") or []
    if not isinstance(digest, str) or not isinstance(version, str):
        raise ImageError("the table's digest or version is no string")
    if not isinstance(probes, list) or not all(isinstance(probe, dict) for probe in probes):
        raise ImageError("the table's probes are no list of objects")
    files = body.get("files") or []
    if not isinstance(files, list) or not all(map(_is_side_file, files)):
        raise ImageError("the table's files are no list of names and digests")
    entries: list[TensorEntry] = []
    names: set[str] = set()
    addresses: dict[tuple[tuple[int, int, int], ...], int] = {}
    end = 0
    for item in body["tensors"]:
        # a mapping begins at a page: so does every tensor, one behind the other
        entry = _entry(item, slab_bytes, addresses, end)
        if entry.name in names:
            raise ImageError(f"{entry.name}: it is in the table twice")
        names.add(entry.name)
        entries.append(entry)
        end = max(end, entry.address + whole_pages(entry.nbytes))
    side_files = {file["name"]: file["blake3"] for file in files}
    texts = {file["name"]: file["text"] for file in files if "text" in file}
    return Table(digest, version, tuple(entries), tuple(probes), side_files, texts, end)


def _entry(
    item: object,
    slab_bytes: Sequence[int],
    addresses: dict[tuple[tuple[int, int, int], ...], int],
    end: int,
) -> TensorEntry:
    """One tensor, checked; at ``end``, and then in ``addresses``, if its extents are not there."""
    if not isinstance(item, dict):
        raise ImageError("an entry of the table is no object")
    name, dtype, shape = item.get("name"), item.get("dtype"), item.get("shape")
    if not isinstance(name, str) or not 0 < len(name.encode("utf-8", "replace")) <= MAX_NAME_BYTES:
        raise ImageError("a tensor's name is missing or too long")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ImageError(f"{name}: unknown dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise ImageError(f"{name}: {shape!r} is no shape")
    nbytes = item.get("nbytes")
    if not _is_size(nbytes) or nbytes != math.prod(torch_shape(dtype, shape)) * ITEM_BYTES[dtype]:
        raise ImageError(f"{name}: {nbytes!r} bytes do not hold {dtype} {shape}")
    extents = item.get("extents")
    if not isinstance(extents, list):
        raise ImageError(f"{name}: it has no extents")
    for position, extent in enumerate(extents):
        _check_extent(name, extent, slab_bytes, last=position == len(extents) - 1)
    if sum(extent[2] for extent in extents) != nbytes:
        raise ImageError(f"{name}: its extents do not add up to {nbytes} bytes")
    content = item.get("content", "")
    if not isinstance(content, str):
        raise ImageError(f"{name}: {content!r} names no content")
    found = tuple((e[0], e[1], e[2]) for e in extents)
    address = addresses.setdefault(found, end)
    return TensorEntry(name, dtype, tuple(shape), nbytes, found, address, content)


def _check_extent(name: str, extent: object, slab_bytes: Sequence[int], *, last: bool) -> None:
    if not isinstance(extent, list) or len(extent) != 3 or not all(map(_is_size, extent)):
        raise ImageError(f"{name}: {extent!r} is no extent")
    slab, offset, nbytes = extent
    if slab >= len(slab_bytes):
        raise ImageError(f"{name}: it lies in slab {slab}, and {len(slab_bytes)} came")
    if offset % PAGE or (not last and nbytes % PAGE) or not nbytes:
        # only the last may end within a page: behind another the tensor would have a hole
        raise ImageError(f"{name}: extent {extent} is empty or not aligned to {PAGE} bytes")
    if offset + nbytes > slab_bytes[slab]:
        raise ImageError(
            f"{name}: extent {extent} ends beyond its slab of {slab_bytes[slab]} bytes"
        )


def whole_pages(nbytes: int) -> int:
    """Bytes of the pages that so many lie in."""
    return -(-nbytes // PAGE) * PAGE


def _is_side_file(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(text, str)
        for text in (value.get("name"), value.get("blake3"), value.get("text", ""))
    )


def _is_size(value: object) -> bool:
    # 1 << 60: sums of such stay far from the end of a C long long, which mmap takes
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 60
