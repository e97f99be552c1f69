"""WeightRollout: which version the selected pods are to serve, and how they get there.

It lives as long as the fleet does. A release changes ``spec.versionRef`` and nothing else, so that
GitOps is natural and setting it back is the rollback. The status is bounded whatever the size of
the fleet: counts, at most 20 failures, a short history.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from hotweights_crds.base import Model
from hotweights_crds.rollout_status import (
    MAX_COMMAND,
    MAX_FAILURES,
    MAX_HELD,
    MAX_HISTORY,
    ByteCounts,
    CanaryStatus,
    CommandStatus,
    Counts,
    Failure,
    HighWater,
    HistoryEntry,
    NodeCounts,
    Phase,
    RolledBack,
    VersionStatus,
    WeightRolloutStatus,
)
from hotweights_crds.rollout_strategy import (
    MAX_STEPS,
    MAX_WINDOW,
    STEP_KINDS,
    Canary,
    CanaryStep,
    FailurePolicy,
    Pause,
    RollbackWindow,
    Rolling,
    Strategy,
)
from hotweights_crds.structural import atomic, cel

# the whole kind, for those who read or write one
__all__ = [
    "MAX_COMMAND",
    "MAX_FAILURES",
    "MAX_HELD",
    "MAX_HISTORY",
    "MAX_STEPS",
    "MAX_WINDOW",
    "STEP_KINDS",
    "Activation",
    "ByteCounts",
    "Canary",
    "CanaryStatus",
    "CanaryStep",
    "CommandStatus",
    "Counts",
    "Failure",
    "FailurePolicy",
    "HighWater",
    "HistoryEntry",
    "LabelSelector",
    "NodeCounts",
    "Operator",
    "Pause",
    "Phase",
    "Requirement",
    "RollbackWindow",
    "RolledBack",
    "Rolling",
    "Staging",
    "Strategy",
    "Target",
    "Transport",
    "VersionRef",
    "VersionStatus",
    "WeightRolloutSpec",
    "WeightRolloutStatus",
]

Transport = Literal["Auto", "TCP", "UCX", "MPI"]
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
    rollback_window: RollbackWindow = Field(
        default_factory=RollbackWindow,
        description="How far one can go back without the network.",
    )
    progress_deadline_seconds: int = Field(
        default=600,
        description="Without progress for so long the rollout is Stalled; paused time does not "
        "count, nor does a canary's pause.",
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
