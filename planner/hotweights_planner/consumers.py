"""Consumers: which ranks need which tensors, as a group map and tensor-parallel groups say.

A group map is an object of patterns (``model.layers.0.*``) and ranks, or the id of a
tensor-parallel group; the first pattern that matches counts, and a tensor that none matches is
everybody's. A chunk that stands in several tensors is needed wherever any of them is: it moves
once, to all of them. It knows nothing of how a rank is reached.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from hotweights_planner.errors import BadGroups
from hotweights_planner.manifest import Manifest

MAX_RANK = 1 << 20

Ranks = tuple[int, ...]
"""Ascending, each once, at least one."""
GroupMap = Sequence[tuple[str, Ranks]]
"""Patterns and their ranks, in the order in which they are tried."""
Groups = Mapping[str, Ranks]
"""Tensor-parallel groups by id."""


@dataclass(frozen=True, slots=True)
class GroupsReport:
    """What is wrong with tensor-parallel groups, and what looks wrong."""

    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def is_ranks(value: object) -> bool:
    """Whether ``value`` is a list of ranks as a plan spells them: ascending, each once, at least
    one.
    """
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(rank) is int and 0 <= rank <= MAX_RANK for rank in value)
        and value == sorted(set(value))
    )


def parse_groups(text: bytes | str, where: str) -> Groups:
    """Tensor-parallel groups from JSON: ``{"0": [0, 1], "1": [2, 3]}``. Raises `BadGroups`, with
    ``where`` in it.
    """
    return {
        name: _ranks(value, f"{where}: group {name!a}")
        for name, value in _object(text, where).items()
    }


def parse_group_map(text: bytes | str, where: str, groups: Groups | None = None) -> GroupMap:
    """``{"model.layers.0.*": [0, 1], "lm_head.*": 0}``: a list is ranks, a number or a word is a
    group of ``groups``. Raises `BadGroups`, also for a group that is not there.
    """
    found: list[tuple[str, Ranks]] = []
    for pattern, value in _object(text, where).items():
        if isinstance(value, str) or type(value) is int:
            if groups is None or str(value) not in groups:
                text = f"pattern {pattern!a}: there is no tensor-parallel group {value!a}"
                raise BadGroups(
                    where,
                    text,
                    "name the groups with $HOTWEIGHTS_TP_GROUPS, or write a list of ranks",
                )
            found.append((pattern, groups[str(value)]))
        else:
            found.append((pattern, _ranks(value, f"{where}: pattern {pattern!a}")))
    return found


def consumers_by_digest(manifest: Manifest, group_map: GroupMap) -> dict[str, Ranks]:
    """The ranks that need a chunk; a chunk that is not here is needed by all."""
    ranks_of: dict[str, Ranks] = {}
    everybody: set[str] = set()
    for tensor in manifest.tensors:
        ranks = next(
            (ranks for pattern, ranks in group_map if fnmatchcase(tensor.name, pattern)), None
        )
        if ranks is None:
            everybody.update(tensor.chunks)
            continue
        for digest in tensor.chunks:
            known = ranks_of.setdefault(digest, ranks)
            if known is not ranks:  # a tuple of the map itself: identity spares a million compares
                ranks_of[digest] = tuple(sorted({*known, *ranks}))
    return {digest: ranks for digest, ranks in ranks_of.items() if digest not in everybody}


def contiguous_groups(world_size: int, tp: int) -> Groups:
    """Ranks 0 to ``world_size`` - 1 in groups of ``tp`` neighbours, by number. Raises `BadGroups`
    when that does not come out even.
    """
    if tp < 1 or world_size < 1 or world_size % tp:
        text = f"{world_size} ranks cannot be divided into groups of {tp}"
        raise BadGroups(
            "tensor-parallel groups", text, "give a world size that is a multiple of it"
        )
    return {
        str(index): tuple(range(index * tp, (index + 1) * tp)) for index in range(world_size // tp)
    }


def check_groups(groups: Groups, world_size: int) -> GroupsReport:
    """Ranks out of range, in two groups, or in none are problems; groups of different sizes are a
    warning.
    """
    problems: list[str] = []
    owner: dict[int, str] = {}
    for name, ranks in groups.items():
        outside = [rank for rank in ranks if rank >= world_size]
        if outside:
            problems.append(f"group {name} has ranks {outside}, and there are only {world_size}")
        problems += [
            f"rank {rank} is in the groups {owner[rank]} and {name}"
            for rank in ranks
            if owner.setdefault(rank, name) != name
        ]
    missing = [rank for rank in range(world_size) if rank not in owner]
    if missing:
        problems.append(f"in no group: ranks {missing}")
    sizes = sorted({len(ranks) for ranks in groups.values()})
    warnings = [f"the groups have different sizes: {sizes}"] if len(sizes) > 1 else []
    return GroupsReport(tuple(problems), tuple(warnings))


def _object(text: bytes | str, where: str) -> dict[str, object]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadGroups(where, f"it is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BadGroups(where, "it is not a JSON object")
    return document


def _ranks(value: object, where: str) -> Ranks:
    """Ranks as people write them: in any order."""
    if isinstance(value, list) and all(type(rank) is int for rank in value):
        ordered = sorted(set(value))
        if is_ranks(ordered):
            return tuple(ordered)
    raise BadGroups(
        where, f"{ascii(value)[:80]} is no list of ranks", "write a list of numbers from 0"
    )
