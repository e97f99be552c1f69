"""Looks at the numbers themselves, in the pass that hashes them: a training that went wrong leaves
tensors full of NaN in files that are faultless otherwise.

It costs two maxima over each chunk, about a tenth of its hash: with the sign apart, the bits of a
float grow with its magnitude, and infinities and NaN lie at the end. Only where one is, all are
counted. Tensors of zeros need no look at all, since their chunks' digests are those of zeros.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from blake3 import blake3

from hotweights_planner.header import TensorEntry
from hotweights_planner.manifest import Chunk, Manifest, Tensor


class _Format(NamedTuple):
    """How a type spells what is no number."""

    nbytes: int  # of an item
    first: int  # the smallest magnitude (bits without the sign) that is none
    infinity: int = -1  # its magnitude; -1: the type has none


# IEEE 754, and https://onnx.ai/onnx/technical/float8.html for those of a byte
_FORMATS = {
    "F64": _Format(8, 0x7FF0 << 48, 0x7FF0 << 48),
    "F32": _Format(4, 0x7F80 << 16, 0x7F80 << 16),
    "C64": _Format(4, 0x7F80 << 16, 0x7F80 << 16),
    "BF16": _Format(2, 0x7F80, 0x7F80),
    "F16": _Format(2, 0x7C00, 0x7C00),
    "F8_E5M2": _Format(1, 0x7C, 0x7C),
    "F8_E4M3": _Format(1, 0x7F),
}
# one pattern of all bits is NaN
_SINGLE_NAN = {"F8_E8M0": 0xFF, "F8_E4M3FNUZ": 0x80, "F8_E5M2FNUZ": 0x80}


class NotFinite:
    """Counts NaN and infinities by tensor; `look` may be called from any thread."""

    def __init__(self, headers: Mapping[str, Sequence[TensorEntry]]) -> None:
        self._dtypes = {entry.name: entry.dtype for file in headers.values() for entry in file}
        self._lock = threading.Lock()
        self._counts: dict[str, tuple[int, int]] = {}

    def look(self, chunk: Chunk, data: memoryview) -> None:
        """Count those of one chunk."""
        nan, infinite = _count(self._dtypes[chunk.tensor], data)
        if nan or infinite:
            with self._lock:
                before = self._counts.get(chunk.tensor, (0, 0))
                self._counts[chunk.tensor] = (before[0] + nan, before[1] + infinite)

    def faults(self) -> list[str]:
        """A sentence for each tensor that has some, in load order."""
        return [
            f"tensor {name} has {nan} NaN and {infinite} infinite values"
            for name in self._dtypes
            for nan, infinite in [self._counts.get(name, (0, 0))]
            if nan or infinite
        ]


def all_zero(manifest: Manifest) -> list[str]:
    """A sentence for each matrix of floats that is zero everywhere. Vectors are not told: biases
    often are.
    """
    return [
        f"tensor {tensor.name} is zero everywhere"
        for tensor in manifest.tensors
        if _is_float_matrix(tensor) and _is_zero(tensor, manifest.chunk_bytes)
    ]


def _is_float_matrix(tensor: Tensor) -> bool:
    is_float = tensor.dtype in _FORMATS or tensor.dtype in _SINGLE_NAN
    return is_float and sum(size > 1 for size in tensor.shape) > 1


def _is_zero(tensor: Tensor, chunk_nbytes: int) -> bool:
    *whole, last = tensor.chunks or ("",)
    return last == _zeros_digest(tensor.nbytes - len(whole) * chunk_nbytes) and all(
        digest == _zeros_digest(chunk_nbytes) for digest in whole
    )


@cache
def _zeros_digest(nbytes: int) -> str:
    return blake3(bytes(nbytes)).hexdigest()


def _count(dtype: str, data: memoryview) -> tuple[int, int]:
    """How many are NaN, and how many infinite."""
    import numpy as np  # every command loads this module, and only publishing needs it

    if (nan := _SINGLE_NAN.get(dtype)) is not None:
        return int(np.count_nonzero(np.frombuffer(data, np.uint8) == nan)), 0
    if (form := _FORMATS.get(dtype)) is None or not data:
        return 0, 0
    unsigned = np.frombuffer(data, f"<u{form.nbytes}")
    sign = 1 << (8 * form.nbytes - 1)
    # positive ones are the largest signed numbers, negative ones the largest unsigned
    if unsigned.view(f"<i{form.nbytes}").max() < form.first and unsigned.max() < sign | form.first:
        return 0, 0
    magnitude = unsigned & (sign - 1)
    infinite = int(np.count_nonzero(magnitude == form.infinity)) if form.infinity >= 0 else 0
    return int(np.count_nonzero(magnitude >= form.first)) - infinite, infinite
