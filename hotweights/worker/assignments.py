"""What a coordinator asks of a worker, as the node's session wants it said, and what the session
reports, as the coordinator wants it.

Pure: an answer and a status in, a `NodeWeightsSpec` and a `WorkerStatus` out. While an attempt is
open every engine prepares its version and goes on serving what was committed last; once it is
committed they are to serve it. A coordinator that lost its state has nothing current; then what was
current last goes on to hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from hotweights.worker.auth import NAMESPACE
from hotweights_common.reasons import Reason
from hotweights_coordinator.wire.messages import CoordinatorError
from hotweights_crds.nodeweights import (
    EngineStatus,
    NodeWeightsSpec,
    NodeWeightsStatus,
    Peer,
    PodAssignment,
    RolloutAssignment,
    StageItem,
)

OPEN = ("begun", "precommitted")
OWN = "worker"
STAGE_SECONDS = 6 * 3600  # the coordinator's own deadline ends an attempt
MOST_PEERS = 8  # how many the schema of NodeWeights lists, as parents and as fallbacks each


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Member(_Part):
    """Another worker: where it gives chunks, and in which neighbourhood it stands."""

    worker_id: str
    endpoints: tuple[str, ...] = ()
    zone: str = ""


class Version(_Part):
    """One version as the coordinator names it."""

    version: str
    digest: str
    token: int
    plan_digest: str
    uri: str
    model: str


class Assignment(_Part):
    """The answer to a heartbeat: all that holds, so that a lost one costs nothing. What it has
    beside these fields is of a newer release, and is not read.
    """

    token: int
    state: str
    version: str = ""
    digest: str = ""
    plan_digest: str = ""
    uri: str = ""
    model: str = ""
    parents: tuple[Member, ...] = ()
    fallbacks: tuple[Member, ...] = ()
    current: Version | None = None
    heartbeat_seconds: float | None = None

    @classmethod
    def parse(cls, answer: Mapping[str, object]) -> Assignment:
        """The coordinator's answer, checked. Raises `CoordinatorError` for what is none."""
        try:
            return cls.model_validate(answer)
        except ValidationError as error:
            # one is enough to find the release that differs
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            text = (
                f"the coordinator's assignment cannot be understood ({where}: {first['msg']}); "
                "use one release everywhere"
            )
            raise CoordinatorError(text, Reason.BAD_ANSWER) from error

    @property
    def attempt(self) -> Version | None:
        """The version that is to be prepared; None when no attempt is open."""
        if self.state not in OPEN:
            return None
        return Version(
            version=self.version,
            digest=self.digest,
            token=self.token,
            plan_digest=self.plan_digest,
            uri=self.uri,
            model=self.model,
        )


@dataclass(frozen=True, slots=True)
class Route:
    """Whom to ask for a version, as endpoints that work here. Several parents each give a
    stripe.
    """

    parents: tuple[Peer, ...] = ()
    fallbacks: tuple[Peer, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """Where this host is with what was asked of it."""

    have: tuple[str, ...] = ()
    ready: bool = False
    """The open attempt's version is here, and every engine has prepared it."""
    applied: bool = False
    """What is current is here, and every engine confirmed that it serves it."""
    failure: tuple[str, str] | None = None
    """Reason and message, once it will not succeed by itself."""
    engines: int = 0


def spec_of(
    attempt: Version | None,
    current: Version | None,
    token: int,
    engines: Sequence[str],
    routes: Mapping[str, Route],
) -> NodeWeightsSpec:
    """What the session is to do. ``engines`` are their names, ``routes`` go by digest; ``token`` is
    the assignment's, for all engines alike.
    """
    # one digest may be both: it is staged once
    wanted = {version.digest: version for version in (attempt, current) if version is not None}
    stage = [_item(version, routes.get(digest, Route())) for digest, version in wanted.items()]
    pods = [
        PodAssignment(
            uid=name,
            name=name,
            namespace=NAMESPACE,
            token=token,
            digest=current.digest if current else "",
            version=current.version if current else "",
            prepare=attempt.digest if attempt else "",
        )
        for name in sorted(engines)
    ]
    return NodeWeightsSpec(rollouts=[RolloutAssignment(uid=OWN, name=OWN, stage=stage, pods=pods)])


def connected(status: NodeWeightsStatus) -> list[EngineStatus]:
    """The engines that are connected now; the others can neither prepare nor serve by their own
    word.
    """
    return [engine for engine in status.engines if engine.phase != "Disconnected"]


def worker_status(
    status: NodeWeightsStatus, attempt: Version | None, current: Version | None
) -> WorkerStatus:
    """What the session's status means for the coordinator. Without engines a whole image is enough
    for ready and applied: `WorkerStatus.engines` says so.
    """
    have = tuple(version.digest for version in status.staged if version.phase == "Staged")
    engines = connected(status)
    ready = (
        attempt is not None
        and attempt.digest in have
        # who serves it already has nothing to prepare
        and all(attempt.digest in (engine.prepared, engine.digest) for engine in engines)
    )
    applied = (
        current is not None
        and current.digest in have
        and all(engine.digest == current.digest for engine in engines)
    )
    wanted = attempt or current
    failure = _failure(status, engines, wanted) if wanted is not None and not ready else None
    # an old failure of what is applied by now is no failure any more
    return WorkerStatus(
        have, ready, applied, failure if attempt or not applied else None, len(engines)
    )


def _item(version: Version, route: Route) -> StageItem:
    return StageItem(
        digest=version.digest,
        namespace=NAMESPACE,
        model=version.model,
        version=version.version,
        uri=version.uri,
        parents=list(route.parents)[:MOST_PEERS],
        fallbacks=list(route.fallbacks)[:MOST_PEERS],
        timeout_seconds=STAGE_SECONDS,
    )


def _failure(
    status: NodeWeightsStatus, engines: Sequence[EngineStatus], wanted: Version
) -> tuple[str, str] | None:
    """Why this version will not come by itself; what failed for another one, or for an earlier
    attempt, says nothing about it.
    """
    for version in status.staged:
        if version.digest == wanted.digest and version.phase == "Failed":
            return version.reason, version.message
    for engine in engines:
        failed = engine.failed
        if failed is not None and failed.digest == wanted.digest and failed.token >= wanted.token:
            return (
                failed.reason or f"{failed.step}Failed",
                f"engine {engine.pod_uid}: {failed.message}",
            )
    return None
