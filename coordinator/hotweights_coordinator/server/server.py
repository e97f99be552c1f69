"""One coordinator: it waits for calls, and decides while it leads.

A call that changes nothing is answered at once from the state that is written. One that changes
something waits for its turn: all that wait are decided one after the other on a copy, the copy is
written by one write, and only then does anybody hear of it. If the write fails nobody knows what is
written, so everything is forgotten, read again, and the callers are told to come back. That is the
whole of "no false commits, no lost commits" on this side; the other half is the backend's fence.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial

import zmq

from hotweights_common import hosts
from hotweights_common.reasons import Reason
from hotweights_coordinator.backends.base import Backend, BackendError, Fenced, Lease
from hotweights_coordinator.backends.blobs import Blobs
from hotweights_coordinator.server.metrics import Metrics, serve
from hotweights_coordinator.server.replies import Decide, PendingCall, Replies, unavailable
from hotweights_coordinator.server.settings import ServeSettings
from hotweights_coordinator.state import handlers, plan_check, state
from hotweights_coordinator.state.handlers import CallResult, ServerInfo
from hotweights_coordinator.state.membership import Membership
from hotweights_coordinator.state.state import CoordinatorState, Event
from hotweights_coordinator.wire import address, auth
from hotweights_coordinator.wire.messages import (
    MAX_BINARY_NBYTES,
    Call,
    CallRefused,
    CoordinatorError,
    Precommit,
    Request,
    SetCurrentManifest,
    SubmitPlan,
    call_id_of,
    parse_call,
    parse_request,
)
from hotweights_coordinator.wire.sockets import Sender, Sockets

log = logging.getLogger(__name__)

READ_AGAIN_SECONDS = 0.1  # how old what a follower tells may be
SHOW_SECONDS = 0.1  # how often metrics follow decisions
MOST_AT_ONCE = 200  # decisions of one write: a thousand would keep heartbeats waiting
MOST_CHECKS = 2  # plans and manifests that are looked at at the same time

# before the first look, and when a lease is lost: fence 0 is below every one that a backend gives
_NOBODY = Lease(mine=False, fence=0, leader="", until=0.0)


class Server:
    """Bound from construction; serves while `run` runs."""

    def __init__(self, settings: ServeSettings, backend: Backend) -> None:
        """Raises `CallRefused` or `CoordinatorError` where something cannot be bound, and binds
        nothing then.
        """
        keys = auth.ServerKeys.of(settings.token, settings.curve)
        # without a folder nobody gets through the handshake who does not know it
        self._asked_token = settings.token if settings.curve else ""
        for endpoint in filter(None, (settings.endpoint, settings.events_endpoint)):
            auth.check_binding(endpoint, protected=keys is not None)
        host = address.parse(settings.endpoint).bare_host
        self.settings = settings
        self.metrics = Metrics()
        self.sockets = Sockets(settings.endpoint, settings.events_endpoint, keys)
        try:
            self.web = serve(
                self.metrics, "" if hosts.is_wildcard(host) else host, settings.metrics_port
            )
        except CoordinatorError:
            self.sockets.close()
            raise
        self.advertised = settings.advertise or self.sockets.endpoint
        self._backend = backend
        self._lease = _NOBODY
        self._state: CoordinatorState | None = None  # as it is written; None: has to be read
        self._blobs = Blobs(backend)
        self._answers = Replies(self.sockets, self.metrics, self._blobs, self._spawn)
        self._membership = self._new_presence()
        self._read: tuple[float, CoordinatorState] | None = None
        self._waiting: list[PendingCall] = []
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._shown_at = 0.0
        self._writing = asyncio.Lock()
        self._reading = asyncio.Lock()
        self._checking = asyncio.Semaphore(MOST_CHECKS)
        self._tasks: set[asyncio.Task[None]] = set()
        # read once: a clock that is set must not end deadlines or make workers silent
        self._epoch = time.time() - time.monotonic()
        self._started_at = self._now()
        # a silent worker is noticed a fifth of its time late at most
        self._look_seconds = min(1.0, settings.worker_ttl_seconds / 5)

    def _new_presence(self) -> Membership:
        return Membership(self.settings.worker_ttl_seconds, self.settings.origin_readers)

    def _now(self) -> float:
        """Seconds since the epoch, by a clock that never jumps."""
        return self._epoch + time.monotonic()

    @property
    def leads(self) -> bool:
        return self._lease.is_held

    async def start(self) -> None:
        """Look whether the backend is there, and lead if nobody does. Raises `CallRefused`."""
        try:
            await self._backend.load()
        except BackendError as error:
            raise CallRefused(error.reason, str(error)) from error
        await self.campaign()

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until told to stop; `start` comes first."""
        self.sockets.listen(self._received)
        loops = [asyncio.create_task(loop()) for loop in (self._campaign, self._decide, self._look)]
        stopped = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait([*loops, stopped], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # a loop ends by a defect only
        finally:
            for task in (*loops, stopped, *self._tasks):
                task.cancel()
            await asyncio.gather(*loops, stopped, *self._tasks, return_exceptions=True)
            await self._close()

    async def _close(self) -> None:
        if self._lease.mine:
            try:
                await self._backend.release(self._lease)
            except BackendError as error:
                log.warning("the lease could not be given back: %s", error)
        await self._backend.close()
        self.close()

    def close(self) -> None:
        """Let go of sockets and ports; `run` does it at its end."""
        self.sockets.close()
        self.web.close()

    # who leads

    async def _campaign(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._backend.renew_seconds):
                    await self._hurry.wait()
            except TimeoutError:
                pass
            self._hurry.clear()
            await self.campaign()

    async def campaign(self) -> None:
        """Take, renew or look at the lease once; whoever leads anew reads what is written."""
        try:
            lease = await self._backend.lead(self.settings.instance_id, self.advertised)
        except BackendError as error:
            log.warning("cannot renew the lease: %s", error)
            return
        if lease.mine and (lease.fence != self._lease.fence or not self._lease.mine):
            self._state = None
        if not lease.mine and self._lease.mine:
            log.warning("%s leads now", lease.leader or "somebody else")
        took_over = lease.mine and lease.fence != self._lease.fence
        self._lease = lease
        if lease.mine and self._state is None:
            await self._resume(lease, took_over)
        self._show()

    async def _resume(self, lease: Lease, took_over: bool) -> None:
        async with self._writing:
            try:
                stored = await self._backend.load()
                durable = state.take_over(stored, self.settings.instance_id, self._now())
                if took_over or stored is None:
                    await self._store(durable, lease)
                elif stored is not None:
                    durable = stored
            except BackendError as error:
                log.warning("cannot lead: %s", error)
                if took_over:
                    self._lease = _NOBODY  # try the take-over again
                return
            if took_over:
                self._membership = self._new_presence()
                self._membership.led(durable.workers, self._now())
                # the newest is the take-over's own; the others were told by whoever led before
                self._answers.publish(durable.events[-1:])
                log.info("%s leads with fence %d", self.settings.instance_id, lease.fence)
            self._blobs.keep(durable.blobs)
            self._state = durable

    # calls

    def _received(self, to: Sender, frames: list[zmq.Frame]) -> None:
        arrived = time.monotonic()
        body = frames[0].bytes if frames else b""
        call: Call | None = None
        try:
            call = parse_call(body)
            auth.check_token(self._asked_token, call.secret)
            request = parse_request(call, has_binary=len(frames) > 1)
            self._asked(
                PendingCall(to, call.call_id, call.method, arrived, self._decision(request)),
                request,
                frames[1:],
            )
        except CallRefused as error:
            call_id = call.call_id if call else call_id_of(body)
            self._answers.refuse(
                PendingCall(to, call_id, call.method if call else "", arrived, _nothing), error
            )

    def _decision(self, request: Request) -> Decide:
        return lambda durable: handlers.handle(
            durable, self._membership, request, self._about(), self._now()
        )

    def _about(self) -> ServerInfo:
        leader = self.advertised if self.leads else self._lease.leader
        events = self.sockets.events_endpoint
        return ServerInfo(
            self.settings.instance_id,
            self._backend.name,
            leader,
            self.leads,
            events,
            self._started_at,
        )

    def _asked(self, waiting: PendingCall, request: Request, pieces: list[zmq.Frame]) -> None:
        if not self.leads and request.reads:
            self._spawn(self._answer_as_follower(waiting))
        elif not self.leads:
            raise self._not_leader()
        elif self._state is None:
            raise CallRefused(
                Reason.BACKEND_UNAVAILABLE, "the coordinator is reading its state; ask again"
            )
        elif isinstance(request, SubmitPlan | SetCurrentManifest):
            nbytes = sum(map(len, pieces))
            if nbytes > MAX_BINARY_NBYTES:
                raise CallRefused(
                    Reason.TOO_LARGE, f"{nbytes} bytes; {MAX_BINARY_NBYTES} is the most"
                )
            self._spawn(self._checked(waiting, request, pieces))
        # a thousand come at once, and each nearly always changes something
        elif isinstance(request, Precommit):
            self._wait(waiting)
        else:
            self._try(waiting, self._state)

    def _try(self, waiting: PendingCall, durable: CoordinatorState) -> None:
        """Answer what changes nothing; the rest waits for its turn. Raises `CallRefused`."""
        outcome = waiting.decide(durable)
        if outcome.durable is durable:
            self._answers.publish(outcome.events)
            self._answers.answer(waiting, outcome)
        else:
            self._wait(waiting)

    def _wait(self, waiting: PendingCall) -> None:
        self._waiting.append(waiting)
        self._wake.set()

    async def _checked(
        self, waiting: PendingCall, request: Request, pieces: list[zmq.Frame]
    ) -> None:
        """A plan or a manifest: look at it, keep it, then decide about it."""
        try:
            async with self._checking:
                content = await plan_check.received([piece.buffer for piece in pieces])
                if isinstance(request, SubmitPlan):
                    checked = await plan_check.plan(content)
                    plan = checked.plan
                    blobs = {plan.manifest_digest: checked.manifest, plan.digest: content}
                    result = {
                        "digest": plan.digest,
                        "version": plan.version,
                        "manifest_digest": plan.manifest_digest,
                    }
                    waiting.decide = lambda durable: handlers.changed(
                        durable, state.submit_plan(durable, plan, self._now()), result
                    )
                else:
                    manifest = await plan_check.manifest(content)
                    blobs = {manifest.digest: content}
                    waiting.decide = lambda durable: handlers.changed(
                        durable, state.set_manifest(durable, manifest), asdict(manifest)
                    )
            if not self.leads or self._state is None:
                raise self._not_leader()
            if waiting.decide(self._state).durable is not self._state:
                async with self._writing:  # or a blob of this name may be dropped just now
                    await self._blobs.put(blobs)
            if self._state is None:
                raise self._not_leader()
            self._try(waiting, self._state)
        except BackendError as error:
            self._answers.refuse(waiting, unavailable(error))
        except CallRefused as error:
            self._answers.refuse(waiting, error)

    async def _answer_as_follower(self, waiting: PendingCall) -> None:
        try:
            self._answers.answer(waiting, waiting.decide(await self._look_up()))
        except BackendError as error:
            self._answers.refuse(waiting, unavailable(error))
        except CallRefused as error:
            self._answers.refuse(waiting, error)

    async def _look_up(self) -> CoordinatorState:
        """What is written, as a follower tells it."""
        async with self._reading:
            if self._read is None or time.monotonic() - self._read[0] > READ_AGAIN_SECONDS:
                async with self._writing:
                    found = await self._backend.load()
                self._read = (time.monotonic(), found or CoordinatorState())
                self._blobs.keep(self._read[1].blobs)
            return self._read[1]

    def _not_leader(self) -> CallRefused:
        leader = (
            self._lease.leader
            if not self._lease.mine and self._lease.leader != self.advertised
            else ""
        )
        text = f"{leader} leads" if leader else "nobody leads at the moment"
        return CallRefused(Reason.NOT_LEADER, f"this coordinator does not lead: {text}", leader)

    # decisions

    async def _decide(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            async with self._writing:
                # those that have waited longest
                batch, self._waiting = self._waiting[:MOST_AT_ONCE], self._waiting[MOST_AT_ONCE:]
                await self._decide_all(batch)
            if self._waiting:
                self._wake.set()
                await asyncio.sleep(0)  # heartbeats in between

    async def _decide_all(self, batch: list[PendingCall]) -> None:
        lease, before = self._lease, self._state
        if not self.leads or before is None:
            for waiting in batch:
                self._answers.refuse(waiting, self._not_leader())
            return
        durable = before
        answers: list[Callable[[], None]] = []
        events: list[Event] = []
        for waiting in batch:
            try:
                outcome = waiting.decide(durable)
            except CallRefused as error:
                answers.append(partial(self._answers.refuse, waiting, error))
                continue
            durable = outcome.durable
            events.extend(outcome.events)
            answers.append(partial(self._answers.answer, waiting, outcome))
        if durable is not before:
            try:
                await self._store(durable, lease)
            except BackendError as error:
                self._lost(error)
                for waiting in batch:
                    self._answers.refuse(waiting, unavailable(error))
                return
            # A lease that went and came back meanwhile: somebody else may have written since, so it
            # is read again.
            self._state = durable if self._lease.fence == lease.fence else None
        self._answers.publish(events)
        for answer in answers:
            answer()
        if time.monotonic() - self._shown_at > SHOW_SECONDS:
            self._show()
        # only now does the state that is written name them no more
        await self._blobs.forget(before.blobs - durable.blobs, lease)

    async def _store(self, durable: CoordinatorState, lease: Lease) -> None:
        try:
            await self._backend.store(durable, lease)
        except BackendError as error:
            self.metrics.stores.labels(error.reason).inc()
            raise
        self.metrics.stores.labels("ok").inc()

    def _lost(self, error: BackendError) -> None:
        """A write failed, and nobody knows what is written: read it before anything is decided."""
        log.warning("nothing is decided until the state is read again: %s", error)
        self._state = None
        if isinstance(error, Fenced):
            self._lease = _NOBODY
        self._hurry.set()

    # time

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self._look_seconds)
            self.sockets.drain()  # who spoke is heard before anybody is called silent
            durable = self._state
            if self.leads and durable is not None:
                try:
                    self._try(
                        PendingCall(None, None, "look", time.monotonic(), self._after_a_look),
                        durable,
                    )
                except CallRefused as error:
                    log.warning("%s", error)
            self._show()

    def _after_a_look(self, durable: CoordinatorState) -> CallResult:
        now = self._now()
        silent = self._membership.silent(durable.workers, now, self._look_seconds)
        return handlers.changed(durable, state.expire(state.drop(durable, silent, now), now), {})

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        self.metrics.show(self._state if self.leads else None, self._membership)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _nothing(durable: CoordinatorState) -> CallResult:
    return CallResult(durable, {})
