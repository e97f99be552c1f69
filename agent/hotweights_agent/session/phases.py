"""The phases of an engine, and which may follow which.

The words are those of ``NodeWeights.status.engines[].phase``. The table is the whole truth about
what may follow what: everything that changes a phase asks `move`, and a move that is not written
here raises and changes nothing. What makes an engine move is told in `engine` and `next_effects`;
this module knows no engine.
"""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """What an engine does; each word is written to the node's status as it stands here."""

    DISCONNECTED = "Disconnected"  # no process of it is connected
    BOOTING = "Booting"  # it holds its port until it is told what to serve
    SERVING = "Serving"  # it serves; which version is a question of its own
    PREPARING = "Preparing"  # ranks build the next version beside the one that is served
    PREPARED = "Prepared"  # every rank has the next version at hand
    COMMITTING = "Committing"  # the leader was told to switch and has not answered
    REFUSED = "Refused"  # a rank cannot take the version; what is served is untouched
    FAILED = "Failed"  # a prepare or a commit did not succeed; what is served is untouched
    DIRTY = "Dirty"  # a switch broke in the middle: paused until the engine repairs itself


class IllegalMove(Exception):
    """A phase that cannot follow the present one: a defect of the agent, never of an engine."""


_AT_REST = {Phase.BOOTING, Phase.SERVING}
_ANYWHERE = {Phase.DISCONNECTED, Phase.DIRTY}

# Prepared and Committing may follow rest at once: a version may be prepared before it is asked for
MOVES: dict[Phase, frozenset[Phase]] = {
    Phase.DISCONNECTED: frozenset(_AT_REST | {Phase.DIRTY}),
    Phase.BOOTING: frozenset(
        _ANYWHERE
        | {
            Phase.SERVING,
            Phase.PREPARING,
            Phase.PREPARED,
            Phase.COMMITTING,
            Phase.REFUSED,
            Phase.FAILED,
        }
    ),
    Phase.SERVING: frozenset(
        _ANYWHERE
        | {
            Phase.BOOTING,
            Phase.PREPARING,
            Phase.PREPARED,
            Phase.COMMITTING,
            Phase.REFUSED,
            Phase.FAILED,
        }
    ),
    Phase.PREPARING: frozenset(
        _ANYWHERE | _AT_REST | {Phase.PREPARED, Phase.REFUSED, Phase.FAILED}
    ),
    Phase.PREPARED: frozenset(
        _ANYWHERE | _AT_REST | {Phase.PREPARING, Phase.COMMITTING, Phase.REFUSED, Phase.FAILED}
    ),
    Phase.COMMITTING: frozenset(_ANYWHERE | {Phase.SERVING, Phase.FAILED}),
    Phase.REFUSED: frozenset(
        _ANYWHERE | _AT_REST | {Phase.PREPARING, Phase.PREPARED, Phase.COMMITTING, Phase.FAILED}
    ),
    Phase.FAILED: frozenset(
        _ANYWHERE | _AT_REST | {Phase.PREPARING, Phase.PREPARED, Phase.COMMITTING, Phase.REFUSED}
    ),
    # only the engine itself, or its end, leads out of it: nothing is asked of a dirty one
    Phase.DIRTY: frozenset({Phase.DISCONNECTED, Phase.SERVING, Phase.BOOTING}),
}


def move(old: Phase, new: Phase) -> Phase:
    """The new phase. Raises `IllegalMove` when the table does not know the way; staying is always
    allowed.
    """
    if new is not old and new not in MOVES[old]:
        raise IllegalMove(f"an engine cannot go from {old} to {new}")
    return new
