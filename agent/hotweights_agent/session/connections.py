"""The processes of an engine as the agent knows them: who is connected, what it has at hand, and
what it was asked.

Plain facts without a will: `engine` keeps them true, `next_effects` acts on them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from hotweights_agent.session.retry import RetryState
from hotweights_crds.nodeweights import ProbeStrength

_STRENGTHS: dict[str, ProbeStrength] = {"Golden": "Golden", "Ran": "Ran", "None": "None"}


def probe_strength(word: str) -> ProbeStrength:
    """An engine's word for what proved a version; one that is not known here proves nothing."""
    return _STRENGTHS.get(word, "")


class ProtocolViolation(Exception):
    """A process said something that no sound plugin says; its connection ends."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Wish(NamedTuple):
    """How a version may wait for its commit (`frames.Prepare`)."""

    memory: str = "Auto"
    max_pause_seconds: int = 0


_BESIDE_IF_IT_FITS = Wish()


@dataclass(frozen=True, slots=True)
class Goal:
    """What is being tried; when any of it changes, that is another try."""

    token: int = 0
    digest: str = ""
    image: int = 0  # of a prepare: which staging of the digest is offered
    rollout: str = ""  # its UID
    revision: int = 0  # of that rollout
    wish: Wish = _BESIDE_IF_IT_FITS
    golden: bool = False  # only with golden tokens for this kind of engine


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """A question that a process has not answered yet."""

    id: int
    op: str  # prepare | map | commit | keep
    goal: Goal
    deadline: float  # seconds of `Now`; without an answer by then it is given up


@dataclass(frozen=True, slots=True)
class StepFailure:
    """Something asked for did not succeed; `record_failure` says whether it is tried again."""

    op: str  # prepare | commit
    goal: Goal
    reason: str
    message: str
    dirty: bool = False  # never tried again: the engine was broken by it
    booting: bool = False  # the engine had not opened its port yet


@dataclass(slots=True)
class Rank:
    """The connection of one worker process, and which versions it has at hand."""

    conn: int
    rank: int
    world_size: int
    held: set[str] = field(default_factory=set)  # mapped before this connection, as it says itself
    prepared: dict[str, Wish] = field(default_factory=dict)  # by digest, as it was asked for
    way: tuple[str, str] = ("", "")  # the digest prepared last, and how it waits (`Prepared.way`)
    rejected: dict[str, Goal] = field(default_factory=dict)  # digest → what was refused
    pending: PendingRequest | None = None
    called_off: int = 0  # the id of a prepare that nobody wants any more
    unsupported: str = ""  # why its engine can never be switched, as it says itself


@dataclass(slots=True)
class Server:
    """The connection of a process with vLLM's port."""

    conn: int
    state: str  # Booting | Serving | Dirty
    digest: str  # what it confirmed in this life; empty: what it booted
    token: int  # the highest that it has seen
    opened: bool = False  # it has answered requests in this life
    confirmed_at: str = ""  # RFC 3339, by the node's clock; empty iff `digest` is
    pending: PendingRequest | None = None
    unsupported: str = ""  # as a rank's
    caveat: str = ""  # what a new version leaves as it was, by its own word
    reason: str = ""  # why it is dirty; empty while it is not
    message: str = ""
    kind: str = ""  # what golden tokens of it depend on besides the weights, by its own word
    # what proved `digest`, by its own word for that very one; empty: it has not said, or there is
    # none
    probe: ProbeStrength = ""


@dataclass(slots=True)
class Attempt:
    """The tries for one goal; a new goal starts afresh."""

    goal: Goal
    retries: RetryState = field(default_factory=RetryState)
