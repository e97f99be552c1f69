"""Buckets: consecutive chunks in load order, the unit of scheduling.

A bucket does not mix layers unless whole layers fit into it: a consumer that works layer by layer
then waits for few buckets. A layer that is larger than a bucket is split. It knows nothing of time
or bandwidth; the size is the caller's decision.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

DEFAULT_BUCKET_NBYTES = 64 << 20

# names up to the first number that is a part of its own: experts and heads stay in their layer
_LAYER = re.compile(r"^(?:[^.\d][^.]*\.)+\d+(?=\.)")


class Piece(Protocol):
    """What goes into a bucket: a chunk, or a part of one."""

    @property
    def tensor(self) -> str:
        """Name of its tensor, which tells the layer."""

    @property
    def number(self) -> int:
        """The chunk's number in the tensor."""

    @property
    def nbytes(self) -> int:
        """How many bytes it adds to a bucket."""


P = TypeVar("P", bound=Piece)


@dataclass(frozen=True, slots=True)
class Bucket(Generic[P]):
    """``layers`` are in order; a layer that was split stands in several buckets. ``nbytes`` is the
    sum of its ``chunks``.
    """

    layers: tuple[str, ...]
    chunks: tuple[P, ...]
    nbytes: int


@lru_cache(maxsize=1 << 12)  # chunks of a tensor come together
def layer_of(tensor: str) -> str:
    """``model.layers.12`` of ``model.layers.12.mlp.up_proj.weight``; the name itself without its
    last part elsewhere.
    """
    found = _LAYER.match(tensor)
    return found[0] if found else tensor.rpartition(".")[0] or tensor


def buckets(chunks: Iterable[P], bucket_nbytes: int = DEFAULT_BUCKET_NBYTES) -> Iterator[Bucket[P]]:
    """``chunks``, which are in load order, in buckets of at most ``bucket_nbytes``. Raises
    `ValueError` when a chunk is larger than that.
    """
    layers: list[str] = []
    filled: list[P] = []
    nbytes = 0
    for layer, group in groupby(chunks, key=lambda chunk: layer_of(chunk.tensor)):
        members = list(group)
        layer_nbytes = sum(map(attrgetter("nbytes"), members))
        # before a layer is looked at closer: one that is too large begins a bucket too
        if filled and nbytes + layer_nbytes > bucket_nbytes:
            yield Bucket(tuple(layers), tuple(filled), nbytes)
            layers, filled, nbytes = [], [], 0
        layers.append(layer)
        if nbytes + layer_nbytes <= bucket_nbytes:
            filled += members
            nbytes += layer_nbytes
            continue
        for chunk in members:
            if chunk.nbytes > bucket_nbytes:
                text = (
                    f"chunk {chunk.number} of tensor {chunk.tensor} has {chunk.nbytes} bytes, "
                    f"a bucket {bucket_nbytes}"
                )
                raise ValueError(f"{text}; make the buckets at least as large as a chunk")
            if nbytes + chunk.nbytes > bucket_nbytes:
                yield Bucket(tuple(layers), tuple(filled), nbytes)
                layers, filled, nbytes = [layer], [], 0
            filled.append(chunk)
            nbytes += chunk.nbytes
    if filled:
        yield Bucket(tuple(layers), tuple(filled), nbytes)
