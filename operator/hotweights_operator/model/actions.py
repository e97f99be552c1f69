"""What a decision consists of. Actions are values: `perform` does them, the simulator too, in its
own way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from hotweights_crds.nodeweights import ResolveItem, RolloutAssignment
from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_crds.weightversion import WeightVersionStatus

Status = TypeVar("Status", WeightRolloutStatus, WeightVersionStatus, None)


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """The object that an event is about."""

    kind: Literal["WeightRollout", "WeightVersion", "Pod"]
    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Event:
    """Something to tell people. It goes out only after what it tells of was written."""

    regarding: ObjectRef
    reason: str
    message: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class CreateNodeWeights:
    """Make the node's object, owned by the node, under a manager that outlives every rollout."""

    node: str
    node_uid: str


@dataclass(frozen=True, slots=True)
class Assign:
    """Make this one rollout's whole entry on a node; None removes it. Refused if the object has
    changed since.
    """

    node: str
    resource_version: str  # that it was decided on
    uid: str  # of the rollout, or `unassigned`
    entry: RolloutAssignment | None
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True)
class AskResolve:
    """Make the agent of a node read a version's source; None takes the request back."""

    node: str
    resource_version: str
    uid: str  # of the WeightVersion
    item: ResolveItem | None


Action = CreateNodeWeights | Assign | AskResolve


# no slots: calling the alias of a frozen generic with slots is a TypeError (CPython 3.11)
@dataclass(frozen=True)
class Decision(Generic[Status]):
    """One step: what to do, what to say, and when to look again if nothing happens before."""

    actions: tuple[Action, ...] = ()
    status: Status | None = None  # the whole status; None: a node has none
    events: tuple[Event, ...] = ()
    again_in_seconds: float | None = None  # None: only when something happens


RolloutDecision = Decision[WeightRolloutStatus]
VersionDecision = Decision[WeightVersionStatus]
NodeDecision = Decision[None]
