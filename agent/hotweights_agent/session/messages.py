"""What the session is told: one frozen dataclass for each kind of thing that can happen to a node.

Everything that the outside learns (an object changed, a fetch ended, an engine spoke, time passed)
becomes one of these, and nothing else reaches the session. Frames of engines come as they are on
the wire, in `FrameReceived`. No message carries a socket, a file or a callback.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hotweights_agent.session.assignments import SavedAssignment
from hotweights_crds.nodeweights import NodeWeightsSpec, ResolvedVersion
from hotweights_transports.handoff.frames import Frame, Hello


class Now(NamedTuple):
    """A moment: seconds that only grow, for waiting, and the same moment for people."""

    seconds: float  # monotonic; comparable only within this process
    utc: str  # RFC 3339, by the node's clock


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod as its service-account token names it."""

    uid: str
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class AssignmentsLoaded:
    """At the start: what the disk remembers."""

    pods: tuple[SavedAssignment, ...]


@dataclass(frozen=True, slots=True)
class Assigned:
    """The node's object was read, or read again: the API server answers."""

    spec: NodeWeightsSpec
    generation: int  # metadata.generation, which the status repeats


@dataclass(frozen=True, slots=True)
class ApiUnavailable:
    """The API server does not answer: until the next `Assigned` the disk's memory stands in for
    what is not known.
    """


@dataclass(frozen=True, slots=True)
class PodsPresent:
    """The pods that are on this node now; what is remembered of others can go."""

    uids: frozenset[str]


@dataclass(frozen=True, slots=True)
class PodStatusSeen:
    """The digest label that a pod carries at the API server now (16 hex digits; empty: none)."""

    pod_uid: str
    digest_label: str


@dataclass(frozen=True, slots=True)
class StageProgressed:
    """Verified bytes of a version that is being staged."""

    digest: str
    bytes_done: int
    bytes_total: int
    bytes_fetched: int  # of those done: from peers or the source; the rest was on the node


@dataclass(frozen=True, slots=True)
class StageDone:
    """A version is complete, every chunk verified, its image sealed."""

    digest: str
    version: str
    bytes_total: int
    bytes_fetched: int
    seconds: float
    how: str = ""
    """By which way it came, where that is worth a sentence."""
    golden_kinds: frozenset[str] = frozenset()
    """The kinds of engine that its manifest has golden tokens for."""


@dataclass(frozen=True, slots=True)
class StageFailed:
    """A version could not be staged. ``transient``: another try may end differently."""

    digest: str
    reason: str
    message: str
    transient: bool


@dataclass(frozen=True, slots=True)
class CapacityChanged:
    """How much memory versions may take on this node, and how much of it is free."""

    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class ResolveDone:
    """A source was read, or could not be."""

    result: ResolvedVersion  # without a reason iff it was read
    transient: bool = False  # another try may end differently


@dataclass(frozen=True, slots=True)
class Connected:
    """A process of an engine said hello and proved whose it is."""

    conn: int
    pod: Pod
    hello: Hello


@dataclass(frozen=True, slots=True)
class Disconnected:
    """A connection ended, for whatever reason."""

    conn: int


@dataclass(frozen=True, slots=True)
class FrameReceived:
    """A frame of a connected process, after its hello."""

    conn: int
    frame: Frame


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed and nothing else happened: deadlines are looked at."""


Message = (
    AssignmentsLoaded
    | Assigned
    | ApiUnavailable
    | PodsPresent
    | PodStatusSeen
    | StageProgressed
    | StageDone
    | StageFailed
    | CapacityChanged
    | ResolveDone
    | Connected
    | Disconnected
    | FrameReceived
    | Ticked
)
