"""What is decided, and by which rules: the coordinator's state machine, without sockets, clocks or chance.

    idle ──begin──> begun ──all live workers precommit──> precommitted ──commit──> committed
                      └──────────── abort, deadline, failure ───┴──> aborted

Everything here is a value that never changes; a transition gives another value, or the very same object where nothing happened.
That is what the server relies on: the same object needs no write. ``token`` grows with every begin and every abort, so whatever
somebody says about an attempt that is over can be told from what counts. Liveness is not kept here (`presence` does): the
workers that stand here are the live ones, because one that falls silent is removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from hotweights.coordinator.messages import CallRefused

Phase = Literal["idle", "begun", "precommitted", "committed", "aborted"]
Topic = Literal["register", "plan", "begin", "precommit", "commit", "abort", "applied", "leader"]

EVENTS_PER_TOPIC = 8


@dataclass(frozen=True, slots=True)
class PlanRef:
    """A submitted plan: its identity, and what the coordinator has to know of what is in it."""

    digest: str
    version: str
    manifest_digest: str
    uri: str
    model: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class ManifestRef:
    """The manifest that counts as current."""

    digest: str
    version: str


@dataclass(frozen=True, slots=True)
class Worker:
    """Somebody who takes part. ``instance`` names the process: a new one has staged nothing yet."""

    worker_id: str
    host: str
    endpoints: tuple[str, ...] = ()
    zone: str = ""
    instance: str = ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One update, from its begin on. ``deadline`` is in seconds since the epoch."""

    token: int
    phase: Literal["begun", "precommitted", "committed", "aborted"]
    plan: PlanRef
    deadline: float
    commit_when_ready: bool = False
    precommits: frozenset[str] = frozenset()
    reason: str = ""

    @property
    def is_open(self) -> bool:
        return self.phase in ("begun", "precommitted")


@dataclass(frozen=True, slots=True)
class Current:
    """What was committed last: what everybody who joins follows."""

    version: str
    digest: str
    token: int
    plan_digest: str
    uri: str
    model: str


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for people. ``at`` is in seconds since the epoch."""

    at: float
    topic: Topic
    text: str
    version: str = ""
    digest: str = ""
    token: int = 0
    worker_id: str = ""


@dataclass(frozen=True, slots=True)
class Durable:
    """All that survives a coordinator."""

    token: int = 0
    plan: PlanRef | None = None
    attempt: Attempt | None = None
    current: Current | None = None
    manifest: ManifestRef | None = None
    workers: Mapping[str, Worker] = field(default_factory=dict)
    events: tuple[Event, ...] = ()

    @property
    def phase(self) -> Phase:
        return self.attempt.phase if self.attempt else "idle"

    @property
    def blobs(self) -> frozenset[str]:
        """Digests of the plans and manifests that must be kept beside it."""
        kept = {plan.digest for plan in (self.plan, self.attempt and self.attempt.plan) if plan}
        kept |= {plan.manifest_digest for plan in (self.plan, self.attempt and self.attempt.plan) if plan}
        kept |= {self.current.plan_digest, self.current.digest} if self.current else set()
        kept |= {self.manifest.digest} if self.manifest else set()
        return frozenset(kept)
