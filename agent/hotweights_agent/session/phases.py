"""The phases of an engine, and what leads from one to another.

The words are those of ``NodeWeights.status.engines[].phase``. `TRANSITIONS` is the whole truth: each
thing that can happen to an engine, in which phases it can, and which phase follows. Everything that
changes a phase says what happened; what cannot happen raises and changes nothing. The drawing in
``docs/design/005-agent.md`` is made of this table (``python -m hotweights_agent.session.phases``).
It knows no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import NamedTuple


class Phase(StrEnum):
    """What an engine does; each word is written to the node's status as it stands here."""

    DISCONNECTED = "Disconnected"  # no process of it is connected
    BOOTING = "Booting"  # it holds its port until it is told what to serve, or has only ranks yet
    SERVING = "Serving"  # it serves; which version is a question of its own
    PREPARING = "Preparing"  # ranks build the next version beside the one that is served
    PREPARED = "Prepared"  # every rank has the next version at hand
    COMMITTING = "Committing"  # the leader was told to switch and has not answered
    REFUSED = "Refused"  # a rank cannot take the version; what is served is untouched
    FAILED = "Failed"  # a prepare or a commit did not succeed; what is served is untouched
    DIRTY = "Dirty"  # a switch broke in the middle: paused until the engine repairs itself


class Happening(StrEnum):
    """What can happen to an engine."""

    RANKS_ALONE = "ranks are connected, and no server"
    FOUND_BOOTING = "the leader says that it boots"
    FOUND_SERVING = "the leader says that it serves"
    FOUND_DIRTY = "the leader says that it is dirty"
    LEFT = "the leader, or the last process, is gone"
    IDLE_AT_BOOT = "nothing is asked of an engine that boots"
    IDLE = "nothing is asked of an engine that serves"
    PREPARE_ASKED = "a rank is asked to prepare"
    ALL_PREPARED = "every rank has prepared"
    PREPARE_REFUSED = "a rank refuses"
    GIVEN_UP = "what is asked for was given up"
    COMMIT_ASKED = "the leader is asked to switch"
    COMMITTED = "the leader has switched"
    COMMIT_FAILED = "the leader has not switched"
    COMMIT_BROKE = "the switch broke in the middle"


class IllegalMove(Exception):
    """Something that cannot happen in this phase: a defect of the agent, never of an engine."""


class Transition(NamedTuple):
    """In which phases something can happen, and the one that follows."""

    sources: frozenset[Phase]
    to: Phase


_ALL = frozenset(Phase)
# nothing is asked of an engine in the middle of a switch, or of a broken or an absent one
_ASKABLE = _ALL - {Phase.DISCONNECTED, Phase.COMMITTING, Phase.DIRTY}
_SILENT = frozenset({Phase.DISCONNECTED})

TRANSITIONS: Mapping[Happening, Transition] = {
    Happening.RANKS_ALONE: Transition(_SILENT, Phase.BOOTING),
    # Unasked, only what the leader's own state makes follows it: the other phases follow what is
    # asked of it, and an answer to that.
    Happening.FOUND_BOOTING: Transition(_SILENT | {Phase.DIRTY, Phase.BOOTING}, Phase.BOOTING),
    Happening.FOUND_SERVING: Transition(_SILENT | {Phase.DIRTY, Phase.BOOTING}, Phase.SERVING),
    Happening.FOUND_DIRTY: Transition(_ALL, Phase.DIRTY),
    Happening.LEFT: Transition(_ALL, Phase.DISCONNECTED),
    Happening.IDLE_AT_BOOT: Transition(_ASKABLE, Phase.BOOTING),
    Happening.IDLE: Transition(_ASKABLE, Phase.SERVING),
    Happening.PREPARE_ASKED: Transition(_ASKABLE, Phase.PREPARING),
    # also at once: a version may be prepared before it is asked for
    Happening.ALL_PREPARED: Transition(_ASKABLE, Phase.PREPARED),
    Happening.PREPARE_REFUSED: Transition(_ASKABLE, Phase.REFUSED),
    Happening.GIVEN_UP: Transition(_ASKABLE, Phase.FAILED),
    Happening.COMMIT_ASKED: Transition(frozenset({Phase.PREPARED}), Phase.COMMITTING),
    Happening.COMMITTED: Transition(frozenset({Phase.COMMITTING}), Phase.SERVING),
    Happening.COMMIT_FAILED: Transition(frozenset({Phase.COMMITTING}), Phase.FAILED),
    Happening.COMMIT_BROKE: Transition(frozenset({Phase.COMMITTING}), Phase.DIRTY),
}


def after(phase: Phase, happening: Happening) -> Phase:
    """The phase that follows. Raises `IllegalMove` when that cannot happen in this one."""
    sources, to = TRANSITIONS[happening]
    if phase not in sources:
        raise IllegalMove(f"{phase}: {happening}, which cannot be")
    return to


def drawing() -> Iterator[str]:
    """The table as a Mermaid state diagram, a line at a time. What can happen in many phases is
    drawn once, from a box that stands for them.
    """
    yield "stateDiagram-v2"
    yield "    [*] --> Disconnected"
    groups = {_ALL: "AnyPhase", _ASKABLE: "Askable"}
    for happening, (sources, to) in TRANSITIONS.items():
        for source in [groups[sources]] if sources in groups else sorted(sources - {to}):
            yield f"    {source} --> {to}: {happening}"
    yield f"    note left of Askable: one of {', '.join(sorted(_ASKABLE))}"


if __name__ == "__main__":
    print("\n".join(drawing()))
