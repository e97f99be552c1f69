"""What a WeightRollout says of itself: counts, names, and what its operator must remember because the
fleet does not show it. Bounded whatever the size of the fleet.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hotweights_crds.analysis import AnalysisStatus
from hotweights_crds.base import Model
from hotweights_crds.conditions import Condition
from hotweights_crds.rollout_strategy import MAX_WINDOW
from hotweights_crds.structural import atomic, list_map

MAX_FAILURES = 20
MAX_HISTORY = 10
MAX_HELD = MAX_WINDOW + 1
"""The rollback window, and what one came from on the way back."""
MAX_COMMAND = 256
"""Characters of a command that are read."""

Phase = Literal[
    "Pending",
    "Resolving",
    "Staging",
    "Activating",
    "Paused",
    "Complete",
    "Stalled",
    "Aborted",
    "RolledBack",
]


class VersionStatus(Model):
    """A version as the rollout knows it."""

    name: str = Field(default="", description="Name of the WeightVersion.", max_length=253)
    version: str = Field(default="", description="Its version.", max_length=63)
    digest: str = Field(default="", description="Its digest.", max_length=71)


class CanaryStatus(Model):
    """Where the revision is in its canary's steps. Without a canary, all is 0 and empty."""

    step: int = Field(
        default=0, description="Index of the current step; as many as there are: all are done."
    )
    steps: int = Field(default=0, description="How many there are.")
    step_started_at: str = Field(
        default="", description="When the current step began (RFC 3339).", max_length=32
    )
    allowed: int = Field(default=0, description="How many pods may serve the version now.")
    waits_for: Literal["", "Promotion", "Time", "Pods", "Analysis"] = Field(
        default="", description="What ends the current step; empty: there is none."
    )


class CommandStatus(Model):
    """What came of the annotation hotweights.dev/command."""

    text: str = Field(
        default="", description="The command as it was written.", max_length=MAX_COMMAND
    )
    verb: str = Field(default="", description="What it asks for.", max_length=32)
    revision: int = Field(default=0, description="The revision that it speaks of.")
    outcome: Literal["", "Done", "Refused"] = Field(
        default="", description="Whether it was done; empty: there was none."
    )
    message: str = Field(
        default="", description="What was done, or why not and what to do.", max_length=512
    )
    at: str = Field(default="", description="When it was answered (RFC 3339).", max_length=32)


class RolledBack(Model):
    """A way back that spec.versionRef does not know of. Its end is another spec.versionRef, or a
    retry. Empty: there is none.
    """

    from_: str = Field(
        default="",
        description="What spec.versionRef named when it began.",
        max_length=253,
    )
    to: VersionStatus = Field(
        default_factory=VersionStatus, description="What the pods serve instead."
    )
    by: Literal["", "Command", "FailurePolicy", "Analysis", "Deadline"] = Field(
        default="", description="Who began it."
    )
    reason: str = Field(default="", description="One CamelCase word.", max_length=64)
    message: str = Field(default="", description="Why.", max_length=512)
    at: str = Field(default="", description="When it began (RFC 3339).", max_length=32)


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
    outcome: Literal["Complete", "Superseded", "Aborted", "RolledBack"] = Field(
        description="How it ended."
    )
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
    paused_by: Literal["", "Command"] = Field(
        default="",
        description="Who paused this revision beside spec.paused; it ends with a resume, or with "
        "the revision.",
    )
    canary: CanaryStatus = Field(
        default_factory=CanaryStatus, description="Where the revision is in its canary's steps."
    )
    analysis: AnalysisStatus = Field(
        default_factory=AnalysisStatus,
        description="What was measured of the canary, in this step or in the last one that measures.",
    )
    rolled_back: RolledBack = Field(
        default_factory=RolledBack,
        description="The way back that spec.versionRef does not know of; empty: there is none.",
    )
    last_command: CommandStatus = Field(
        default_factory=CommandStatus,
        description="What came of the annotation hotweights.dev/command.",
    )
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
    earlier: list[VersionStatus] = Field(
        default_factory=list,
        description="What was complete before the stable version, the newest first: what a "
        "rollback can name.",
        max_length=MAX_WINDOW,
        json_schema_extra=atomic(),
    )
    held: list[VersionStatus] = Field(
        default_factory=list,
        description="What else stays staged on every node: the rollback window.",
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
