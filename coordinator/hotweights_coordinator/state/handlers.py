"""What each method answers: the rules of `state`, with what `membership` knows, as results for the
wire.

Pure but for `membership`, which only ever learns facts that stay true if an answer is thrown away:
so a request may be tried against the state first, and again when its turn to be written has come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hotweights_common.reasons import Reason
from hotweights_coordinator.state import state
from hotweights_coordinator.state.membership import Membership
from hotweights_coordinator.state.state import CoordinatorState, Event, Worker
from hotweights_coordinator.wire import messages as m

# while an attempt is aborted, workers follow what is current
ROUTE_PHASES = ("begun", "precommitted", "committed")


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a coordinator says of itself."""

    instance_id: str
    backend: str
    leader: str
    leads: bool
    events_endpoint: str
    started_at: float


@dataclass(frozen=True, slots=True)
class CallResult:
    """The state after a request: the very same object where nothing changed. ``blob`` names what
    goes with the answer.
    """

    durable: CoordinatorState
    result: Mapping[str, Any]
    events: tuple[Event, ...] = ()
    blob: str = ""


def handle(
    durable: CoordinatorState,
    membership: Membership,
    request: m.Request,
    about: ServerInfo,
    now: float,
) -> CallResult:
    """One request. Raises `CallRefused`, and then nothing has changed."""
    match request:
        case m.Heartbeat():
            return _heartbeat(durable, membership, request, now)
        case m.Register():
            return _register(durable, membership, request, now)
        case m.Leave():
            after = state.drop(durable, [request.worker_id], now, "has left")
            return _changed(durable, after, {"state": after.phase, "token": after.token})
        case m.Precommit():
            after = state.precommit(durable, request.worker_id, request.token, now)
            membership.heard(request.worker_id, None, now)
            return _changed(durable, after, {"state": after.phase, "token": after.token})
        case m.AppliedCall():
            return _applied(durable, membership, request, now)
        case m.Begin():
            after = state.begin(
                *(
                    durable,
                    request.version,
                    request.digest,
                    request.deadline_seconds,
                    request.commit_when_ready,
                    now,
                )
            )
            return _changed(durable, after, _attempt_result(after))
        case m.Commit():
            after = state.commit(durable, request.version, request.token, now)
            return _changed(durable, after, _attempt_result(after))
        case m.Abort():
            after = state.abort(durable, request.reason, now, request.token)
            return _changed(durable, after, _attempt_result(after))
        case m.GetPlan():
            return _get_plan(durable, request.digest)
        case m.GetCurrentManifest():
            if durable.manifest is None:
                raise m.CallRefused(
                    Reason.NO_MANIFEST,
                    "no manifest is current yet: nothing was committed or set by hand",
                )
            return CallResult(durable, asdict(durable.manifest), blob=durable.manifest.digest)
        case m.WhoHas():
            donors = membership.donors(request.digest, durable.workers)
            return CallResult(durable, {"workers": [_peer(worker) for worker in donors]})
        case m.ListWorkers():
            return CallResult(durable, {"workers": _workers(durable, membership, about, now)})
        case m.Status():
            return CallResult(durable, _status(durable, membership, about, now))
        case _:
            raise m.CallRefused(Reason.UNKNOWN_METHOD, f"{request.method} is not answered here")


def assignment(
    durable: CoordinatorState, membership: Membership, worker_id: str, now: float
) -> dict[str, Any]:
    """What a worker follows, by level."""
    attempt, current = durable.attempt, durable.current
    plan = attempt.plan if attempt else None
    result: dict[str, Any] = {
        "token": durable.token,
        "state": durable.phase,
        "version": plan.version if plan else "",
        "digest": plan.manifest_digest if plan else "",
        "plan_digest": plan.digest if plan else "",
        "uri": plan.uri if plan else "",
        "model": plan.model if plan else "",
    }
    wanted = (
        plan.manifest_digest
        if plan and durable.phase in ROUTE_PHASES
        else current.digest
        if current
        else ""
    )
    parents: list[dict[str, Any]] = []
    fallbacks: list[dict[str, Any]] = []
    if wanted and wanted not in membership.have_of(worker_id):
        route = membership.route(worker_id, wanted, durable.workers, now)
        parents = [
            _peer(durable.workers[name]) for name in route.parents if name in durable.workers
        ]
        fallbacks = [
            _peer(durable.workers[name]) for name in route.fallbacks if name in durable.workers
        ]
    result |= {
        "parents": parents,
        "fallbacks": fallbacks,
        "current": asdict(current) if current else None,
    }
    # a third, so that one or two may be lost before a worker is called silent
    result["heartbeat_seconds"] = membership.ttl_seconds / 3
    return result


def _heartbeat(
    durable: CoordinatorState, membership: Membership, request: m.Heartbeat, now: float
) -> CallResult:
    worker_id, failure = request.worker_id, request.failure
    if worker_id not in durable.workers:
        raise state.unknown_worker(worker_id)
    membership.heard(worker_id, request.have, now)
    if failure is not None:
        membership.failures[worker_id] = failure
    else:
        membership.failures.pop(worker_id, None)
    if request.engines is not None:
        membership.engines[worker_id] = request.engines
    events = _note_applied(durable, membership, worker_id, request.applied, now)
    after = durable
    if failure is not None:
        after = state.fail(durable, worker_id, failure.token, failure.reason, failure.message, now)
    return _changed(durable, after, assignment(after, membership, worker_id, now), events)


def _register(
    durable: CoordinatorState, membership: Membership, request: m.Register, now: float
) -> CallResult:
    worker_id = request.worker_id
    worker = Worker(worker_id, request.host, request.endpoints, request.zone, request.instance)
    after = state.register(durable, worker, now)
    known = durable.workers.get(worker_id)
    if known is not None and known.instance != worker.instance:
        membership.started_anew(worker_id)
    membership.heard(worker_id, request.have, now)
    return _changed(durable, after, assignment(after, membership, worker_id, now))


def _applied(
    durable: CoordinatorState, membership: Membership, request: m.AppliedCall, now: float
) -> CallResult:
    state.check_applied(durable, request.worker_id, request.digest, request.token)
    membership.heard(request.worker_id, None, now)
    said = m.Applied(digest=request.digest, token=request.token)
    events = _note_applied(durable, membership, request.worker_id, said, now)
    return CallResult(durable, {"state": durable.phase, "token": durable.token}, events)


def _note_applied(
    durable: CoordinatorState,
    membership: Membership,
    worker_id: str,
    said: m.Applied | None,
    now: float,
) -> tuple[Event, ...]:
    if said is None or membership.applied.get(worker_id) == said:
        return ()
    membership.applied[worker_id] = said
    # kept all the same, but only what counts is news
    current = durable.current
    if current is None or (current.digest, current.token) != (said.digest, said.token):
        return ()
    text = f"worker {worker_id} has applied {current.version}"
    event = Event(now, "applied", text, current.version, said.digest, said.token, worker_id)
    membership.events.append(event)
    return (event,)


def _get_plan(durable: CoordinatorState, digest: str | None) -> CallResult:
    known = {
        plan.digest: plan.version
        for plan in (durable.attempt and durable.attempt.plan, durable.plan)
        if plan
    }
    if durable.current is not None:
        known.setdefault(durable.current.plan_digest, durable.current.version)
    if not known:
        raise m.CallRefused(
            Reason.NO_PLAN,
            "no plan was submitted; `hotweights coord-submit-plan --plan FILE` does it",
        )
    wanted = digest or (durable.plan.digest if durable.plan else next(iter(known)))
    if wanted not in known:
        raise m.CallRefused(
            Reason.NO_PLAN,
            f"no plan {wanted} is here (any more); ask without a digest for the latest",
        )
    return CallResult(durable, {"digest": wanted, "version": known[wanted]}, blob=wanted)


def _changed(
    before: CoordinatorState,
    after: CoordinatorState,
    result: Mapping[str, Any],
    events: tuple[Event, ...] = (),
) -> CallResult:
    if after is before:
        return CallResult(before, result, events)
    known = set(map(id, before.events))
    return CallResult(
        after, result, (*events, *(event for event in after.events if id(event) not in known))
    )


def changed(
    before: CoordinatorState, after: CoordinatorState, result: Mapping[str, Any]
) -> CallResult:
    """What the server itself brings about: a checked plan, a silence, a take-over."""
    return _changed(before, after, result)


def _attempt_result(durable: CoordinatorState) -> dict[str, Any]:
    attempt = durable.attempt
    return {
        "token": attempt.token if attempt else durable.token,
        "state": durable.phase,
        "version": attempt.plan.version if attempt else "",
        "digest": attempt.plan.manifest_digest if attempt else "",
    }


def _peer(worker: Worker) -> dict[str, Any]:
    return {"worker_id": worker.worker_id, "endpoints": worker.endpoints, "zone": worker.zone}


def _workers(
    durable: CoordinatorState, membership: Membership, about: ServerInfo, now: float
) -> list[dict[str, Any]]:
    """What is written of each worker, and what it said; None where only a leader heard it."""
    precommits = durable.attempt.precommits if durable.attempt else frozenset()
    result = []
    for name, worker in sorted(durable.workers.items()):
        applied, failure = membership.applied.get(name), membership.failures.get(name)
        result.append(
            _peer(worker)
            | {
                "host": worker.host,
                "have": membership.have_of(name) if about.leads else None,
                "precommitted": name in precommits,
                "applied": applied.model_dump() if applied else None,
                "failure": failure.model_dump() if failure else None,
                "engines": membership.engines.get(name),
                "silence_seconds": round(membership.silence_seconds(name, now), 3)
                if about.leads
                else None,
            }
        )
    return result


def _status(
    durable: CoordinatorState, membership: Membership, about: ServerInfo, now: float
) -> dict[str, Any]:
    attempt, current = durable.attempt, durable.current
    plan = attempt.plan if attempt else None
    # what was applied is said to the leader alone, and written nowhere: a follower does not know
    applied = membership.have_applied(durable) if about.leads else None
    waiting: list[str] | None = durable.waiting_for
    if durable.phase == "committed":
        waiting = None if applied is None else sorted(durable.workers.keys() - set(applied))
    events = sorted([*durable.events, *membership.events], key=lambda event: event.at)
    return {
        "state": durable.phase,
        "version": plan.version if plan else "",
        "digest": plan.manifest_digest if plan else "",
        "token": durable.token,
        "plan_digest": plan.digest if plan else durable.plan.digest if durable.plan else "",
        "submitted": asdict(durable.plan) if durable.plan else None,
        "reason": attempt.reason if attempt else "",
        "deadline_seconds": round(attempt.deadline - now, 3)
        if attempt and attempt.is_open
        else None,
        "current": asdict(current) if current else None,
        "plans_from": asdict(durable.manifest) if durable.manifest else None,
        "workers": sorted(durable.workers),
        "precommitted": sorted(attempt.precommits) if attempt else [],
        "applied": applied,
        "waiting_for": waiting,
        "leader": about.leader,
        "leads": about.leads,
        "pub_endpoint": about.events_endpoint,
        "instance_id": about.instance_id,
        "backend": about.backend,
        "last_events": [
            {**asdict(event), "age_seconds": round(max(0.0, now - event.at), 3)} for event in events
        ],
        "uptime_seconds": round(now - about.started_at, 3),
    }
