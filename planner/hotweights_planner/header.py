"""Reads the header of a ``.safetensors`` file, strictly, from bytes that somebody else has read.

The library of that name is lenient where we must not be: it takes the last of two equal keys and
any tensor name. A header comes from whoever wrote the checkpoint, so everything in it is checked
before a number of it is used: its length before it is read at all (`header_nbytes`), then the text
(`parse_header`). Whatever is accepted here the library accepts too. The format is described at
https://huggingface.co/docs/safetensors#format.

It knows nothing of files, folders or tensors' contents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from hotweights_planner.errors import BadCheckpoint

PREFIX_NBYTES = 8  # an unsigned 64-bit number, little-endian: the header's length
# the library reads up to 100 MB; this is what `MAX_FILE_TENSORS` take
MAX_HEADER_NBYTES = 32 << 20
MAX_FILE_TENSORS = 1 << 18  # at about 128 bytes of header each
MAX_TENSORS = 1 << 20  # of a version: 60 layers of 896 experts have 645 000, weights and scales
MAX_DIMENSIONS = 32
MAX_NAME_NBYTES = 512  # promised in docs/design/001-contracts.md
MAX_INTEGER = (1 << 63) - 1  # the largest offset that pread(2) takes (off_t)

# as the format spells them; in bits, because some take less than a byte
BITS_OF_DTYPE = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4,
}  # fmt: skip
# of the format too, but torch has no such type, so neither safetensors nor vLLM loads them
_NO_LOADER_HAS = ("F6_E2M3", "F6_E3M2")
_LFS_POINTER = b"version "  # how the text begins that git-lfs leaves in a file's place

# more than any 64 bit number; Python would gladly parse a million of them
_DIGITS_TOO_MANY = re.compile(r"\d{21}")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the header places it. ``dtype`` is a key of `BITS_OF_DTYPE`, ``shape`` counts
    elements, and ``offset`` counts from the file's first byte, not from the header's end.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


def header_nbytes(prefix: bytes, file_nbytes: int, where: str) -> int:
    """Length in bytes of the header that follows ``prefix`` (the file's first eight bytes). Raises
    `BadCheckpoint` when it is too large, too small, or beyond the file's end.
    """
    if len(prefix) < PREFIX_NBYTES or file_nbytes < PREFIX_NBYTES:
        raise BadCheckpoint(
            where, f"truncated: {file_nbytes} bytes, and the header's length alone takes 8"
        )
    nbytes = int.from_bytes(prefix[:PREFIX_NBYTES], "little")
    if prefix[:PREFIX_NBYTES] == _LFS_POINTER:
        raise BadCheckpoint(where, "a pointer of Git LFS, not the file", "git lfs pull")
    if nbytes > MAX_HEADER_NBYTES:
        raise BadCheckpoint(
            where,
            f"claims a header of {nbytes} bytes; at most {MAX_HEADER_NBYTES} are read",
            "is it a .safetensors file? Split one with that many tensors into shards",
        )
    if nbytes < 2:  # the shortest object is {}
        raise BadCheckpoint(where, f"a header of {nbytes} bytes cannot be a JSON object")
    if PREFIX_NBYTES + nbytes > file_nbytes:
        raise BadCheckpoint(
            where, f"truncated: the header ends at byte {PREFIX_NBYTES + nbytes} of {file_nbytes}"
        )
    return nbytes


def parse_header(header: bytes, file_nbytes: int, where: str) -> tuple[TensorEntry, ...]:
    """The file's tensors by offset. They must fill it from the header's end to the last byte,
    without hole or overlap, as the format demands. Raises `BadCheckpoint` for anything else;
    ``where`` names the file in it.
    """
    document = _object_of(header, where)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise BadCheckpoint(where, "__metadata__ must be an object of strings")
    if len(document) > MAX_FILE_TENSORS:
        text = f"{len(document)} tensors; at most {MAX_FILE_TENSORS} a file"
        raise BadCheckpoint(where, text, "split it into shards")
    data_offset = PREFIX_NBYTES + len(header)
    # tensors of no bytes share an offset with the next one: they go first
    entries = sorted(
        (_entry(name, fields, data_offset, where) for name, fields in document.items()),
        key=lambda entry: (entry.offset, entry.nbytes, entry.name),
    )
    _check_filled(entries, data_offset, file_nbytes, where)
    return tuple(entries)


def check_tensor_name(name: str) -> str | None:
    """What is wrong with a tensor's name, or None. Names end up in logs, in conditions and in other
    people's dictionaries.
    """
    if not name:
        return "is empty"
    if not name.isprintable():  # lone surrogates too, so the name can be encoded below
        return "has control or unprintable characters"
    if len(name.encode()) > MAX_NAME_NBYTES:
        return f"is longer than {MAX_NAME_NBYTES} bytes"
    # nothing here makes a path of a name, but other people's loaders might
    if name[0] in "/." or "\\" in name or ".." in name.split("/"):
        return "looks like a path"
    return None


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int | None:
    """Bytes of a tensor, or None where a type of less than a byte does not come out even. Raises
    `KeyError` for an unknown ``dtype``.
    """
    nbits = BITS_OF_DTYPE[dtype] * prod(shape)
    return None if nbits % 8 else nbits // 8


def is_size(value: object) -> bool:
    """Whether ``value`` is a number of bytes or elements that fits 63 bits (True is not a number
    here).
    """
    return type(value) is int and 0 <= value <= MAX_INTEGER


def _object_of(header: bytes, where: str) -> dict[str, object]:
    if not header.startswith(b"{"):
        raise BadCheckpoint(
            where, "the header does not begin with '{'", "is it a .safetensors file?"
        )

    # the format forbids equal keys, and Python would take the last one
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise BadCheckpoint(where, f"the key {_shown(twice)} stands twice in the header")
        return fields

    def integer(digits: str) -> int:
        if _DIGITS_TOO_MANY.search(digits):
            raise BadCheckpoint(where, f"a number of {len(digits)} digits in the header")
        return int(digits)

    try:
        document = json.loads(
            header.decode(),
            object_pairs_hook=unique,
            parse_int=integer,
            parse_constant=_no_constant,
        )
    except UnicodeDecodeError as error:
        raise BadCheckpoint(where, f"the header is not UTF-8 (byte {8 + error.start})") from error
    except json.JSONDecodeError as error:
        raise BadCheckpoint(
            where, f"the header is not JSON: {error.msg} at character {error.pos}"
        ) from error
    except RecursionError as error:
        raise BadCheckpoint(where, "the header is nested too deeply") from error
    except _NotJson as error:
        raise BadCheckpoint(where, f"the header is not JSON: {error}") from error
    return dict(document)


class _NotJson(ValueError):
    """NaN or Infinity, which Python takes for JSON."""


def _no_constant(word: str) -> object:
    raise _NotJson(word)


def _entry(name: str, fields: object, data_offset: int, where: str) -> TensorEntry:
    fault = check_tensor_name(name)
    if fault:
        raise BadCheckpoint(where, f"the tensor name {_shown(name)} {fault}", "rename the tensor")
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadCheckpoint(
            where, f"tensor {name}: needs dtype, shape and data_offsets, and nothing else"
        )
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if dtype in _NO_LOADER_HAS:
        text = f"tensor {name}: {dtype}, which neither torch nor vLLM can load"
        raise BadCheckpoint(where, text, "store it packed as U8, as its quantizer's loader wants")
    if not isinstance(dtype, str) or dtype not in BITS_OF_DTYPE:
        raise BadCheckpoint(
            where, f"tensor {name}: unknown dtype {_shown(dtype)}", "convert the tensor"
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(is_size, shape)):
        raise BadCheckpoint(
            where, f"tensor {name}: the shape must be at most {MAX_DIMENSIONS} sizes"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise BadCheckpoint(where, f"tensor {name}: data_offsets must be two offsets")
    begin, end = offsets
    nbytes = tensor_nbytes(dtype, shape)
    # torch packs two F4 along the last dimension
    if nbytes is None or (dtype == "F4" and shape[-1] % 2):
        raise BadCheckpoint(where, f"tensor {name}: {dtype} x {shape} is no whole number of bytes")
    # a zero among the sizes must not hide an overflow: the library multiplies in 64 bits, in order
    if nbytes > MAX_INTEGER or prod(size or 1 for size in shape) > MAX_INTEGER:
        raise BadCheckpoint(where, f"tensor {name}: {dtype} x {shape} overflows")
    if end - begin != nbytes:
        raise BadCheckpoint(
            where,
            f"tensor {name}: {dtype} x {shape} is {nbytes} bytes, data_offsets span {end - begin}",
        )
    return TensorEntry(name, dtype, tuple(shape), nbytes, data_offset + begin)


def _check_filled(
    entries: list[TensorEntry], data_offset: int, file_nbytes: int, where: str
) -> None:
    if entries and entries[0].offset != data_offset:
        raise BadCheckpoint(
            where,
            f"a hole of {entries[0].offset - data_offset} bytes before tensor {entries[0].name}",
        )
    for left, right in pairwise(entries):
        gap = right.offset - (left.offset + left.nbytes)
        if gap < 0:
            raise BadCheckpoint(
                where, f"tensors {left.name} and {right.name} overlap by {-gap} bytes"
            )
        if gap > 0:
            raise BadCheckpoint(
                where, f"a hole of {gap} bytes between tensors {left.name} and {right.name}"
            )
    end = entries[-1].offset + entries[-1].nbytes if entries else data_offset
    last = f"tensor {entries[-1].name} ends" if entries else "the header ends"
    if end > file_nbytes:
        raise BadCheckpoint(
            where, f"truncated or out of range: {last} at byte {end}, the file at {file_nbytes}"
        )
    if end < file_nbytes:
        raise BadCheckpoint(
            where, f"{file_nbytes - end} bytes after the last tensor ({last} at byte {end})"
        )


def _shown(value: object) -> str:
    text = ascii(value)  # it is somebody else's: neither long nor unprintable in our messages
    return text if len(text) <= 80 else text[:77] + "..."
