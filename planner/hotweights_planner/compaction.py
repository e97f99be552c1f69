"""Decides, when a version is begun, which chunks that are here already are copied to a new place,
so that neither memory nor mappings grow with the number of versions that came before.

A slab is sealed for ever, so nothing of it can be given back while one chunk of it is used: under
small changes everywhere each old slab would keep a few live chunks, and a node ends with several
times what it needs. The cure is what log-structured file systems do (Rosenblum and Ousterhout,
1992, "segment cleaning"): the emptiest slabs are *left*, and what lives in them is copied.

Bounds, whatever came before, and why:

* For the new version and any one older version of its model, all their slabs together are at most
  ``1 + max_waste`` times the distinct chunks of the two; for the new version alone it is
  ``1 + max_waste_alone`` times. Slabs are left, the emptiest first, until that holds; what is
  copied out of them lies without gaps, and where the pair needs it the older version is moved too
  (`relocated`), so that a slab that was left goes at once, or when an engine that maps it goes on.
* Only the longest ``max_mappings / 2`` stretches of known chunks stay where they are, and between
  two of them lies at most one stretch of new ones: a version needs at most ``max_mappings``
  mappings, one for each new slab, and two for each chunk that occurs again in a tensor that no
  other equals (equal ones are mapped once). Where that and the first bound cannot both be had, this
  one holds: what cannot be mapped serves nobody.
* Slabs are descriptors, here and at every engine. The smallest are put together when there are
  more than `_slab_limit` of them.

What it costs: with a tenth of all chunks changed at random each time, about a fifth of the version
is copied, from memory to memory, and at most two and a half versions' memory is taken for a moment
whatever the share. It knows nothing of descriptors or time, and what a slab is it does not ask.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic

from hotweights_planner.layout import MAX_SLAB_NBYTES, Place, S, page_rounded
from hotweights_planner.manifest import Manifest

# an engine maps two versions while it prepares, and Linux gives a process 65530 mappings
# (vm.max_map_count): half of them stay for everything else that it maps
MAX_MAPPINGS = 16_384
MAX_WASTE = 0.2  # less is copied more often: at 0.1 twice as much
MAX_WASTE_ALONE = 0.5  # it lasts only until the next version is begun
SPARE_SLABS = 64  # beside those that are full: fewer are not worth a copy


@dataclass(frozen=True, slots=True)
class Limits:
    """What is allowed before something is copied."""

    max_waste: float = MAX_WASTE
    """Of memory by the new version and an older one, relative to the chunks that they need."""
    max_waste_alone: float = MAX_WASTE_ALONE
    """Of the new version alone: what remains when the older ones have gone."""
    max_mappings: int = MAX_MAPPINGS
    """Of one version in one process."""
    max_slab_nbytes: int = MAX_SLAB_NBYTES


@dataclass(frozen=True, slots=True)
class Compaction(Generic[S]):
    """Where the chunks of a version that are here will be."""

    stays: Mapping[str, Place[S]]
    """By digest; they are used where they are."""
    copies: Mapping[str, Place[S]]
    """By digest, where they are now; they get a new place."""
    leaves: frozenset[S]
    """Slabs that no version of this model uses any more once all are `relocated`."""
    rest_nbytes: int
    """What else lives in those slabs and is copied for the older versions: memory in bytes."""


def compact(
    manifest: Manifest,
    held: Sequence[Mapping[str, Place[S]]],
    stored_nbytes: Callable[[S], int],
    limits: Limits | None = None,
) -> Compaction[S]:
    """What becomes of the chunks of ``held`` (versions that are here, the newest first) when
    ``manifest`` is begun. ``stored_nbytes`` says how much memory a slab takes.
    """
    limits = limits or Limits()
    present: ChainMap[str, Place[S]] = ChainMap(*(dict(chunks) for chunks in held))
    known, stretches = _stretches(manifest, present)
    moved: set[str] = set()
    if len(stretches) > limits.max_mappings // 2:
        stretches.sort(key=lambda stretch: -stretch.nbytes)
        for stretch in stretches[limits.max_mappings // 2 :]:
            moved.update(stretch.digests)
    nbytes = _nbytes(manifest)
    own: Counter[S] = Counter()  # bytes of each slab that this version uses where they are
    for digest, place in known.items():
        if place is not None and digest not in moved:
            own[place.slab] += page_rounded(place.nbytes)
    alone: set[S] = set()
    _leave_emptiest(own, alone, nbytes, stored_nbytes, limits.max_waste_alone)
    for slab in alone:
        del own[slab]
    leaves: set[S] = set()
    for chunks in held:
        live, related, other = Counter(own), False, 0
        for digest, place in chunks.items():
            if digest in known:
                # wherever it will be: the older version follows
                related = True
                live[place.slab] += 0
            else:
                other += page_rounded(place.nbytes)
                live[place.slab] += page_rounded(place.nbytes)
        if related:  # else it is another model's, and none of our business
            _leave_emptiest(live, leaves, nbytes + other, stored_nbytes, limits.max_waste)
    _leave_smallest(own, leaves, limits.max_slab_nbytes)
    stays: dict[str, Place[S]] = {}
    copies: dict[str, Place[S]] = {}
    for digest, place in known.items():
        if place is not None:
            goes = digest in moved or place.slab in alone or place.slab in leaves
            (copies if goes else stays)[digest] = place
    rest = {
        digest: page_rounded(place.nbytes)
        for chunks in held
        for digest, place in chunks.items()
        if place.slab in leaves and digest not in known
    }
    return Compaction(stays, copies, frozenset(leaves), sum(rest.values()))


def relocated(
    chunks: Mapping[str, Place[S]], newer: Mapping[str, Place[S]], leaves: frozenset[S]
) -> Compaction[S]:
    """Where an older version's ``chunks`` are once ``leaves`` are left: where the ``newer``
    versions have them, or else in a new place of its own.
    """
    stays: dict[str, Place[S]] = {}
    copies: dict[str, Place[S]] = {}
    for digest, place in chunks.items():
        if (other := newer.get(digest)) is not None:
            stays[digest] = other
        elif place.slab in leaves:
            copies[digest] = place
        else:
            stays[digest] = place
    return Compaction(stays, copies, leaves, 0)


class _Stretch:
    """Known chunks that are neighbours in the version and in their slab."""

    __slots__ = ("digests", "end", "nbytes", "slab")

    def __init__(self, slab: object, begin: int) -> None:
        self.slab = slab
        self.end = begin
        self.nbytes = 0
        self.digests: list[str] = []


def _stretches(
    manifest: Manifest, present: Mapping[str, Place[S]]
) -> tuple[dict[str, Place[S] | None], list[_Stretch]]:
    """The version's distinct chunks in load order with their places, and the stretches of them."""
    known: dict[str, Place[S] | None] = {}
    stretches: list[_Stretch] = []
    open_: _Stretch | None = None
    for digest in _digests(manifest):
        place = known[digest] if digest in known else known.setdefault(digest, present.get(digest))
        if place is None:
            open_ = None
            continue
        if open_ is None or open_.slab is not place.slab or open_.end != place.offset:
            open_ = _Stretch(place.slab, place.offset)
            stretches.append(open_)
        nbytes = page_rounded(place.nbytes)
        open_.end += nbytes
        open_.nbytes += nbytes
        open_.digests.append(digest)
    return known, stretches


def _digests(manifest: Manifest) -> Iterator[str]:
    """The chunks in load order; those of a tensor that equals one before it are not mapped anew."""
    return chain.from_iterable(dict.fromkeys(tensor.chunks for tensor in manifest.tensors))


def _nbytes(manifest: Manifest) -> int:
    """Memory that the version's distinct chunks take, in bytes."""
    sizes: dict[str, int] = {}
    for tensor in manifest.tensors:
        sizes.update(dict.fromkeys(tensor.chunks, manifest.chunk_bytes))
        if rest := tensor.nbytes % manifest.chunk_bytes:
            sizes[tensor.chunks[-1]] = page_rounded(rest)
    return sum(sizes.values())


def _leave_emptiest(
    live: Mapping[S, int],
    leaves: set[S],
    needed: int,
    stored_nbytes: Callable[[S], int],
    max_waste: float,
) -> None:
    """Add the emptiest slabs to ``leaves`` until all memory, in which ``needed`` bytes lie, is
    full enough: ``live`` of them are where they were, and the others lie without gaps.
    """
    sizes = {slab: stored_nbytes(slab) for slab in live if slab not in leaves}
    wasted = sum(sizes.values()) - sum(live[slab] for slab in sizes)
    # the largest of equally empty ones first: more is given back by it
    emptiest = sorted(sizes, key=lambda slab: (live[slab] / max(1, sizes[slab]), -sizes[slab]))
    for slab in emptiest:
        if wasted <= max_waste * needed:
            return
        leaves.add(slab)
        wasted -= sizes[slab] - live[slab]


def _slab_limit(nbytes: int, max_slab_nbytes: int) -> int:
    """How many slabs a version of ``nbytes`` may lie in."""
    return 2 * -(-nbytes // max_slab_nbytes) + SPARE_SLABS


def _leave_smallest(own: Mapping[S, int], leaves: set[S], max_slab_nbytes: int) -> None:
    """Add the slabs that this version uses least of to ``leaves``, if they are too many: half of
    them, so that it is not done for each version anew.
    """
    slabs = sorted((slab for slab in own if slab not in leaves), key=lambda slab: own[slab])
    limit = _slab_limit(sum(own.values()), max_slab_nbytes)
    if len(slabs) > limit:
        leaves.update(slabs[: len(slabs) - limit // 2])
