"""What of a model a version changes: the rest is neither loaded, finished nor copied.

A version differs from the one that serves in some of its tensors. Which parameters those reach was
asked of the loaders (`Trace.sources`), fused and transposed as they may be. Finishing a layer may
mix what is in it (a fused projection, the repacked weights of an attention), so a model is taken
apart into groups that are finished by themselves, a decoder layer for instance
(`Shadow.groups`), and a group is done as a whole or not at all. Wherever anything is not known
for certain, the answer is None: the whole version. Pure; neither torch nor vllm is imported here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hotweights.adapters.vllm.rank.fit.dry_load import Trace


@dataclass(frozen=True, slots=True)
class Delta:
    """A part of a version. Empty: the model has it already."""

    groups: frozenset[str]
    """To be loaded, finished and copied."""
    tensors: frozenset[str]
    """Of the version, that they are loaded from."""


def between(
    changed: frozenset[str],
    names: Collection[str],
    trace: Trace,
    groups: Mapping[str, str],
    unexplained: Collection[str],
) -> Delta | None:
    """What to do where the tensors ``changed`` of all ``names`` differ from those that serve.
    ``groups``: of each parameter and buffer, its group. ``unexplained``: parameters and buffers
    that no tensor fills, as far as was seen. None: load the whole version.
    """
    if not _is_known(trace) or not changed <= frozenset(names):
        return None
    used = frozenset[str]().union(*trace.sources.values())
    if unexplained and changed - used:
        return None
    reached = [part for part in _connected(trace, groups) if part.tensors & changed]
    done = frozenset[str]().union(*(part.groups for part in reached))
    if done == set(groups.values()):
        return None
    if not done:
        return Delta(done, frozenset())
    tensors = frozenset[str]().union(*(part.tensors for part in reached))
    return Delta(done, tensors | _unseen(names, trace, unexplained))


def parts(
    names: Collection[str],
    trace: Trace,
    groups: Mapping[str, str],
    unexplained: Collection[str],
    within: Delta | None,
) -> tuple[Delta, ...]:
    """What can be loaded and finished one after the other, of a whole version or ``within`` a part
    of it. Empty: nothing is known of it, or there is nothing to do.
    """
    if not _is_known(trace):
        return ()
    unseen = _unseen(names, trace, unexplained)
    return tuple(
        Delta(part.groups, part.tensors | unseen)
        for part in _connected(trace, groups)
        if within is None or part.groups & within.groups
    )


def stands_alone(part: Delta, whole: Trace, alone: Trace, groups: Mapping[str, str]) -> bool:
    """Whether the loaders did to a part's parameters and buffers the very same with its tensors
    ``alone`` as among the whole version's. They do not where one asks whether a tensor is there.
    """
    return _is_known(alone) and all(
        whole.steps.get(name) == alone.steps.get(name)
        for name, group in groups.items()
        if group in part.groups
    )


def _is_known(trace: Trace) -> bool:
    """Whether all that the loaders did was seen, and none of it belongs to no part."""
    return trace.complete and not trace.left


def _connected(trace: Trace, groups: Mapping[str, str]) -> list[Delta]:
    """The groups with the tensors that they are loaded from; those that have a tensor in common are
    one. In the order of ``groups``.
    """
    joined: dict[str, str] = {}

    def first(group: str) -> str:
        while group in joined:
            group = joined[group]
        return group

    owner: dict[str, str] = {}  # of each tensor: a group that it reaches
    for name, sources in trace.sources.items():
        for tensor in sources:
            mine = first(groups[name])
            other = first(owner.setdefault(tensor, mine))
            if mine != other:
                joined[mine] = other
    members: dict[str, set[str]] = {}
    for group in groups.values():
        members.setdefault(first(group), set()).add(group)
    tensors: dict[str, set[str]] = {group: set() for group in members}
    for tensor, group in owner.items():
        tensors[first(group)].add(tensor)
    return [Delta(frozenset(found), frozenset(tensors[at])) for at, found in members.items()]


def _unseen(names: Collection[str], trace: Trace, unexplained: Collection[str]) -> frozenset[str]:
    """Tensors that are loaded with every part, although no write of the loaders' showed it: those
    of other ranks, and what loaders pass over. Where something fills parameters that nobody saw, it
    may be one of these.
    """
    if not unexplained:
        return frozenset()
    return frozenset(names) - frozenset[str]().union(*trace.sources.values())
