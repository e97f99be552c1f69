"""Between a worker and the coordinator: heartbeats out, what they answer in; it stands where
`KubeSync` stands in a cluster.

By level: every answer says all that holds, so a lost event, another leader or a coordinator that
began anew costs at most one heartbeat. Events only make the next heartbeat come sooner. While no
coordinator answers, the session is told so and engines are kept on what they were told last. It
decides nothing: `assignments` says what an answer means, the session does it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hotweights.worker import assignments
from hotweights.worker.allowed_sources import Readable
from hotweights.worker.assignments import Assignment, Route, Version, WorkerStatus
from hotweights.worker.peer_provider import LocalChunks
from hotweights.worker.peers import PeerSelection
from hotweights_agent.node import Node
from hotweights_agent.session.messages import ApiUnavailable, Assigned
from hotweights_common.reasons import TRANSIENT_FOR_WORKERS, Reason
from hotweights_coordinator.client.client import AsyncClient
from hotweights_coordinator.client.participation import Participation
from hotweights_coordinator.wire.messages import (
    CallRefused,
    CoordinatorError,
    CoordinatorUnreachable,
)
from hotweights_crds.nodeweights import NodeWeightsSpec, NodeWeightsStatus
from hotweights_planner import plan as plans
from hotweights_planner.errors import Refused
from hotweights_storage.sources.base import Sources

log = logging.getLogger(__name__)

COMPLAIN_SECONDS = 30.0  # between two lines of the log, whatever the trouble: a beat is a second
Fault = tuple[str, str]
"""A reason, one CamelCase word, and its message."""


@dataclass(frozen=True, slots=True)
class HeartbeatTiming:
    """How often the coordinator is spoken to. A worker counts as live for 15 s after its last
    heartbeat (``worker_ttl_seconds`` of the coordinator); these stay well below.
    """

    beat_seconds: float = 1.0
    """Between two heartbeats when nothing happens."""
    hurry_seconds: float = 0.05
    """Between two heartbeats at least, however many events come."""
    call_seconds: float = 5.0
    """For one answer, from whichever coordinator leads."""
    away_seconds: float = 5.0
    """How long it may be silent until the disk's memory stands in for it."""
    first_seconds: float = 30.0
    """At the start: how long one is looked for."""


class CoordinatorSync:
    """One worker's conversation, all of it on the node's event loop. It is the session's
    `NodeStatusSink`.
    """

    def __init__(
        self,
        client: AsyncClient,
        participation: Participation,
        node: Node,
        sources: Sources,
        peering: PeerSelection,
        lending: LocalChunks,
        *,
        timing: HeartbeatTiming | None = None,
        once: asyncio.Event | None = None,
        adjusted: Callable[[WorkerStatus], WorkerStatus] = lambda status: status,
        refused: Callable[[str], Fault | None] = lambda digest: None,
    ) -> None:
        """``once`` is set when a version was applied. What the node's status says goes through
        ``adjusted`` before it is told; ``refused`` says of a version's digest, whose manifest is
        here by then, why these engines cannot take it.
        """
        self._client = client
        self._participation = participation
        self._adjusted = adjusted
        self._refused = refused
        self._node = node
        self._readable = Readable(sources)
        self._peering = peering
        self._lending = lending
        self._timing = timing or HeartbeatTiming()
        self._once = once
        self._wake = asyncio.Event()
        self._status = NodeWeightsStatus()
        self._assignment: Assignment | None = None
        self._current: Version | None = None
        # plan's digest → why it cannot be used; None: it can
        self._plans: dict[str, Fault | None] = {}
        self._spec: NodeWeightsSpec | None = None
        self._generation = 0
        self._said_applied = False
        self._heard_at = time.monotonic()
        self._away = False
        self._complained_at = float("-inf")
        self.synced = False
        """Whether a coordinator has answered, ever: readiness, and what may end the start."""

    def offer(self, status: NodeWeightsStatus, *, urgent: bool) -> None:
        """What the node holds and serves now."""
        self._status = status
        if urgent:
            self._wake.set()

    def hurry(self) -> None:
        """Make the next heartbeat come soon: something happened at the coordinator."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled. Raises `CoordinatorError` when none takes this worker in, at the
        start.
        """
        self._heard_at = time.monotonic()  # what came before was this host's own start
        while True:
            self._wake.clear()  # before the question: what happens during it asks for another
            try:
                await self._beat()
            except CoordinatorError as error:
                await self._note_trouble(error)
            await asyncio.sleep(self._timing.hurry_seconds)
            try:
                async with asyncio.timeout(self._beat_seconds):
                    await self._wake.wait()
            except TimeoutError:
                continue

    @property
    def worker_status(self) -> WorkerStatus:
        """Where this host is with what was asked of it."""
        attempt = self._assignment.attempt if self._assignment else None
        found = self._adjusted(assignments.worker_status(self._status, attempt, self._current))
        wanted = attempt or self._current
        unusable = self._plans.get(wanted.plan_digest) if wanted else None
        return (
            found
            if unusable is None
            else WorkerStatus(found.have, False, found.applied, unusable, found.engines)
        )

    @property
    def _beat_seconds(self) -> float:
        """When all is settled as rarely as the coordinator allows: an event makes the next one come
        at once.
        """
        now = self._assignment
        settled = (
            now is not None
            and now.attempt is None
            and (self._current is None or self._said_applied)
        )
        return (now.heartbeat_seconds if now and settled else None) or self._timing.beat_seconds

    @property
    def _answer_seconds(self) -> float:
        """For one answer; at the start no more than is left of looking for a coordinator."""
        if self.synced:
            return self._timing.call_seconds
        left = self._timing.first_seconds - (time.monotonic() - self._heard_at)
        return min(self._timing.call_seconds, max(left, self._timing.hurry_seconds))

    async def _beat(self) -> None:
        answer = Assignment.parse(await self._ask())
        self._heard_at, self.synced = time.monotonic(), True
        if self._assignment is not None and answer.token < self._assignment.token:
            what = (
                f"an assignment with token {answer.token} came after one with "
                f"{self._assignment.token}"
            )
            raise CoordinatorError(
                f"{what} and is not followed: is the coordinator's clock right?", Reason.STALE_TOKEN
            )
        # first what holds is told, then what is true by now: a precommit for this very token
        await self._follow(answer)
        if answer.state == "begun" and self.worker_status.ready:
            worker_id = self._participation.worker_id
            await self._client.call("precommit", worker_id=worker_id, token=answer.token)
        if self._once is not None and answer.state == "committed" and self._said_applied:
            self._once.set()

    async def _ask(self) -> Mapping[str, object]:
        now, current = self.worker_status, self._current
        applied = (
            {"digest": current.digest, "token": current.token} if current and now.applied else None
        )
        method, arguments = self._participation.next_call(
            now.have, applied, self._failure(now), now.engines
        )
        try:
            reply = await self._client.call(
                method, timeout_seconds=self._answer_seconds, **arguments
            )
        except CallRefused as error:
            if self._participation.is_forgotten(error):
                self._wake.set()  # register at once, and not a heartbeat later
            raise
        if self._participation.answered():
            self._said_applied = False
            log.info("worker %s takes part", self._participation.worker_id)
            return reply.result
        if applied is not None and not self._said_applied and current is not None:
            log.info("applied %s (engines: %d)", current.version, now.engines)
        self._said_applied = applied is not None
        return reply.result

    def _failure(self, now: WorkerStatus) -> dict[str, object] | None:
        if now.failure is None or self._assignment is None:
            return None
        reason, message = now.failure
        attempt = self._assignment.attempt
        token = attempt.token if attempt else self._current.token if self._current else 0
        return {"reason": reason or "Failed", "message": message, "token": token}

    async def _follow(self, answer: Assignment) -> None:
        """Tell the session what holds now."""
        before, self._assignment = self._assignment, answer
        # a coordinator that lost its state has nothing current: what was goes on to hold
        self._current = answer.current or self._current
        attempt = answer.attempt
        if before is None or (before.state, before.token) != (answer.state, answer.token):
            log.info(
                "the coordinator says: %s %s (token %d)",
                answer.state,
                answer.version or "nothing",
                answer.token,
            )
        wanted = [version for version in (attempt, self._current) if version is not None]
        for version in wanted:
            if version.plan_digest not in self._plans:
                await self._learn(version)
        usable = [version for version in wanted if self._plans[version.plan_digest] is None]
        readable = {v.digest: await self._readable.may(v.uri) for v in usable}
        self._lending.waits = all(readable.values())
        engines = [engine.pod_uid for engine in assignments.connected(self._status)]
        spec = assignments.spec_of(
            attempt if attempt in usable else None,
            self._current if self._current in usable else None,
            answer.token,
            engines,
            {v.digest: await self._route(v, answer, readable[v.digest]) for v in usable},
        )
        # after a silence also the same again: the session was told that nobody answers
        if spec != self._spec or self._away:
            self._spec, self._away = spec, False
            self._generation += 1
            await self._node.driver.tell(Assigned(spec, self._generation))

    async def _learn(self, version: Version) -> None:
        """The version's manifest, out of its plan; a plan that is not what it should be is never
        used.
        """
        reply = await self._client.call("get_plan", digest=version.plan_digest)
        try:
            plan = await asyncio.to_thread(
                plans.parse, reply.binary or b"", f"plan {version.plan_digest}"
            )
        except Refused as error:
            self._plans[version.plan_digest] = (error.reason, str(error))
            return
        found = (plan.digest, plan.manifest.digest, plan.source)
        if found != (version.plan_digest, version.digest, version.uri):
            text = (
                f"the coordinator's plan of {version.version} is not the plan that it names; "
                "submit it again"
            )
            self._plans[version.plan_digest] = (Reason.DIGEST_MISMATCH, text)
            return
        await asyncio.to_thread(self._node.manifests.put, plan.manifest)
        self._plans[version.plan_digest] = self._refused(version.digest)

    async def _route(self, version: Version, answer: Assignment, readable: bool) -> Route:
        """Whom to ask. For the attempt as the coordinator says, so that a crowd forms chains; for
        what is current its donors, the nearest first; and where the source may not be read here,
        everybody.
        """
        if version.digest in self.worker_status.have:
            return Route()  # nothing is to be pulled
        if not readable:
            listed = (await self._client.call("list_workers")).result.get("workers", [])
            return self._peering.everybody(listed)
        if version.digest == answer.digest and answer.state in assignments.OPEN:
            return self._peering.chain(answer.parents, answer.fallbacks)
        donors = (await self._client.call("who_has", digest=version.digest)).result.get(
            "workers", []
        )
        return self._peering.donors(donors)

    async def _note_trouble(self, error: CoordinatorError) -> None:
        now = time.monotonic()
        silent_seconds = now - self._heard_at
        # At the start an error that will not pass is the end; a worker that took part once goes on
        # trying, because its engines serve.
        if not self.synced:
            final = (
                not isinstance(error, CoordinatorUnreachable)
                and error.reason not in TRANSIENT_FOR_WORKERS
            )
            if final:
                raise error
            if silent_seconds >= self._timing.first_seconds:
                unanswered = isinstance(error, CoordinatorUnreachable)
                raise self._client.unreachable(silent_seconds) if unanswered else error
        # an unknown worker registers again by itself: nobody has to read of it
        if error.reason != Reason.UNKNOWN_WORKER and now - self._complained_at >= COMPLAIN_SECONDS:
            self._complained_at = now
            log.warning("%s", error)
        if silent_seconds >= self._timing.away_seconds and not self._away:
            self._away = True
            await self._node.driver.tell(ApiUnavailable())
