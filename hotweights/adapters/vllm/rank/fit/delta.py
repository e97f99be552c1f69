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
    reached = _closed(changed & used, trace, groups)
    if reached.groups == set(groups.values()):
        return None
    if not reached.groups:
        return reached
    return Delta(reached.groups, reached.tensors | _unseen(names, trace, unexplained))


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
    found: list[Delta] = []
    unseen = _unseen(names, trace, unexplained)
    left = dict.fromkeys(groups.values() if within is None else within.groups)
    while left:
        group = next(iter(left))
        sources = frozenset[str]().union(
            *(trace.sources.get(name, ()) for name in groups if groups[name] == group)
        )
        part = _closed(sources, trace, groups)
        part = Delta(part.groups | {group}, part.tensors | unseen)
        left = dict.fromkeys(name for name in left if name not in part.groups)
        found.append(part)
    return tuple(found)


def _is_known(trace: Trace) -> bool:
    """Whether all that the loaders did was seen. What one does with a tensor's value, such as
    taking another tensor, is not.
    """
    return trace.failed is None and not trace.opaque and not trace.read


def _closed(tensors: frozenset[str], trace: Trace, groups: Mapping[str, str]) -> Delta:
    """The groups that tensors reach, with all that those are loaded from, and so on."""
    reached: set[str] = set()
    found = set(tensors)
    while True:
        more = {groups[name] for name, sources in trace.sources.items() if sources & found}
        if more <= reached:
            return Delta(frozenset(reached), frozenset(found))
        reached |= more
        for name, sources in trace.sources.items():
            if groups[name] in reached:
                found |= sources


def _unseen(names: Collection[str], trace: Trace, unexplained: Collection[str]) -> frozenset[str]:
    """Tensors that are loaded with every part, although no write of the loaders' showed it: those
    of other ranks, and what loaders pass over. Where something fills parameters that nobody saw, it
    may be one of these.
    """
    if not unexplained:
        return frozenset()
    return frozenset(names) - frozenset[str]().union(*trace.sources.values())
