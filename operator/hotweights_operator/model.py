"""What the operator looks at, as frozen values: objects of the cluster, reduced to what decisions need.

They are made by `observe` from what the API server sent, or by `simulate` from nothing at all; whoever decides cannot tell the
difference. They know no API, no clock and no policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property

from hotweights_crds.conditions import is_true
from hotweights_crds.nodeweights import EngineStatus, NodeWeightsSpec, NodeWeightsStatus, PodAssignment, StagedVersion
from hotweights_crds.weightrollout import WeightRolloutSpec, WeightRolloutStatus
from hotweights_crds.weightversion import WeightVersionSpec, WeightVersionStatus
from hotweights_operator.selectors import selects

INJECT_LABEL = "hotweights.dev/inject"
DIGEST_LABEL = "hotweights.dev/digest"
GATE = "hotweights.dev/weights"

SETTLED_PHASES = frozenset({"Serving", "Preparing", "Prepared"})
"""Phases in which an engine answers requests with the digest that it reports."""

STILL_SERVING_PHASES = SETTLED_PHASES | {"Refused", "Failed"}
"""The same, and those of an engine that did not take the next version and goes on with the one it has."""

START_GRANULARITY = timedelta(seconds=1)
"""Kubernetes cuts a container's start to whole seconds: what was confirmed within that second may be of the life before."""


@dataclass(frozen=True, slots=True)
class Pod:
    """An opted-in pod."""

    uid: str
    name: str
    namespace: str
    node: str = ""  # empty until it is scheduled
    labels: Mapping[str, str] = field(default_factory=dict)
    ready: bool = False
    was_ready: bool = False  # it is Ready, or it was at some time of its life
    ready_since: datetime | None = None  # when the kubelet last changed that; by its node's clock, in whole seconds
    gate: bool = False  # its agent says that it serves what it is assigned
    gate_since: datetime | None = None  # when the agent last changed that; by the same clock
    engine_started_at: datetime | None = None  # the last start among the containers with an engine; by its node's clock
    restarts: int = 0  # of the containers with an engine
    last_run_seconds: float | None = None  # how long the one that ended last had run; None: none has ended
    oom_killed: bool = False  # by the kernel, for the memory that it took: how that one ended
    terminating: bool = False
    finished: bool = False

    @property
    def digest_label(self) -> str:
        """The version that it shows: 16 hexadecimal digits, written together with the gate; empty: none."""
        return self.labels.get(DIGEST_LABEL, "")

    @property
    def live(self) -> bool:
        """Whether it is, or may come to be, of service."""
        return not self.terminating and not self.finished


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster."""

    name: str
    uid: str
    ready: bool = True
    zone: str = ""


@dataclass(frozen=True, slots=True)
class NodeState:
    """A NodeWeights: what its node is to do, and what its agent says that it does."""

    name: str
    generation: int = 0
    resource_version: str = ""
    spec: NodeWeightsSpec = field(default_factory=NodeWeightsSpec)
    status: NodeWeightsStatus = field(default_factory=NodeWeightsStatus)

    @property
    def current(self) -> bool:
        """Whether the status answers the spec as it stands."""
        return self.status.observed_generation >= self.generation

    def engine(self, pod_uid: str) -> EngineStatus | None:
        """What the agent says of a pod's engine."""
        return next((engine for engine in self.status.engines if engine.pod_uid == pod_uid), None)

    def staged(self, digest: str) -> StagedVersion | None:
        """What the agent says of a version."""
        return next((version for version in self.status.staged if version.digest == digest), None)

    def holds(self, digest: str) -> bool:
        """Whether the agent says that it has the whole version."""
        staged = self.staged(digest)
        return staged is not None and staged.phase == "Staged"

    def assignments(self, pod_uid: str) -> list[PodAssignment]:
        """All assignments of a pod, the one that counts (that with the highest token) first."""
        found = [pod for entry in self.spec.rollouts for pod in entry.pods if pod.uid == pod_uid]
        return sorted(found, key=lambda pod: -pod.token)

    def assigned(self, pod_uid: str) -> PodAssignment | None:
        """The assignment that counts."""
        return next(iter(self.assignments(pod_uid)), None)


@dataclass(frozen=True, slots=True)
class Version:
    """A WeightVersion."""

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
    """A WeightRollout."""

    uid: str
    name: str
    namespace: str
    generation: int
    resource_version: str
    created_at: str
    spec: WeightRolloutSpec
    status: WeightRolloutStatus = field(default_factory=WeightRolloutStatus)
    terminating: bool = False

    @property
    def age_key(self) -> tuple[str, str]:
        """Sorts the older of two rollouts first."""
        return (self.created_at, self.uid)


@dataclass(frozen=True)
class Observed:
    """All that is seen at one time. It may be older than the truth; writes are fenced for that reason."""

    rollouts: Sequence[Rollout] = ()
    versions: Sequence[Version] = ()
    nodes: Mapping[str, Node] = field(default_factory=dict)
    agents: Mapping[str, bool] = field(default_factory=dict)  # node → whether its agent's pod is Ready
    states: Mapping[str, NodeState] = field(default_factory=dict)
    pods: Sequence[Pod] = ()

    @cached_property
    def pods_by_node(self) -> Mapping[str, Sequence[Pod]]:
        """The opted-in pods of each node."""
        found: dict[str, list[Pod]] = {}
        for pod in self.pods:
            found.setdefault(pod.node, []).append(pod)
        return found

    @cached_property
    def pods_by_uid(self) -> Mapping[str, Pod]:
        """The opted-in pods by UID."""
        return {pod.uid: pod for pod in self.pods}

    @cached_property
    def claims(self) -> Mapping[str, Rollout]:
        """Pod UID → the rollout that it belongs to: the oldest one that selects it."""
        return _claims(self.rollouts, self.pods)

    def follows(self, node: str) -> bool:
        """Whether the node is Ready and its agent is Ready and has spoken: only then its word counts."""
        known, state = self.nodes.get(node), self.states.get(node)
        has_spoken = state is not None and bool(state.status.boot_id)
        return known is not None and known.ready and self.agents.get(node, False) and has_spoken

    def version(self, namespace: str, name: str) -> Version | None:
        """A WeightVersion by name, unless it is being deleted."""
        found = (v for v in self.versions if (v.namespace, v.name) == (namespace, name) and not v.terminating)
        return next(found, None)


def confirmed(
    pod: Pod,
    engine: EngineStatus | None,
    digest: str,
    confirmed_at: datetime | None,
    phases: frozenset[str] = SETTLED_PHASES,
) -> bool:
    """Whether the engine confirmed this digest in this life of its container: the only proof that a pod serves it."""
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


def _claims(rollouts: Sequence[Rollout], pods: Iterable[Pod]) -> dict[str, Rollout]:
    """Pod UID → the rollout that it belongs to."""
    by_namespace: dict[str, list[Rollout]] = {}
    for rollout in sorted(rollouts, key=lambda r: r.age_key):
        if not rollout.terminating:
            by_namespace.setdefault(rollout.namespace, []).append(rollout)
    found: dict[str, Rollout] = {}
    for pod in pods:
        for rollout in by_namespace.get(pod.namespace, ()):
            if selects(rollout.spec.target.selector, pod.labels):
                found[pod.uid] = rollout
                break
    return found
