"""Lays a version out in memory: which chunks are where they were, where the new ones go, and the
table over both.

Every chunk begins on a page, so a tensor can be put together in virtual memory from whatever slabs
its chunks are in, and an unchanged chunk of the next version is the same extent: no copy, no second
memory. New chunks go, in load order, into slabs of bounded size: a slab is freed when no version
uses any of it, so small slabs come back sooner. What is worth a new place although it is here is
decided elsewhere (`compaction`); here a chunk that is not ``present`` is a new one.

What a slab is, it does not know: the caller's own objects are passed through.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from hotweights_planner.errors import BadManifest
from hotweights_planner.manifest import CONFIG_NAME, PAGE_NBYTES, Manifest, Tensor

# larger ones come back later; smaller ones cost more descriptors, one for each in every process
MAX_SLAB_NBYTES = 1 << 30

S = TypeVar("S", bound=Hashable)


class Place(NamedTuple, Generic[S]):
    """Where a chunk is: ``nbytes`` bytes at ``offset`` of a slab, which is a multiple of a page."""

    slab: S
    offset: int
    nbytes: int


Extent = tuple[int, int, int]
"""Consecutive bytes: index of the slab in the layout, offset in it, length. A plain tuple, since
there may be a million.
"""


class NewSlab(NamedTuple):
    """A slab that is to be made."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout(Generic[S]):
    """A version in memory, some of it still to be filled."""

    slabs: tuple[S | NewSlab, ...]
    """Earlier slabs that go on being used, and new ones; extents count in this order."""
    missing: tuple[str, ...]
    """The digests that are to be fetched, in load order, each once; `Manifest.first_chunks` says
    whence.
    """
    places: dict[str, Extent]
    """Where each distinct chunk is or goes."""
    extents: tuple[tuple[Extent, ...], ...]
    """Per tensor, merged where neighbours in the tensor are neighbours in the slab."""

    @property
    def new_nbytes(self) -> int:
        """Memory that the version takes beyond what is there, page rounding included."""
        return sum(slab.nbytes for slab in self.slabs if isinstance(slab, NewSlab))

    @property
    def mapping_count(self) -> int:
        """How many mmap(2) calls put the version together when its tensors lie one behind the
        other, each from a page on, and those with the same extents are mapped once: what counts
        against ``vm.max_map_count``.
        """
        count, slab, end = 0, -1, -1
        for extents in dict.fromkeys(self.extents):
            for index, offset, nbytes in extents:
                if (index, offset) != (slab, end):
                    count += 1
                slab, end = index, offset + page_rounded(nbytes)
        return count


def page_rounded(nbytes: int) -> int:
    """``nbytes``, rounded up to whole pages of `PAGE_NBYTES`."""
    return -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES


def lay_out(
    manifest: Manifest, present: Mapping[str, Place[S]], max_slab_nbytes: int = MAX_SLAB_NBYTES
) -> Layout[S]:
    """The layout of ``manifest`` on a node that has ``present`` (by digest). Raises `BadManifest`
    when a digest stands for two sizes, and `ValueError` when a slab is smaller than a chunk or a
    chunk of ``present`` does not begin on a page.
    """
    if max_slab_nbytes < page_rounded(manifest.chunk_bytes):
        raise ValueError(
            f"a slab of {max_slab_nbytes} bytes holds no chunk of {manifest.chunk_bytes}; make it "
            "larger"
        )
    slabs: list[S | NewSlab] = []
    indices: dict[S, int] = {}
    places: dict[str, Extent] = {}
    missing: list[str] = []
    extents: list[tuple[Extent, ...]] = []
    # no slab is open, and it is full: the first new chunk begins one
    whole, open_slab, used = manifest.chunk_bytes, -1, max_slab_nbytes
    for tensor in manifest.tensors:
        merged: list[Extent] = []
        slab = begin = end = -1  # of the extent that grows
        rest = tensor.nbytes
        for digest in tensor.chunks:
            nbytes = whole if rest > whole else rest
            if (known := places.get(digest)) is not None:
                if known[2] != nbytes:
                    raise _two_sizes(tensor.name, digest, nbytes, known[2])
            elif (place := present.get(digest)) is not None:
                _check_place(tensor.name, digest, nbytes, place)
                if (index := indices.get(place.slab)) is None:
                    index = indices[place.slab] = len(slabs)
                    slabs.append(place.slab)
                known = places[digest] = (index, place.offset, nbytes)
            else:
                if used + nbytes > max_slab_nbytes:
                    if open_slab >= 0:
                        slabs[open_slab] = NewSlab(used)
                    open_slab, used = len(slabs), 0
                    slabs.append(NewSlab(0))  # its size is known when it is full
                known = places[digest] = (open_slab, used, nbytes)
                missing.append(digest)
                # a whole chunk is whole pages; most are, and a call for each would be felt
                used += whole if nbytes == whole else page_rounded(nbytes)
            # a tensor that is one run is one mapping, and a process has only so many
            if known[0] == slab and known[1] == end:
                end += nbytes
            else:
                if slab >= 0:
                    merged.append((slab, begin, end - begin))
                slab, begin = known[0], known[1]
                end = begin + nbytes
            rest -= nbytes
        if slab >= 0:
            merged.append((slab, begin, end - begin))
        extents.append(tuple(merged))
    if open_slab >= 0:
        slabs[open_slab] = NewSlab(used)
    return Layout(tuple(slabs), tuple(missing), places, tuple(extents))


def table_json(manifest: Manifest, layout: Layout[S], config: str | None = None) -> bytes:
    """The table that goes to the engines beside the slabs: canonical JSON, UTF-8. What stands in it
    is told in ``docs/design/001-contracts.md``. ``config``: the text of `Manifest.config_file`.
    """
    files = [{"name": file.name, "blake3": file.blake3} for file in manifest.files]
    for file in files:
        if config is not None and file["name"] == CONFIG_NAME:
            file["text"] = config
    table = {
        "digest": manifest.digest,
        "version": manifest.version,
        "tensors": [
            {
                "name": tensor.name, "dtype": tensor.dtype, "shape": tensor.shape, "nbytes": tensor.nbytes,
                "content": _content(tensor), "extents": extents,
            }
            for tensor, extents in zip(manifest.tensors, layout.extents, strict=True)
        ],
        "files": files,
        "probes": [probe.model_dump(by_alias=True) for probe in manifest.probes or ()],
    }  # fmt: skip
    return json.dumps(table, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def _content(tensor: Tensor) -> str:
    return hashlib.sha256("".join(tensor.chunks).encode()).hexdigest()


def _check_place(tensor: str, digest: str, nbytes: int, place: Place[S]) -> None:
    if place.nbytes != nbytes:
        raise _two_sizes(tensor, digest, nbytes, place.nbytes)
    if place.offset % PAGE_NBYTES:
        raise ValueError(
            f"chunk {digest} is held at {place.offset}, which is no page; keep chunks on pages"
        )


def _two_sizes(tensor: str, digest: str, nbytes: int, known_nbytes: int) -> BadManifest:
    return BadManifest(
        f"tensor {tensor}", f"chunk {digest} has {nbytes} bytes here and {known_nbytes} elsewhere"
    )
