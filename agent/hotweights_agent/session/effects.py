"""What the session wants done: one frozen dataclass for each kind of thing that an agent can do.

Effects are ordered, and doing one never raises into the session: what comes of it returns as a
message. The session keeps no promise about an effect's success; it asks again by level when nothing
was heard in time.
"""

from __future__ import annotations

from dataclasses import dataclass

from hotweights_agent.session.assignments import SavedAssignment
from hotweights_agent.session.messages import Pod
from hotweights_crds.nodeweights import NodeWeightsStatus, ResolveItem, StageItem
from hotweights_transports.handoff.frames import Frame


@dataclass(frozen=True, slots=True)
class Stage:
    """Bring a version onto this node."""

    item: StageItem


@dataclass(frozen=True, slots=True)
class CancelStage:
    """Stop bringing it; what has come so far may go."""

    digest: str


@dataclass(frozen=True, slots=True)
class Prefer:
    """Versions that come before all others, those asked for already too."""

    digests: frozenset[str]


@dataclass(frozen=True, slots=True)
class ReleaseVersion:
    """Let go of a staged version."""

    digest: str


@dataclass(frozen=True, slots=True)
class Resolve:
    """Read a source and say what it holds."""

    item: ResolveItem


@dataclass(frozen=True, slots=True)
class CancelResolve:
    """Stop reading it; nothing more is heard of it."""

    uid: str


@dataclass(frozen=True, slots=True)
class SendPrepare:
    """Hand a staged version's memory to a rank; the answer must carry this id. Not a `Send`,
    because the driver pins the image until its descriptors are sent.
    """

    conn: int
    id: int
    digest: str
    memory: str = "Auto"
    max_pause_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Send:
    """Send a frame that needs no memory beside it."""

    conn: int
    frame: Frame


@dataclass(frozen=True, slots=True)
class Close:
    """End a connection; the reason is for its log and ours."""

    conn: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class SaveAssignments:
    """Write to the disk what pods are to serve, before anything else is done about it: an agent
    that ends in between must not know less than its engines do.
    """

    pods: tuple[SavedAssignment, ...]


@dataclass(frozen=True, slots=True)
class ForgetPods:
    """The pods are gone for good."""

    pod_uids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PodStatus:
    """What a pod is to show: the gate's condition, and labels (empty: none)."""

    gate: bool
    reason: str
    message: str
    version_label: str = ""
    digest_label: str = ""  # the first 16 hex digits


@dataclass(frozen=True, slots=True)
class WritePodStatus:
    """Make a pod show this; the writer compares with what is there and tries again until it is."""

    pod: Pod
    pod_status: PodStatus


@dataclass(frozen=True, slots=True)
class DropPodStatus:
    """Nothing is known of this pod any more: stop writing to it."""

    pod_uid: str


@dataclass(frozen=True, slots=True)
class Report:
    """The node's status as a whole. ``urgent``: more than progress changed."""

    status: NodeWeightsStatus
    urgent: bool


@dataclass(frozen=True, slots=True)
class Defect:
    """Name and count a defect of the agent."""

    where: str
    """The kind of message or step; never words from outside."""
    error: Exception
    subject: str = ""
    """The pod whose engine it cost; empty: none in particular."""
    story: tuple[str, ...] = ()
    """What happened to that engine last, oldest first."""


Effect = (
    Stage
    | CancelStage
    | Prefer
    | ReleaseVersion
    | Resolve
    | CancelResolve
    | SendPrepare
    | Send
    | Close
    | SaveAssignments
    | ForgetPods
    | WritePodStatus
    | DropPodStatus
    | Report
    | Defect
)
