"""What is decided, and by which rules: the coordinator's state machine, without sockets, clocks or
chance.

    idle ──begin──> begun ──all live workers precommit──> precommitted ──commit──> committed
                      │ <──nobody who has prepared it lives──┤
                      └──────────── abort, deadline, failure ┴──> aborted

Everything here is a value that never changes; a transition gives another value, or the very same
object where nothing happened. That is what the server relies on: the same object needs no write.
``token`` grows with every begin and every abort, so whatever somebody says about an attempt that is
over can be told from what counts. Liveness is not kept here (`membership` does): the workers that
stand here are the live ones, because one that falls silent is removed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from hotweights_common.reasons import Reason
from hotweights_coordinator.wire.messages import CallRefused

Phase = Literal["idle", "begun", "precommitted", "committed", "aborted"]
Topic = Literal["register", "plan", "begin", "precommit", "commit", "abort", "applied", "leader"]

EVENTS_PER_TOPIC = 8  # they are part of the state, and so of every write
MAX_WORKERS = 10_000  # of one coordinator; each is part of the state too
MOST_NAMED = 5  # in a message for people


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
class CoordinatorState:
    """All that a backend keeps, and that another coordinator goes on with."""

    token: int = 0  # of the last begin or abort
    plan: PlanRef | None = None  # submitted last; None: none ever was
    attempt: Attempt | None = None  # begun last, open or not; None: none ever was
    current: Current | None = None  # committed last; None: nothing ever was
    manifest: ManifestRef | None = None  # of what is current, or set by hand
    workers: Mapping[str, Worker] = field(default_factory=dict)
    events: tuple[Event, ...] = ()

    @property
    def phase(self) -> Phase:
        return self.attempt.phase if self.attempt else "idle"

    @property
    def blobs(self) -> frozenset[str]:
        """Digests of the plans and manifests that must be kept beside it."""
        kept = {plan.digest for plan in (self.plan, self.attempt and self.attempt.plan) if plan}
        kept |= {
            plan.manifest_digest for plan in (self.plan, self.attempt and self.attempt.plan) if plan
        }
        kept |= {self.current.plan_digest, self.current.digest} if self.current else set()
        kept |= {self.manifest.digest} if self.manifest else set()
        return frozenset(kept)

    @property
    def waiting_for(self) -> list[str]:
        """Workers whose precommit is lacking, sorted; nobody unless an attempt is begun."""
        if self.attempt is None or self.attempt.phase != "begun":
            return []
        return sorted(self.workers.keys() - self.attempt.precommits)


def register(durable: CoordinatorState, worker: Worker, now: float) -> CoordinatorState:
    """Somebody takes part. A new process under a known name has staged nothing, so its precommit no
    longer counts.
    """
    known = durable.workers.get(worker.worker_id)
    # the very same object: it says nothing new, so nothing has to be written
    if known == worker:
        return durable
    if known is None and len(durable.workers) >= MAX_WORKERS:
        raise CallRefused(
            Reason.TOO_MANY_WORKERS,
            f"{MAX_WORKERS} workers are registered; start another coordinator",
        )
    after = replace(durable, workers={**durable.workers, worker.worker_id: worker})
    if known is not None and known.instance != worker.instance:
        after = _without_precommits(after, (worker.worker_id,), now)
    return _noted(after, now, "register", f"worker {worker.worker_id} registered", worker.worker_id)


def drop(
    durable: CoordinatorState,
    workers: Collection[str],
    now: float,
    why: str = "fell silent and is dropped",
) -> CoordinatorState:
    """Workers that are no longer heard, or have left, serve nothing and hold up nobody."""
    gone = [worker_id for worker_id in workers if worker_id in durable.workers]
    if not gone:
        return durable
    left = {name: worker for name, worker in durable.workers.items() if name not in gone}
    after = replace(durable, workers=left)
    for worker_id in gone:
        after = _noted(after, now, "register", f"worker {worker_id} {why}", worker_id)
    return _settled(_without_precommits(after, gone, now), now)


def submit_plan(durable: CoordinatorState, plan: PlanRef, now: float) -> CoordinatorState:
    """The plan that the next begin is about."""
    if durable.plan is not None and durable.plan.digest == plan.digest:
        return durable
    if durable.attempt is not None and durable.attempt.is_open:
        raise _busy(durable.attempt)
    after = replace(durable, plan=plan)
    return _noted(
        after,
        now,
        "plan",
        f"plan of {plan.version} submitted",
        version=plan.version,
        digest=plan.digest,
    )


def set_manifest(durable: CoordinatorState, manifest: ManifestRef) -> CoordinatorState:
    """By hand: what `plan` starts from."""
    return durable if durable.manifest == manifest else replace(durable, manifest=manifest)


def begin(
    durable: CoordinatorState,
    version: str,
    digest: str | None,
    deadline_seconds: float,
    commit_when_ready: bool,
    now: float,
) -> CoordinatorState:
    """Open an attempt. What is begun already, or committed already, is not begun again."""
    attempt, plan = durable.attempt, durable.plan
    if attempt is not None and attempt.is_open:
        if attempt.plan.version != version or not _is_about(attempt.plan, digest):
            raise _busy(attempt)
        if commit_when_ready and not attempt.commit_when_ready:
            return _settled(replace(durable, attempt=replace(attempt, commit_when_ready=True)), now)
        return durable
    if plan is None or plan.version != version:
        there = f"the one here is of {plan.version}" if plan else "none was submitted"
        remedy = "submit it with `hotweights coord-submit-plan --plan FILE`"
        raise CallRefused(
            Reason.WRONG_VERSION, f"there is no plan of version {version}: {there}; {remedy}"
        )
    if not _is_about(plan, digest):
        what = f"the plan of {version} is about {plan.manifest_digest}, not {digest}"
        raise CallRefused(
            Reason.DIGEST_MISMATCH, f"{what}; submit the right plan, or leave the digest out"
        )
    # asked again: whoever did not hear the answer must not open another attempt
    if attempt is not None and attempt.phase == "committed" and attempt.plan == plan:
        return durable
    # the next token: whatever was said about an earlier attempt can be told from this one
    token = durable.token + 1
    opened = Attempt(token, "begun", plan, now + deadline_seconds, commit_when_ready)
    after = replace(durable, token=token, attempt=opened)
    return _noted_attempt(after, now, "begin", f"{version} begun")


def precommit(
    durable: CoordinatorState, worker_id: str, token: int, now: float
) -> CoordinatorState:
    """This worker could commit at once. The last one of all makes the attempt precommitted."""
    attempt = _attempt_of(durable, worker_id, token)
    if attempt.phase == "aborted":
        raise CallRefused(Reason.ABORTED, f"{attempt.plan.version} was aborted: {attempt.reason}")
    # said before, or the others were enough: what was committed stays so
    if attempt.phase == "committed" or worker_id in attempt.precommits:
        return durable
    after = replace(durable, attempt=replace(attempt, precommits=attempt.precommits | {worker_id}))
    after = _noted_attempt(
        after,
        now,
        "precommit",
        f"worker {worker_id} has prepared {attempt.plan.version}",
        worker_id,
    )
    return _settled(after, now)


def commit(
    durable: CoordinatorState, version: str, token: int | None, now: float
) -> CoordinatorState:
    """What all have prepared becomes what counts."""
    attempt = durable.attempt
    if attempt is None:
        raise CallRefused(
            Reason.NOT_PRECOMMITTED,
            f"nothing is begun; `hotweights begin --version {version}` comes first",
        )
    if attempt.plan.version != version:
        what = f"the attempt is about {attempt.plan.version}, not {version}"
        raise CallRefused(Reason.WRONG_VERSION, f"{what}; see `hotweights coord-status`")
    # before the phase: a stale order must not be told that another attempt is committed
    if token is not None and token != attempt.token:
        raise _stale(token, attempt)
    match attempt.phase:
        case "committed":
            return durable
        case "aborted":
            raise CallRefused(
                Reason.NOT_PRECOMMITTED, f"{version} was aborted ({attempt.reason}); begin it again"
            )
        case "begun" if not durable.workers:
            remedy = (
                "start `hotweights worker` and commit when it has, or end it with `hotweights "
                "abort`"
            )
            raise CallRefused(
                Reason.NOT_PRECOMMITTED, f"no live worker has prepared {version}; {remedy}"
            )
        case "begun":
            waiting = named(durable.waiting_for)
            raise CallRefused(
                Reason.NOT_PRECOMMITTED,
                f"{version} is not prepared everywhere; waiting for {waiting}",
            )
        case "precommitted":
            return _committed(durable, attempt, now)


def abort(
    durable: CoordinatorState, reason: str, now: float, token: int | None = None
) -> CoordinatorState:
    """Give an open attempt up; what is current stays. With a token, only that one: asked again, it
    ends no later attempt.
    """
    attempt = durable.attempt
    if attempt is None:
        raise CallRefused(Reason.NOTHING_BEGUN, "there is nothing to abort: no attempt was begun")
    # an abort takes a token of its own: whoever asks again knows the one before
    ended = attempt.token - 1 if attempt.phase == "aborted" else attempt.token
    if token is not None and token not in (attempt.token, ended):
        raise _stale(token, attempt)
    if attempt.phase == "committed":
        what = f"{attempt.plan.version} is committed, which is final"
        raise CallRefused(
            Reason.ALREADY_COMMITTED,
            f"{what}; submit the old version's plan and begin it to go back",
        )
    if attempt.phase == "aborted":
        return durable
    token = durable.token + 1
    after = replace(
        durable, token=token, attempt=replace(attempt, token=token, phase="aborted", reason=reason)
    )
    return _noted_attempt(after, now, "abort", f"{attempt.plan.version} aborted: {reason}")


def fail(
    durable: CoordinatorState,
    worker_id: str,
    token: int | None,
    reason: str,
    message: str,
    now: float,
) -> CoordinatorState:
    """A worker cannot take part, so nobody goes on. What it says about another attempt changes
    nothing.
    """
    attempt = durable.attempt
    if attempt is None or not attempt.is_open or (token is not None and token != attempt.token):
        return durable
    return abort(
        durable, f"worker {worker_id}: {reason}" + (f": {message}" if message else ""), now
    )


def expire(durable: CoordinatorState, now: float) -> CoordinatorState:
    """An attempt that is open past its deadline is given up."""
    attempt = durable.attempt
    if attempt is None or not attempt.is_open or now < attempt.deadline:
        return durable
    waiting = (
        f"; it waited for {named(durable.waiting_for) or 'a first worker'}"
        if attempt.phase == "begun"
        else ""
    )
    return abort(durable, f"the deadline passed{waiting}", now)


def check_applied(durable: CoordinatorState, worker_id: str, digest: str, token: int) -> None:
    """Only what is committed can have been applied. Raises `CallRefused`."""
    attempt = _attempt_of(durable, worker_id, token)
    if attempt.phase != "committed" or attempt.plan.manifest_digest != digest:
        what = f"worker {worker_id} says it applied {digest}, which token {token} did not commit"
        raise CallRefused(Reason.NOT_COMMITTED, f"{what}; follow what the heartbeat answers")


def take_over(durable: CoordinatorState | None, instance_id: str, now: float) -> CoordinatorState:
    """Somebody begins to lead. Where nothing was stored the first token is the time, so that it is
    above any earlier one.
    """
    return _noted(
        durable or CoordinatorState(token=int(now)),
        now,
        "leader",
        f"coordinator {instance_id} leads",
    )


def named(names: Collection[str]) -> str:
    """A few of them, and how many more."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(list(names)[:MOST_NAMED]) + more


def unknown_worker(worker_id: str) -> CallRefused:
    return CallRefused(
        Reason.UNKNOWN_WORKER,
        f"worker {worker_id} is not registered here (any more); it has to register again",
    )


def _attempt_of(durable: CoordinatorState, worker_id: str, token: int) -> Attempt:
    if worker_id not in durable.workers:
        raise unknown_worker(worker_id)
    if durable.attempt is None:
        raise CallRefused(
            Reason.NOTHING_BEGUN, f"nothing is begun, so token {token} is of no attempt here"
        )
    if token != durable.attempt.token:
        raise _stale(token, durable.attempt)
    return durable.attempt


def _is_about(plan: PlanRef, digest: str | None) -> bool:
    return digest is None or digest in (plan.manifest_digest, plan.digest)


def _busy(attempt: Attempt) -> CallRefused:
    what = f"{attempt.plan.version} is {attempt.phase} (token {attempt.token})"
    return CallRefused(Reason.BUSY, f"{what}; wait for it, or end it with `hotweights abort`")


def _stale(token: int, attempt: Attempt) -> CallRefused:
    return CallRefused(
        Reason.STALE_TOKEN,
        f"token {token} does not count; {attempt.plan.version} has token {attempt.token}",
    )


def _without_precommits(
    durable: CoordinatorState, workers: Collection[str], now: float
) -> CoordinatorState:
    """What they said no longer counts. Where nobody is left who said it, it is not prepared, and
    who joins is waited for again.
    """
    attempt = durable.attempt
    if attempt is None or not attempt.is_open or attempt.precommits.isdisjoint(workers):
        return durable
    left = attempt.precommits - set(workers)
    if left or attempt.phase == "begun":
        return replace(durable, attempt=replace(attempt, precommits=left))
    after = replace(durable, attempt=replace(attempt, precommits=left, phase="begun"))
    text = f"{attempt.plan.version} is begun again: no live worker has prepared it any more"
    return _noted_attempt(after, now, "precommit", text)


def _settled(durable: CoordinatorState, now: float) -> CoordinatorState:
    """What follows of itself: all have prepared, and nobody has to be asked."""
    attempt = durable.attempt
    if attempt is None or not attempt.is_open:
        return durable
    if attempt.phase == "begun":
        # nobody else can precommit
        if not durable.workers or len(attempt.precommits) < len(durable.workers):
            return durable
        attempt = replace(attempt, phase="precommitted")
        durable = replace(durable, attempt=attempt)
        text = f"{attempt.plan.version} is prepared by all {len(durable.workers)} workers"
        durable = _noted_attempt(durable, now, "precommit", text)
    return _committed(durable, attempt, now) if attempt.commit_when_ready else durable


def _committed(durable: CoordinatorState, attempt: Attempt, now: float) -> CoordinatorState:
    plan = attempt.plan
    after = replace(
        durable,
        attempt=replace(attempt, phase="committed"),
        current=Current(
            plan.version, plan.manifest_digest, attempt.token, plan.digest, plan.uri, plan.model
        ),
        manifest=ManifestRef(plan.manifest_digest, plan.version),
    )
    return _noted_attempt(after, now, "commit", f"{plan.version} committed")


def _noted_attempt(
    durable: CoordinatorState, now: float, topic: Topic, text: str, worker_id: str = ""
) -> CoordinatorState:
    attempt = durable.attempt
    if attempt is None:
        return durable
    plan = attempt.plan
    return _noted(
        durable, now, topic, text, worker_id, plan.version, plan.manifest_digest, attempt.token
    )


def _noted(
    durable: CoordinatorState,
    now: float,
    topic: Topic,
    text: str,
    worker_id: str = "",
    version: str = "",
    digest: str = "",
    token: int = 0,
) -> CoordinatorState:
    """The event at the end, and the oldest of its kind dropped: a thousand precommits do not push
    out the begin.
    """
    events = durable.events
    same = [event for event in events if event.topic == topic]
    if len(same) >= EVENTS_PER_TOPIC:
        events = tuple(event for event in events if event is not same[0])
    return replace(
        durable, events=(*events, Event(now, topic, text, version, digest, token, worker_id))
    )
