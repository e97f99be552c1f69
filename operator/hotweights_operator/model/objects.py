"""What the operator looks at, as frozen values: objects of the cluster, reduced to what decisions
need.

They are made by `observe` from what the API server sent, or by `simulate` from nothing at all;
whoever decides cannot tell the difference. They know no API, no clock and no policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property

from hotweights_crds.conditions import is_true
from hotweights_crds.nodeweights import (
    EngineStatus,
    NodeWeightsSpec,
    NodeWeightsStatus,
    PodAssignment,
    RolloutAssignment,
    StagedVersion,
)
from hotweights_crds.weightrollout import WeightRolloutSpec, WeightRolloutStatus
from hotweights_crds.weightversion import WeightVersionSpec, WeightVersionStatus

# the names that users and agents write; they are promised (`tests/surface`)
INJECT_LABEL = "hotweights.dev/inject"
DIGEST_LABEL = "hotweights.dev/digest"
GATE = "hotweights.dev/weights"
RETRY_ANNOTATION = "hotweights.dev/retry"

SETTLED_PHASES = frozenset({"Serving", "Preparing", "Prepared"})
"""Phases in which an engine answers requests with the digest that it reports."""

STILL_SERVING_PHASES = SETTLED_PHASES | {"Refused", "Failed"}
"""The same, and those of an engine that did not take the next version and goes on with the one it
has.
"""

START_GRANULARITY = timedelta(seconds=1)
"""Kubernetes cuts a container's start to whole seconds: what was confirmed within that second may
be of the life before.
"""


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod with the inject label, as far as decisions need it. Its name may come again, its UID
    does not.
    """

    uid: str
    name: str
    namespace: str
    node: str = ""  # empty until it is scheduled
    labels: Mapping[str, str] = field(default_factory=dict)
    ready: bool = False
    was_ready: bool = False  # it is Ready, or it was at some time of its life
    # when the kubelet last changed that; by its node's clock, in whole seconds
    ready_since: datetime | None = None
    gate: bool = False  # its agent says that it serves what it is assigned
    gate_since: datetime | None = None  # when the agent last changed that; by the same clock
    # the last start among the containers with an engine; by its node's clock
    engine_started_at: datetime | None = None
    restarts: int = 0  # of the containers with an engine
    # how long the one that ended last had run; None: none has ended
    last_run_seconds: float | None = None
    oom_killed: bool = False  # by the kernel, for the memory that it took: how that one ended
    terminating: bool = False  # it has a deletionTimestamp
    finished: bool = False  # its phase is Succeeded or Failed: an evicted one has failed

    @property
    def digest_label(self) -> str:
        """The version that it shows: 16 hexadecimal digits, written together with the gate; empty:
        none.
        """
        return self.labels.get(DIGEST_LABEL, "")

    @property
    def live(self) -> bool:
        """Whether it is, or may come to be, of service."""
        return not self.terminating and not self.finished


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    uid: str
    ready: bool = True
    zone: str = ""


@dataclass(frozen=True, slots=True)
class Agent:
    """The pod of a node's agent; while it is replaced a node has two."""

    uid: str
    node: str
    ready: bool  # and not being deleted
    # of the pod, as the API server has them (IPv4 and IPv6); none: it was not told
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeState:
    """A NodeWeights: what its node is to do, and what its agent says that it does. Look-ups are
    made once, when first asked for.
    """

    name: str
    generation: int = 0  # grows with every change of the spec, and only then
    resource_version: str = ""  # of the object; every write is fenced by it
    spec: NodeWeightsSpec = field(default_factory=NodeWeightsSpec)
    status: NodeWeightsStatus = field(default_factory=NodeWeightsStatus)

    @property
    def current(self) -> bool:
        """Whether the status answers the spec as it stands."""
        return self.status.observed_generation >= self.generation

    def engine(self, pod_uid: str) -> EngineStatus | None:
        """What the agent says of a pod's engine; None: nothing."""
        return self._engines.get(pod_uid)

    def staged(self, digest: str) -> StagedVersion | None:
        """What the agent says of a version; None: it is not told to hold it, or has not looked."""
        return self._staged.get(digest)

    def holds(self, digest: str) -> bool:
        """Whether the agent says that it has the whole version."""
        staged = self._staged.get(digest)
        return staged is not None and staged.phase == "Staged"

    def entry(self, uid: str) -> RolloutAssignment | None:
        """What a rollout (or `unassigned`) wants of this node, as it stands; None: it has none."""
        return self._entries.get(uid)

    def assignments(self, pod_uid: str) -> list[PodAssignment]:
        """All assignments of a pod, the one that counts (that with the highest token) first."""
        return self._assignments.get(pod_uid, [])

    def assigned(self, pod_uid: str) -> PodAssignment | None:
        """The assignment that counts: agents obey the highest token. None: no entry has the pod."""
        return next(iter(self.assignments(pod_uid)), None)

    def entered(self, pod_uid: str) -> list[str]:
        """UIDs of the rollouts in whose entries a pod stands."""
        return self._entered.get(pod_uid, [])

    @cached_property
    def listed(self) -> frozenset[str]:
        """Digests that the node is told to hold."""
        return frozenset(item.digest for entry in self.spec.rollouts for item in entry.stage)

    @cached_property
    def _engines(self) -> dict[str, EngineStatus]:
        return {engine.pod_uid: engine for engine in self.status.engines}

    @cached_property
    def _staged(self) -> dict[str, StagedVersion]:
        return {version.digest: version for version in self.status.staged}

    @cached_property
    def _entries(self) -> dict[str, RolloutAssignment]:
        return {entry.uid: entry for entry in self.spec.rollouts}

    @cached_property
    def _entered(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for entry in self.spec.rollouts:
            for pod in entry.pods:
                found.setdefault(pod.uid, []).append(entry.uid)
        return found

    @cached_property
    def _assignments(self) -> dict[str, list[PodAssignment]]:
        found: dict[str, list[PodAssignment]] = {}
        for entry in self.spec.rollouts:
            for pod in entry.pods:
                found.setdefault(pod.uid, []).append(pod)
        for several in found.values():
            several.sort(key=lambda pod: -pod.token)
        return found


@dataclass(frozen=True, slots=True)
class Version:
    """A WeightVersion as it stands, its conditions included."""

    uid: str
    name: str
    namespace: str
    generation: int
    resource_version: str
    spec: WeightVersionSpec
    status: WeightVersionStatus = field(default_factory=WeightVersionStatus)
    terminating: bool = False

    @property
    def usable(self) -> bool:
        """Whether its digest is known, so that rollouts can use it."""
        return bool(self.status.digest) and is_true(self.status.conditions, "Ready")


@dataclass(frozen=True, slots=True)
class Rollout:
    """A WeightRollout as it stands: its spec, and the status that is its memory."""

    uid: str
    name: str
    namespace: str
    generation: int
    resource_version: str
    created_at: str  # RFC 3339 in UTC and whole seconds, so that it sorts as text
    spec: WeightRolloutSpec
    status: WeightRolloutStatus = field(default_factory=WeightRolloutStatus)
    retry: str = ""  # the annotation hotweights.dev/retry: another value asks for another try
    terminating: bool = False

    @property
    def age_key(self) -> tuple[str, str]:
        """Sorts the older of two rollouts first."""
        return (self.created_at, self.uid)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the API server did not take what was to be written for a rollout to a node."""

    reason: str
    message: str
    is_due: bool = False  # it is time to try again


def confirmed(
    pod: Pod,
    engine: EngineStatus | None,
    digest: str,
    confirmed_at: datetime | None,
    phases: frozenset[str] = SETTLED_PHASES,
) -> bool:
    """Whether the engine confirmed this digest in this life of its container: the only proof that a
    pod serves it.
    """
    return (
        engine is not None
        and bool(digest)
        and engine.pod_uid == pod.uid
        and engine.digest == digest
        and engine.phase in phases
        and confirmed_at is not None
        and pod.engine_started_at is not None
        and confirmed_at >= pod.engine_started_at + START_GRANULARITY
    )
