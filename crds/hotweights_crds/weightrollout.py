"""WeightRollout: which version the selected pods are to serve, and how they get there.

It lives as long as the fleet does. A release changes ``spec.versionRef`` and nothing else, so that
GitOps is natural and setting it back is the rollback. The status is bounded whatever the size of
the fleet: counts, at most 20 failures, a short history.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from hotweights_crds.base import Model
from hotweights_crds.conditions import Condition
from hotweights_crds.structural import IntOrPercent, atomic, cel, list_map

MAX_FAILURES = 20
MAX_HISTORY = 10
MAX_HELD = 4

Transport = Literal["Auto", "TCP", "UCX", "MPI"]
Phase = Literal[
    "Pending", "Resolving", "Staging", "Activating", "Paused", "Complete", "Stalled", "Aborted"
]
Operator = Literal["In", "NotIn", "Exists", "DoesNotExist"]
LabelValue = Annotated[str, Field(max_length=63)]


class VersionRef(Model):
    """Names a WeightVersion of the same namespace."""

    name: str = Field(
        description="Name of the WeightVersion; it may be created later.",
        min_length=1,
        max_length=253,
    )


_SHOWN = "'hotweights.dev/version', 'hotweights.dev/digest'"
_SHOWN_MESSAGE = (
    "hotweights.dev/version and hotweights.dev/digest change with what a pod serves: select "
    "by other labels"
)


class Requirement(Model):
    """One expression of a label selector."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            "self.operator in ['In', 'NotIn'] ? has(self.values) && size(self.values) > 0 : "
            "!has(self.values) || size(self.values) == 0",
            "In and NotIn need values, Exists and DoesNotExist take none",
        )
    )

    key: str = Field(
        description="Label key.",
        min_length=1,
        max_length=317,
        json_schema_extra=cel(f"!(self in [{_SHOWN}])", _SHOWN_MESSAGE),
    )
    operator: Operator = Field(description="In, NotIn, Exists or DoesNotExist.")
    values: list[LabelValue] = Field(
        default_factory=list,
        description="Values for In and NotIn.",
        max_length=32,
        json_schema_extra=atomic(),
    )


class LabelSelector(Model):
    """As in meta/v1: all of it must match."""

    match_labels: dict[str, LabelValue] = Field(
        default_factory=dict,
        description="Labels that a pod must have.",
        json_schema_extra={
            "maxProperties": 32,
            **cel(f"!self.exists(key, key in [{_SHOWN}])", _SHOWN_MESSAGE),
        },
    )
    match_expressions: list[Requirement] = Field(
        default_factory=list,
        description="Expressions that a pod's labels must satisfy.",
        max_length=16,
        json_schema_extra=atomic(),
    )


class Target(Model):
    """The pods to update."""

    selector: LabelSelector = Field(
        description="Selects pods of this namespace that carry hotweights.dev/inject=true.",
        json_schema_extra=cel(
            "(has(self.matchLabels) && size(self.matchLabels) > 0) || "
            "(has(self.matchExpressions) && size(self.matchExpressions) > 0)",
            "an empty selector would select every pod: write at least one label into "
            "target.selector.matchLabels",
        ),
    )


class Rolling(Model):
    """Settings of the strategy Rolling."""

    max_unavailable: IntOrPercent = Field(
        default=1,
        description="How many of the selected pods may be unavailable at once, as a number or a "
        "percentage (rounded down, at least 1).",
        json_schema_extra=cel(
            "type(self) == int ? self > 0 : self.matches('^([1-9][0-9]?|100)%$')",
            "write a number of at least 1 or a percentage from 1% to 100%",
        ),
    )


class Strategy(Model):
    """In which order pods change version."""

    type: Literal["Rolling", "AllAtOnce"] = Field(
        default="Rolling",
        description="Rolling: within a budget of unavailable pods. AllAtOnce: as soon as every pod is "
        "prepared.",
    )
    rolling: Rolling | None = Field(default=None, description="Only with type Rolling.")


class Staging(Model):
    """How the bytes reach the nodes."""

    origin_readers: int = Field(
        default=1,
        description="How many nodes read the source; the others pull from them in chains.",
        ge=1,
        le=64,
    )
    timeout_seconds: int = Field(
        default=1800, description="How long a node may take to stage a version.", ge=1, le=86400
    )
    transport: Transport = Field(
        default="Auto",
        description="What carries bytes between nodes. Auto: what they measured as fastest. UCX: "
        "where both sides have it, else TCP. MPI: one broadcast to all nodes that have it; what it "
        "does not bring is pulled over TCP.",
    )


class Activation(Model):
    """What happens to a pod when its version changes."""

    mode: Literal["Keep", "Wait", "Abort"] = Field(
        default="Keep",
        description="Running requests are kept and go on with the new weights (Keep), may end "
        "first (Wait), or are aborted (Abort).",
    )
    drain_timeout_seconds: int = Field(
        default=30,
        description="With Wait: how long running requests may take to end.",
        ge=1,
        le=3600,
    )
    commit_timeout_seconds: int = Field(
        default=60,
        description="Bound of the pause itself; an engine that exceeds it is repaired or "
        "restarted.",
        ge=1,
        le=600,
    )
    memory: Literal["Auto", "Beside", "Host", "InPause"] = Field(
        default="Auto",
        description="Where a version waits for its commit: on the device beside the model (Beside), "
        "in the host's memory (Host, on GPUs), or nowhere: it is loaded inside the pause (InPause). "
        "Auto: whichever there is room for, the shortest pause first.",
    )
    max_pause_seconds: int = Field(
        default=0,
        description="How long a pause may be in which the version is loaded; 0: none may. Without "
        "it, a pod that has no room for a second copy refuses the version.",
        ge=0,
        le=600,
    )
    probe: Literal["Any", "Golden"] = Field(
        default="Any",
        description="What a version needs before a pod takes it for the first time. Golden: golden "
        "tokens for the pod's kind of engine (hotweights publish --record-probes); a pod without "
        "them fails before anything is prepared. What was complete before is not asked again.",
    )


class FailurePolicy(Model):
    """What happens when pods or nodes fail to follow."""

    max_failed: int = Field(
        default=0, description="How many pods may fail before the action is taken.", ge=0, le=100000
    )
    action: Literal["Pause", "Abort"] = Field(
        default="Pause",
        description="Pause: no further pod is activated until the version or the policy changes, or a "
        "retry is asked for. Abort: the revision is given up; every pod keeps what it serves.",
    )


class WeightRolloutSpec(Model):
    """What the selected pods are to serve."""

    version_ref: VersionRef = Field(
        description="The WeightVersion to serve: the only field that a release changes."
    )
    target: Target = Field(
        description="The pods to update. Immutable.",
        json_schema_extra=cel(
            "self == oldSelf", "target is immutable: create another WeightRollout for other pods"
        ),
    )
    strategy: Strategy = Field(
        default_factory=Strategy,
        description="In which order pods change version.",
        json_schema_extra={
            "default": {"type": "Rolling"},
            **cel(
                "self.type == 'Rolling' || !has(self.rolling)",
                "strategy.rolling goes with type Rolling: remove it or set type to Rolling",
            ),
        },
    )
    staging: Staging = Field(default_factory=Staging, description="How the bytes reach the nodes.")
    activation: Activation = Field(
        default_factory=Activation,
        description="What happens to a pod when its version changes.",
        json_schema_extra=cel(
            "self.maxPauseSeconds <= self.commitTimeoutSeconds && "
            "(self.memory != 'InPause' || self.maxPauseSeconds > 0)",
            "write an activation.maxPauseSeconds that is not above activation.commitTimeoutSeconds, "
            "and above 0 with memory InPause",
        ),
    )
    failure_policy: FailurePolicy = Field(
        default_factory=FailurePolicy, description="What happens when pods fail to follow."
    )
    progress_deadline_seconds: int = Field(
        default=600,
        description="Without progress for so long the rollout is Stalled; paused time does not "
        "count.",
        ge=1,
        le=86400,
    )
    min_ready_seconds: int = Field(
        default=0,
        description="How long a pod that changed must be Ready before it counts as available and "
        "the next one changes.",
        ge=0,
        le=86400,
    )
    paused: bool = Field(
        default=False, description="True: nothing further is staged, prepared or activated."
    )


class VersionStatus(Model):
    """A version as the rollout knows it."""

    name: str = Field(default="", description="Name of the WeightVersion.", max_length=253)
    version: str = Field(default="", description="Its version.", max_length=63)
    digest: str = Field(default="", description="Its digest.", max_length=71)


class Counts(Model):
    """Pods by what they serve. Only what an engine confirmed after its last start counts as
    updated.
    """

    desired: int = Field(default=0, description="Selected pods.")
    prepared: int = Field(
        default=0, description="Of them, holding the version ready to commit, or serving it."
    )
    updated: int = Field(default=0, description="Of them, serving the rollout's version.")
    ready: int = Field(default=0, description="Of the updated ones, Ready.")
    golden: int = Field(
        default=0,
        description="Of the updated ones, proved by golden tokens: they answered as a cold load of "
        "the version does.",
    )
    ran: int = Field(
        default=0,
        description="Of the updated ones, proved by a probe without NaN: the version has no golden "
        "tokens for their kind of engine.",
    )
    available: int = Field(
        default=0, description="Selected pods that are Ready, whatever version they serve."
    )
    failed: int = Field(default=0, description="Pods that failed to follow.")


class NodeCounts(Model):
    """Nodes by what they hold."""

    desired: int = Field(default=0, description="Nodes with selected pods.")
    staged: int = Field(
        default=0, description="Of them, holding the version completely and verified."
    )
    summary: str = Field(default="", description="staged/desired.", max_length=16)


class ByteCounts(Model):
    """Bytes over all nodes."""

    total: int = Field(default=0, description="Bytes to stage.")
    done: int = Field(default=0, description="Bytes staged and verified.")


class HighWater(Model):
    """The furthest that a revision has come: going back and forth below it is no progress."""

    desired: int = Field(default=0, description="Pods that were selected.")
    nodes: int = Field(default=0, description="Nodes that held the version.")
    nbytes: int = Field(default=0, description="Bytes that were staged.")
    prepared: int = Field(default=0, description="Pods that had prepared or served it.")
    updated: int = Field(default=0, description="Pods that served it.")
    ready: int = Field(default=0, description="Pods that served it and were Ready.")


class Failure(Model):
    """One pod or node that does not follow."""

    pod: str = Field(default="", description="Name of the pod.", max_length=253)
    pod_uid: str = Field(
        default="",
        description="Its UID: a new pod of the same name has failed nothing.",
        max_length=63,
    )
    node: str = Field(default="", description="Name of the node.", max_length=253)
    reason: str = Field(default="", description="One CamelCase word.", max_length=64)
    message: str = Field(default="", description="What happened and what to do.", max_length=512)


class HistoryEntry(Model):
    """How an earlier revision ended."""

    revision: int = Field(description="Its number.")
    version: str = Field(default="", description="Its version.", max_length=63)
    outcome: Literal["Complete", "Superseded", "Aborted"] = Field(description="How it ended.")
    started_at: str = Field(default="", description="When it began (RFC 3339).", max_length=32)
    finished_at: str = Field(default="", description="When it ended (RFC 3339).", max_length=32)


class WeightRolloutStatus(Model):
    """How far the rollout is; bounded whatever the size of the fleet."""

    observed_generation: int = Field(
        default=0, description="The generation that this status speaks of."
    )
    phase: Phase = Field(
        default="Pending", description="A summary for people; programs read the conditions."
    )
    message: str = Field(
        default="", description="One sentence: what it does or what it waits for.", max_length=1024
    )
    revision: int = Field(default=0, description="Grows with every change of version.")
    revision_started_at: str = Field(
        default="", description="When this revision began (RFC 3339).", max_length=32
    )
    last_progress_at: str = Field(
        default="", description="When it last made progress (RFC 3339).", max_length=32
    )
    aborted_revision: int = Field(default=0, description="The last revision that was given up.")
    prepared_revision: int = Field(
        default=0,
        description="The last revision that every pod which could had prepared: from then on each "
        "pod waits for itself only.",
    )
    goes_back: bool = Field(
        default=False,
        description="This revision goes to a version that was complete last or before that: all "
        "pods prepare it at once.",
    )
    most_failed: int = Field(
        default=0, description="The most pods that had failed in this revision at one time."
    )
    retried: str = Field(
        default="",
        description="The value of the annotation hotweights.dev/retry that was answered last.",
        max_length=128,
    )
    high_water: HighWater = Field(
        default_factory=HighWater, description="The furthest that this revision has come."
    )
    target: VersionStatus = Field(
        default_factory=VersionStatus, description="The version being rolled out, or served."
    )
    stable: VersionStatus = Field(
        default_factory=VersionStatus,
        description="What was complete last. It stays staged, and new pods and repairs get it "
        "while the rollout holds.",
    )
    previous: VersionStatus = Field(
        default_factory=VersionStatus,
        description="What was complete before the target, and stays staged for the rollback; "
        "empty: nothing was.",
    )
    held: list[VersionStatus] = Field(
        default_factory=list,
        description="What else stays staged on every node.",
        max_length=MAX_HELD,
        json_schema_extra=atomic(),
    )
    pods: Counts = Field(default_factory=Counts, description="Pods by what they serve.")
    nodes: NodeCounts = Field(default_factory=NodeCounts, description="Nodes by what they hold.")
    nbytes: ByteCounts = Field(default_factory=ByteCounts, description="Bytes over all nodes.")
    progress: str = Field(default="", description="updated/desired.", max_length=16)
    staged_percent: str = Field(default="", description="Share of the bytes staged.", max_length=8)
    rollback: Literal["", "Local", "NotLocal"] = Field(
        default="",
        description="Whether every node still holds the previous version, so that going back needs no "
        "network.",
    )
    failures: list[Failure] = Field(
        default_factory=list,
        description="The first failures.",
        max_length=MAX_FAILURES,
        json_schema_extra=atomic(),
    )
    failures_total: int = Field(default=0, description="Number of all failures.")
    history: list[HistoryEntry] = Field(
        default_factory=list,
        description="Earlier revisions, the newest first.",
        max_length=MAX_HISTORY,
        json_schema_extra=atomic(),
    )
    conditions: list[Condition] = Field(
        default_factory=list,
        description="Ready, Progressing, Available, Staged, Paused, VersionResolved, TargetsFound, "
        "Reconciling, Stalled.",
        max_length=12,
        json_schema_extra=list_map("type"),
    )
