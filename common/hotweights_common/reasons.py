"""Every reason that leaves a process: in a status, a frame, a metric's label or a printed error.

A reason is one CamelCase word that programs compare and people look up (docs/troubleshooting.md).
Here is the only list, with the sets of them that mean the same to somebody; a test holds every
reason that the product gives against it. The plugin inside vLLM cannot import this and spells its
reasons itself: the same test reads them.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """The words."""

    # Sources and what they hold
    SOURCE_NOT_ALLOWED = "SourceNotAllowed"
    BAD_URI = "BadURI"
    UNKNOWN_SCHEME = "UnknownScheme"
    SOURCE_NOT_FOUND = "SourceNotFound"
    SOURCE_UNREADABLE = "SourceUnreadable"
    SOURCE_CHANGED = "SourceChanged"
    SOURCE_TRUNCATED = "SourceTruncated"
    SOURCE_STALLED = "SourceStalled"
    CHECKSUM_MISMATCH = "ChecksumMismatch"
    DIGEST_MISMATCH = "DigestMismatch"
    BAD_CHECKPOINT = "BadCheckpoint"
    BAD_MANIFEST = "BadManifest"
    NO_MANIFEST = "NoManifest"

    # Bringing a version to a node
    TRANSFER_FAILED = "TransferFailed"
    FETCH_FAILED = "FetchFailed"
    CHUNK_MISSING = "ChunkMissing"
    STAGE_TIMEOUT = "StageTimeout"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    RESOLVE_TIMEOUT = "ResolveTimeout"
    RESOLVE_FAILED = "ResolveFailed"
    INSUFFICIENT_MEMORY = "InsufficientMemory"
    INCOMPLETE = "Incomplete"
    INPUT_OUTPUT_ERROR = "InputOutputError"
    ALREADY_STAGED = "AlreadyStaged"
    NOT_STAGED = "NotStaged"
    DISK_FULL = "DiskFull"
    CANNOT_WRITE = "CannotWrite"

    # Peers and broadcasts
    PEER_ERROR = "PeerError"
    PEER_UNREACHABLE = "PeerUnreachable"
    PEER_TIMEOUT = "PeerTimeout"
    PEER_REFUSED = "PeerRefused"
    PEER_UNPROVEN = "PeerUnproven"
    PEER_MISSING = "PeerMissing"
    PEER_PROTOCOL_ERROR = "PeerProtocolError"
    PROTOCOL_ERROR = "ProtocolError"
    TOKEN_INVALID = "TokenInvalid"
    AUTHENTICATION_UNAVAILABLE = "AuthenticationUnavailable"
    TRANSPORT_UNAVAILABLE = "TransportUnavailable"
    TRANSPORT_UNUSABLE = "TransportUnusable"
    NO_TRANSPORT = "NoTransport"
    MPI_UNAVAILABLE = "MpiUnavailable"
    MPI_FAILED = "MpiFailed"
    LAUNCH_REFUSED = "LaunchRefused"
    RANK_MISSING = "RankMissing"

    # Engines: what a plugin answers, and what a node finds about them
    BUSY = "Busy"
    DRAIN_TIMEOUT = "DrainTimeout"
    NOT_PREPARED = "NotPrepared"
    COMMIT_FAILED = "CommitFailed"
    LOAD_FAILED = "LoadFailed"
    MAP_FAILED = "MapFailed"
    PREPARE_TIMEOUT = "PrepareTimeout"
    COMMIT_TIMEOUT = "CommitTimeout"
    KEEP_TIMEOUT = "KeepTimeout"
    UNKNOWN_TENSOR = "UnknownTensor"
    MISSING_TENSOR = "MissingTensor"
    SHAPE_MISMATCH = "ShapeMismatch"
    DTYPE_MISMATCH = "DtypeMismatch"
    CONFIG_DIFFERS = "ConfigDiffers"
    ENGINE_UNSUPPORTED = "EngineUnsupported"
    PROBE_MISMATCH = "ProbeMismatch"
    NO_GOLDEN_TOKENS = "NoGoldenTokens"
    ENGINE_DIRTY = "EngineDirty"
    STALE_TOKEN = "StaleToken"
    PROTOCOL_UNSUPPORTED = "ProtocolUnsupported"
    TOO_MANY_CONNECTIONS = "TooManyConnections"
    NOT_THIS_NODE = "NotThisNode"
    ENGINE_NOT_CONNECTED = "EngineNotConnected"
    ENGINE_STARTING = "EngineStarting"
    ENGINE_INCOMPLETE = "EngineIncomplete"
    NOT_ASSIGNED = "NotAssigned"

    # Pods that do not follow a rollout
    NOT_SCHEDULED = "NotScheduled"
    NODE_NOT_READY = "NodeNotReady"
    AGENT_MISSING = "AgentMissing"
    AGENT_TOO_OLD = "AgentTooOld"
    WRITE_REFUSED = "WriteRefused"
    CLOCK_SET_BACK = "ClockSetBack"
    TOO_MANY_PODS = "TooManyPods"
    CRASH_LOOPING = "CrashLooping"
    CRASHED_PREPARING = "CrashedPreparing"
    OUT_OF_MEMORY = "OutOfMemory"
    STAGING_FAILED = "StagingFailed"

    # Versions and rollouts
    NO_AGENT = "NoAgent"
    WAITS_FOR_AGENT = "WaitsForAgent"
    NO_TARGETS = "NoTargets"
    TARGET_CONFLICT = "TargetConflict"
    VERSION_FAILED = "VersionFailed"
    TOO_MANY_FAILURES = "TooManyFailures"
    PROGRESS_DEADLINE_EXCEEDED = "ProgressDeadlineExceeded"

    # The coordinator
    BAD_REQUEST = "BadRequest"
    UNKNOWN_METHOD = "UnknownMethod"
    WRONG_VERSION = "WrongVersion"
    TOO_LARGE = "TooLarge"
    UNAUTHENTICATED = "Unauthenticated"
    NOT_LEADER = "NotLeader"
    BACKEND_UNAVAILABLE = "BackendUnavailable"
    UNKNOWN_WORKER = "UnknownWorker"
    TOO_MANY_WORKERS = "TooManyWorkers"
    NOT_PRECOMMITTED = "NotPrecommitted"
    NOTHING_BEGUN = "NothingBegun"
    ALREADY_COMMITTED = "AlreadyCommitted"
    NOT_COMMITTED = "NotCommitted"
    NO_PLAN = "NoPlan"
    BAD_PLAN = "BadPlan"
    BAD_GROUPS = "BadGroups"
    COORDINATOR_ERROR = "CoordinatorError"
    COORDINATOR_UNREACHABLE = "CoordinatorUnreachable"
    DECISION_TIMEOUT = "DecisionTimeout"

    # Hosts without Kubernetes: settings, keys, addresses, models in this process
    BAD_ENDPOINT = "BadEndpoint"
    BAD_KEYS = "BadKeys"
    BAD_TOKEN = "BadToken"
    BAD_SETTING = "BadSetting"
    KEYS_EXIST = "KeysExist"
    CANNOT_BIND = "CannotBind"
    PORT_TAKEN = "PortTaken"
    UNPROTECTED = "Unprotected"
    WORKER_NOT_STARTED = "WorkerNotStarted"
    BAD_ANSWER = "BadAnswer"
    INTERRUPTED = "Interrupted"
    WRONG_USAGE = "WrongUsage"
    PROBES_FAILED = "ProbesFailed"
    NO_DEVICE = "NoDevice"
    NOT_APPLIED = "NotApplied"
    NOT_BEGUN = "NotBegun"
    NOTHING_TO_APPLY = "NothingToApply"
    NO_CONFIG = "NoConfig"
    NO_MODULE = "NoModule"
    NO_TENSORS = "NoTensors"
    NO_BUFFER = "NoBuffer"
    NO_HASH = "NoHash"
    NO_MEMORY = "NoMemory"
    BAD_HASH = "BadHash"
    BAD_SHARD = "BadShard"
    BAD_NAME_MAP = "BadNameMap"
    APPLY_FAILED = "ApplyFailed"
    COPY_FAILED = "CopyFailed"
    READ_BACK_DIFFERS = "ReadBackDiffers"
    SHARED_MEMORY = "SharedMemory"
    TIED_TENSORS_DIFFER = "TiedTensorsDiffer"
    UNSUPPORTED = "Unsupported"

    # In several places
    ABORTED = "Aborted"
    CANCELLED = "Cancelled"
    TIMEOUT = "Timeout"
    FAILED = "Failed"
    REFUSED = "Refused"


TRANSIENT_FOR_ENGINES = frozenset(
    {
        Reason.BUSY,
        Reason.DRAIN_TIMEOUT,
        Reason.NOT_PREPARED,
        Reason.COMMIT_FAILED,
        Reason.LOAD_FAILED,
        Reason.MAP_FAILED,
        Reason.PREPARE_TIMEOUT,
        Reason.COMMIT_TIMEOUT,
    }
)
"""They say nothing against the version itself: an engine's next try may end otherwise."""

TRANSIENT_FOR_WORKERS = frozenset(
    {
        Reason.NO_PLAN,
        Reason.NOT_LEADER,
        Reason.BACKEND_UNAVAILABLE,
        Reason.UNKNOWN_WORKER,
        Reason.STALE_TOKEN,
        Reason.ABORTED,
        Reason.BUSY,
    }
)
"""A coordinator's no that may be a yes a moment later."""

POD_IS_AWAY = frozenset(
    {
        Reason.NOT_SCHEDULED,
        Reason.NODE_NOT_READY,
        Reason.AGENT_MISSING,
        Reason.AGENT_TOO_OLD,
        Reason.ENGINE_NOT_CONNECTED,
        Reason.WRITE_REFUSED,
        Reason.CLOCK_SET_BACK,
        Reason.TOO_MANY_PODS,
    }
)
"""The pod, or what leads to it, is not there: nothing is known against the version."""

SHOWN_BY_VERSIONS = frozenset(
    {
        Reason.NO_AGENT,
        Reason.WAITS_FOR_AGENT,
        Reason.RESOLVE_FAILED,
        Reason.RESOLVE_TIMEOUT,
        Reason.DIGEST_MISMATCH,
    }
)
"""Of the condition Resolved, beside what reading the source itself may end with."""

COUNTED_BY_AGENTS = frozenset(
    {
        Reason.UNKNOWN_TENSOR,
        Reason.MISSING_TENSOR,
        Reason.SHAPE_MISMATCH,
        Reason.DTYPE_MISMATCH,
        Reason.MAP_FAILED,
        Reason.LOAD_FAILED,
        Reason.NOT_PREPARED,
        Reason.STALE_TOKEN,
        Reason.DRAIN_TIMEOUT,
        Reason.COMMIT_FAILED,
        Reason.PROBE_MISMATCH,
        Reason.ENGINE_DIRTY,
        Reason.BUSY,
        Reason.PROTOCOL_UNSUPPORTED,
        Reason.CHECKSUM_MISMATCH,
        Reason.INSUFFICIENT_MEMORY,
        Reason.SOURCE_NOT_FOUND,
        Reason.SOURCE_NOT_ALLOWED,
        Reason.SOURCE_UNREADABLE,
        Reason.SOURCE_CHANGED,
        Reason.BAD_URI,
        Reason.UNKNOWN_SCHEME,
        Reason.DIGEST_MISMATCH,
        Reason.BAD_MANIFEST,
        Reason.BAD_CHECKPOINT,
        Reason.CANCELLED,
        Reason.DEADLINE_EXCEEDED,
        Reason.STAGE_TIMEOUT,
        Reason.FETCH_FAILED,
        Reason.CHUNK_MISSING,
        Reason.PEER_UNREACHABLE,
        Reason.PEER_TIMEOUT,
        Reason.PEER_REFUSED,
        Reason.INPUT_OUTPUT_ERROR,
    }
)
"""Labels of an agent's metrics; every other word is ``Other``: no series without end."""

COUNTED_BY_COORDINATORS = frozenset(
    {
        Reason.BAD_REQUEST,
        Reason.UNKNOWN_METHOD,
        Reason.WRONG_VERSION,
        Reason.TOO_LARGE,
        Reason.UNAUTHENTICATED,
        Reason.NOT_LEADER,
        Reason.BACKEND_UNAVAILABLE,
        Reason.UNKNOWN_WORKER,
        Reason.TOO_MANY_WORKERS,
        Reason.BUSY,
        Reason.STALE_TOKEN,
        Reason.NOT_PRECOMMITTED,
        Reason.ABORTED,
        Reason.NOTHING_BEGUN,
        Reason.ALREADY_COMMITTED,
        Reason.NOT_COMMITTED,
        Reason.DIGEST_MISMATCH,
        Reason.NO_PLAN,
        Reason.NO_MANIFEST,
        Reason.BAD_PLAN,
        Reason.BAD_MANIFEST,
    }
)
"""Labels of a coordinator's metrics, as for agents."""
