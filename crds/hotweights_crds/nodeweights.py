"""NodeWeights: what one node is to hold and serve (by the operator), and what it does hold and
serve (by its agent).

One small object per node, named like it, in the installation's namespace. Each rollout applies its
own entry of ``spec.rollouts`` under a field manager of its own, so that two rollouts on a node
never lose each other's writes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hotweights_crds.base import Model
from hotweights_crds.conditions import Condition
from hotweights_crds.structural import atomic, list_map

UNASSIGNED = "unassigned"  # no UID looks like it

MAX_ROLLOUTS = 128
"""Entries in ``spec.rollouts``. Whoever writes a bounded list cuts it and says so; the API server
refuses a longer one.
"""
MAX_STAGE = 16
MAX_PODS = 512  # a kubelet runs 110 pods unless it is told otherwise
MAX_RESOLVE = 64
MAX_STAGED = 256
MAX_ENGINES = 512  # a pod has one, and `MAX_PODS` is for each rollout
MAX_TOKEN = 2**53 - 1
"""What every reader of JSON takes as an integer."""

PEER_KEY = r"^(ed25519:[A-Za-z0-9+/]{43}=)?$"
"""``ed25519:`` and the base64 of the 32 bytes of a public key (RFC 8032), or nothing."""

NodeName = Annotated[str, Field(max_length=253)]

StagePhase = Literal["Waiting", "Fetching", "Staged", "Failed"]
ProbeStrength = Literal["", "Golden", "Ran", "None"]
EnginePhase = Literal[
    "Disconnected",
    "Booting",
    "Serving",
    "Preparing",
    "Prepared",
    "Committing",
    "Refused",
    "Failed",
    "Dirty",
]


class Endpoint(Model):
    """One transport of an agent."""

    scheme: str = Field(description="tcp, ucx or mpi.", max_length=16)
    endpoint: str = Field(
        default="", description="Where peers reach it by that; empty: not at all.", max_length=256
    )
    megabytes_per_second: int = Field(
        default=0,
        description="Measured over loopback when the agent started; 0: there was nothing to "
        "choose.",
    )
    message: str = Field(
        default="", description="What carries it, or why it is not there.", max_length=512
    )


class Peer(Model):
    """Another node's agent."""

    node: str = Field(description="Name of the node.", max_length=253)
    endpoint: str = Field(
        description="tcp://address:port or ucx://address:port of its agent.", max_length=256
    )
    key: str = Field(
        default="",
        description="Public key of its agent, which has to prove that it has it before it is shown "
        "a token; empty: it is not asked to.",
        max_length=64,
        pattern=PEER_KEY,
    )


class Collective(Model):
    """One MPI job that brings a version to several nodes at once."""

    name: str = Field(description="Names the job.", max_length=128)
    head: str = Field(description="mpi://address:port of the first member's agent.", max_length=256)
    head_key: str = Field(
        default="",
        description="Public key of that agent, as in parents.",
        max_length=64,
        pattern=PEER_KEY,
    )
    members: list[NodeName] = Field(
        description="Names of the nodes in the order of their ranks; the first one reads the "
        "source.",
        min_length=2,
        max_length=64,
        json_schema_extra=atomic(),
    )
    base: str = Field(
        default="",
        description="A version that all of them hold: what it has too is not sent.",
        max_length=71,
    )


class StageItem(Model):
    """One version that the node is to hold."""

    digest: str = Field(description="Digest of the manifest.", max_length=71)
    namespace: str = Field(
        description="Namespace of the WeightVersion; decides which roots may be read.",
        max_length=63,
    )
    model: str = Field(default="", description="Its model.", max_length=63)
    version: str = Field(default="", description="Its version.", max_length=63)
    uri: str = Field(description="Its source: the last resort of every node.", max_length=1024)
    parents: list[Peer] = Field(
        default_factory=list,
        description="Whom to pull from, in this order; none: read the source.",
        max_length=8,
        json_schema_extra=atomic(),
    )
    fallbacks: list[Peer] = Field(
        default_factory=list,
        description="Who else can serve it: before the source is read, or after it where there "
        "are no parents.",
        max_length=8,
        json_schema_extra=atomic(),
    )
    collective: Collective | None = Field(
        default=None,
        description="Get it together with others; what that does not bring is pulled as above.",
    )
    timeout_seconds: int = Field(default=1800, description="How long staging may take.", ge=1)


class PodAssignment(Model):
    """Which version one pod is to serve."""

    uid: str = Field(description="The pod's UID.", max_length=63)
    name: str = Field(description="The pod's name.", max_length=253)
    namespace: str = Field(description="The pod's namespace.", max_length=63)
    token: int = Field(
        default=0,
        description="Grows with every change; an agent refuses a lower one.",
        ge=0,
        le=MAX_TOKEN,
    )
    rollout: str = Field(
        default="",
        description="UID of the rollout that this is of; empty: of none, or said by a release "
        "before 0.2.",
        max_length=63,
    )
    revision: int = Field(
        default=0,
        description="Its revision that this is of: what an engine gave up is tried again in "
        "another one.",
        ge=0,
        le=MAX_TOKEN,
    )
    restarts: int = Field(
        default=0,
        description="How often the engine's container had restarted when this was written: more "
        "since then speak against it.",
        ge=0,
        le=MAX_TOKEN,
    )
    ended_preparing: int = Field(
        default=0,
        description="How often that container ended in this revision while it was asked to "
        "prepare: twice speaks against the version.",
        ge=0,
        le=MAX_TOKEN,
    )
    digest: str = Field(
        default="",
        description="The version to serve; empty: keep what the engine booted.",
        max_length=71,
    )
    version: str = Field(default="", description="Its name, for the pod's label.", max_length=63)
    prepare: str = Field(
        default="", description="A version to prepare now and to commit later.", max_length=71
    )
    golden: str = Field(
        default="",
        description="A version that the pod takes only if it has golden tokens for this kind of "
        "engine; empty: there is none such.",
        max_length=71,
    )
    mode: Literal["Keep", "Wait", "Abort"] = Field(
        default="Keep", description="What happens to running requests."
    )
    drain_timeout_seconds: int = Field(
        default=30, description="With Wait: how long running requests may take."
    )
    commit_timeout_seconds: int = Field(default=60, description="Bound of the pause.")
    memory: Literal["Auto", "Beside", "Host", "InPause"] = Field(
        default="Auto", description="Where a version waits for its commit."
    )
    max_pause_seconds: int = Field(
        default=0, description="How long a pause may be in which it is loaded; 0: none may.", ge=0
    )


class RolloutAssignment(Model):
    """All that one rollout wants of this node."""

    uid: str = Field(
        description="The rollout's UID; 'unassigned' for opted-in pods without a rollout.",
        max_length=63,
    )
    namespace: str = Field(default="", description="The rollout's namespace.", max_length=63)
    name: str = Field(default="", description="The rollout's name.", max_length=253)
    stage: list[StageItem] = Field(
        default_factory=list,
        description="Versions to hold.",
        max_length=MAX_STAGE,
        json_schema_extra=list_map("digest"),
    )
    pods: list[PodAssignment] = Field(
        default_factory=list,
        description="What each pod is to serve.",
        max_length=MAX_PODS,
        json_schema_extra=list_map("uid"),
    )


class ResolveItem(Model):
    """A WeightVersion whose source this agent is to read."""

    uid: str = Field(description="UID of the WeightVersion.", max_length=63)
    namespace: str = Field(description="Its namespace.", max_length=63)
    name: str = Field(description="Its name.", max_length=253)
    model: str = Field(description="Its model.", max_length=63)
    version: str = Field(description="Its version.", max_length=63)
    uri: str = Field(description="Its source.", max_length=1024)
    digest: str = Field(
        default="",
        description="The digest that it must have; empty: what is found counts.",
        max_length=71,
    )


class NodeWeightsSpec(Model):
    """Written by the operator."""

    node_name: str = Field(
        default="",
        description="The node; set when the object is made, so that its spec is never empty.",
        max_length=253,
    )
    rollouts: list[RolloutAssignment] = Field(
        default_factory=list,
        description="What each rollout wants.",
        max_length=MAX_ROLLOUTS,
        json_schema_extra=list_map("uid"),
    )
    resolve: list[ResolveItem] = Field(
        default_factory=list,
        description="Sources to read.",
        max_length=MAX_RESOLVE,
        json_schema_extra=list_map("uid"),
    )


class StagedVersion(Model):
    """One version on this node."""

    digest: str = Field(description="Digest of the manifest.", max_length=71)
    version: str = Field(default="", description="Its version.", max_length=63)
    phase: StagePhase = Field(description="Staged: complete and every chunk verified.")
    bytes_done: int = Field(default=0, description="Verified bytes.")
    bytes_total: int = Field(default=0, description="Bytes of the version.")
    bytes_fetched: int = Field(
        default=0, description="Bytes that came from peers or the source; the rest was here."
    )
    seconds: float = Field(default=0.0, description="How long it took.")
    reason: str = Field(default="", description="One CamelCase word when it failed.", max_length=64)
    message: str = Field(
        default="", description="How it came, or what went wrong and what to do.", max_length=512
    )


class GivenUp(Model):
    """A version that an engine was asked to take and will not be asked again in the same revision
    of the same rollout.
    """

    digest: str = Field(description="The version.", max_length=71)
    rollout: str = Field(
        default="",
        description="UID of the rollout of the assignment that it failed for.",
        max_length=63,
    )
    revision: int = Field(
        default=0, description="The revision of the assignment that it failed for.", ge=0
    )
    token: int = Field(default=0, description="The token of that assignment.", ge=0)
    step: Literal["Prepare", "Commit"] = Field(description="Where it failed.")
    booting: bool = Field(
        default=False, description="Whether the engine was still to open its port."
    )
    reason: str = Field(default="", description="One CamelCase word.", max_length=64)
    message: str = Field(default="", description="What happened and what to do.", max_length=512)


class EngineStatus(Model):
    """One engine on this node. ``digest`` is only ever what it confirmed in its current life, with
    the probe passed.
    """

    pod_uid: str = Field(description="UID of its pod.", max_length=63)
    pod: str = Field(default="", description="namespace/name of its pod.", max_length=317)
    phase: EnginePhase = Field(description="What it does.")
    digest: str = Field(
        default="", description="What it confirmed; empty: what it booted.", max_length=71
    )
    version: str = Field(default="", description="The name of that.", max_length=63)
    prepared: str = Field(
        default="", description="The digest that every rank has prepared.", max_length=71
    )
    way: str = Field(
        default="",
        description="How that waits for its commit: Beside (a finished copy on the device), Host (in "
        "the host's memory), InPause (it is loaded in the pause), Reload (vLLM's own reload); empty: "
        "nobody says.",
        max_length=16,
    )
    token: int = Field(default=0, description="The assignment's token that this answers.")
    confirmed_at: str = Field(
        default="", description="When it confirmed (RFC 3339, this node's clock).", max_length=32
    )
    probe: ProbeStrength = Field(
        default="",
        description="What proved that it serves it. Golden: it answered the tokens of a cold load. "
        "Ran: there were none for this kind of engine, it answered without NaN. None: nothing was "
        "asked. Empty: nothing is confirmed, or its plugin does not say.",
    )
    kind: str = Field(
        default="",
        description="What golden tokens must have been recorded with to be compared here; empty: "
        "not known, or its agent does not say.",
        max_length=128,
    )
    pause_seconds: float = Field(default=0.0, description="How long its last commit paused it.")
    failed: GivenUp | None = Field(
        default=None,
        description="The version that it gave up last in its present life; absent once it serves "
        "or has prepared that one.",
    )
    reason: str = Field(
        default="", description="One CamelCase word when it refused or failed.", max_length=64
    )
    message: str = Field(default="", description="What happened and what to do.", max_length=512)


class ResolvedVersion(Model):
    """What reading a source gave."""

    uid: str = Field(description="UID of the WeightVersion.", max_length=63)
    digest: str = Field(
        default="", description="Digest of the manifest; empty when it failed.", max_length=71
    )
    nbytes: int = Field(default=0, description="Bytes of all tensors.")
    tensors: int = Field(default=0, description="Number of tensors.")
    chunks: int = Field(default=0, description="Number of chunks.")
    reason: str = Field(default="", description="One CamelCase word when it failed.", max_length=64)
    message: str = Field(default="", description="What happened and what to do.", max_length=512)


class Capacity(Model):
    """Memory for versions."""

    memory_bytes: int = Field(default=0, description="What the agent may use.")
    free_bytes: int = Field(default=0, description="What is left of it.")
    free: str = Field(default="", description="The same for people.", max_length=16)


class NodeWeightsStatus(Model):
    """Written by the node's agent alone."""

    observed_generation: int = Field(
        default=0, description="The generation that this status speaks of."
    )
    boot_id: str = Field(
        default="",
        description="Changes when the agent starts; of what was staged it has what its keeper held.",
        max_length=63,
    )
    agent_version: str = Field(default="", description="Version of the agent.", max_length=63)
    endpoint: str = Field(
        default="", description="tcp://address:port at which peers reach it.", max_length=256
    )
    endpoints: list[Endpoint] = Field(
        default_factory=list,
        description="The same for each transport.",
        max_length=8,
        json_schema_extra=list_map("scheme"),
    )
    peer_key: str = Field(
        default="",
        description="Public key of this start of the agent, with which it proves to peers at all of "
        "these who it is: ed25519:<base64>; empty: it does not.",
        max_length=64,
        pattern=PEER_KEY,
    )
    capacity: Capacity = Field(default_factory=Capacity, description="Memory for versions.")
    staged: list[StagedVersion] = Field(
        default_factory=list,
        description="Versions on this node.",
        max_length=MAX_STAGED,
        json_schema_extra=list_map("digest"),
    )
    engines: list[EngineStatus] = Field(
        default_factory=list,
        description="Engines on this node.",
        max_length=MAX_ENGINES,
        json_schema_extra=list_map("podUID"),
    )
    resolved: list[ResolvedVersion] = Field(
        default_factory=list,
        description="What reading sources gave.",
        max_length=MAX_RESOLVE,
        json_schema_extra=list_map("uid"),
    )
    summary: str = Field(
        default="", description="engines on their assigned version/engines.", max_length=32
    )
    left_out: str = Field(
        default="",
        description="What did not fit into the lists above and is not in them.",
        max_length=256,
    )
    conditions: list[Condition] = Field(
        default_factory=list,
        description="Ready: the agent follows.",
        max_length=8,
        json_schema_extra=list_map("type"),
    )
