"""The node's mind: messages in, effects out, and nothing else.

`Session.handle` takes one thing that happened and gives what is to be done about it, in order. It
opens no socket, reads no clock and waits for nobody, so that whole lives of a node can be played in
a test. It decides by level: every message changes what is known, and then everything that is known
is looked at again; doing a step twice changes nothing. It never raises: what a defect of ours costs
is told where it is contained.

Whose word counts for what a pod is to serve is told in `assignments`; for what an engine serves,
only its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import assert_never

from hotweights_agent.session import messages
from hotweights_agent.session.assignments import Assignments
from hotweights_agent.session.connections import ProtocolViolation
from hotweights_agent.session.defects import contained
from hotweights_agent.session.effects import (
    Close,
    Defect,
    DropPodStatus,
    Effect,
    ForgetPods,
    PodStatus,
    Prefer,
    Report,
    SaveAssignments,
    Send,
    WritePodStatus,
)
from hotweights_agent.session.engine import Engine
from hotweights_agent.session.messages import Message, Now, Pod
from hotweights_agent.session.next_effects import EngineContext, next_effects
from hotweights_agent.session.node_status import Listed, node_status, without_progress
from hotweights_agent.session.phases import Phase
from hotweights_agent.session.report import pod_status
from hotweights_agent.session.resolving import Resolving
from hotweights_agent.session.timeouts import EngineTimeouts, record_failure
from hotweights_agent.session.versions import NodeVersions
from hotweights_common import sizes
from hotweights_crds.nodeweights import (
    Capacity,
    Endpoint,
    NodeWeightsStatus,
    PodAssignment,
)


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """What the agent says about itself."""

    boot_id: str  # new with every start: what the node held in memory went with the one before
    version: str = ""
    endpoint: str = ""  # the first of the addresses for peers; empty: it has none
    endpoints: tuple[Endpoint, ...] = ()
    peer_key: str = ""  # by which peers know it at all of them; empty: they cannot


class Session:
    """One node's state, from the start of the agent to its end."""

    def __init__(
        self, me: AgentInfo, bounds: EngineTimeouts | None = None, reconnect_seconds: float = 10.0
    ) -> None:
        """After a start, engines that live have ``reconnect_seconds`` to come back before they are
        called disconnected. ``bounds`` None: the defaults.
        """
        self._me = me
        self._bounds = bounds or EngineTimeouts()
        self._reconnect_seconds = reconnect_seconds
        self._started_at: float | None = None  # None until the first message brings a time
        self._assignments = Assignments()
        self._engines: dict[str, Engine] = {}
        self._conns: dict[int, str] = {}  # connection → pod UID
        self._labels: dict[str, str] = {}
        self._shown: dict[str, PodStatus] = {}
        self.versions = NodeVersions()
        self._preferred: frozenset[str] = frozenset()
        self._resolving = Resolving()
        self._capacity = Capacity()
        self._reported: NodeWeightsStatus | None = None
        self._ids = itertools.count(1)

    # -- for those who look ---------------------------------------------------------------------

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Those that are connected, and those that are assigned or were when last looked at."""
        return tuple(self._engines.values())

    def assignment(self, uid: str) -> PodAssignment | None:
        """What a pod is to serve, by whoever's word counts now."""
        return self._assignments.of(uid)

    # -- messages -------------------------------------------------------------------------------

    def handle(self, message: Message, now: Now) -> list[Effect]:
        """Everything to do about one message, in this order. Like `handle_all`, never raises."""
        return self.handle_all([message], now)

    def handle_all(self, messages: Sequence[Message], now: Now) -> list[Effect]:
        """The same for several that came together: each is noted, then everything is looked at
        once.

        Never raises: a defect costs the message, the engine or the step that it is in, and is among
        the effects. The driver calls it from one task, with a clock that only grows.
        """
        if self._started_at is None:
            self._started_at = now.seconds
        effects: list[Effect] = []
        # what is let go of depends on what engines are about to take, and what is told on all of it
        for message in messages:
            effects += _safely(partial(self._note, message, now), partial(self._spoilt, message))
        for uid in list(self._engines):
            effects += _safely(
                partial(self._engine_effects, uid, now),
                partial(self._start_anew, uid, "next effects"),
            )
        effects += _safely(partial(self._version_effects, now), partial(_defect, "versions"))
        effects += _safely(
            partial(self._resolving.next_effects, now.seconds), partial(_defect, "resolving")
        )
        return effects + _safely(partial(self._tell, now), partial(_defect, "telling"))

    def _spoilt(self, message: Message, error: Exception) -> list[Effect]:
        """A message that could not be noted may have left its engine half changed."""
        where = type(message).__name__
        match message:
            case messages.Connected():
                # noted, so that it is among the connections that are closed
                self._conns[message.conn] = message.pod.uid
                return self._start_anew(message.pod.uid, where, error)
            case messages.FrameReceived() if message.conn in self._conns:
                return self._start_anew(self._conns[message.conn], where, error)
            case _:
                return _defect(where, error)

    def _start_anew(self, uid: str, where: str, error: Exception) -> list[Effect]:
        """Forget all about an engine; its processes connect again and say what is so."""
        engine = self._engines.get(uid)
        if engine is not None:
            self._engines[uid] = Engine(engine.pod)
        conns = [conn for conn, owner in self._conns.items() if owner == uid]
        for conn in conns:
            del self._conns[conn]
        text = "a defect of the agent: connect again, and please report what its log says"
        subject = f"{engine.pod.namespace}/{engine.pod.name}" if engine is not None else ""
        story = (*engine.story, f"it was {engine.phase}") if engine is not None else ()
        return [
            Defect(where, error, subject, story),
            *(Close(conn, "Defect", text) for conn in conns),
        ]

    def _note(self, message: Message, now: Now) -> list[Effect]:
        match message:
            case messages.AssignmentsLoaded():
                self._assignments.load(message.pods)
            case messages.Assigned():
                return self._note_assigned(message)
            case messages.ApiUnavailable():
                self._assignments.api_is_away()
            case messages.PodsPresent():
                return self._note_present(message.uids)
            case messages.PodStatusSeen():
                self._labels[message.pod_uid] = message.digest_label
            case messages.StageProgressed():
                self.versions.progressed(message)
            case messages.StageDone():
                return self.versions.done(message)
            case messages.StageFailed():
                self.versions.failed(message, now.seconds)
            case messages.CapacityChanged():
                free = message.free_bytes
                self._capacity = Capacity(
                    memory_bytes=message.memory_bytes, free_bytes=free, free=sizes.binary(free)
                )
            case messages.ResolveDone():
                self._resolving.done(message, now.seconds)
            case messages.Connected():
                return self._note_connected(message, now)
            case messages.Disconnected():
                self._note_gone(message.conn, now)
            case messages.FrameReceived():
                return self._note_said(message, now)
            case messages.Ticked():
                pass
            case _:
                assert_never(message)
        return []

    def _note_assigned(self, message: messages.Assigned) -> list[Effect]:
        new = self._assignments.assigned(message.spec, message.generation)
        effects = self._resolving.wanted({item.uid: item for item in message.spec.resolve})
        return [*effects, SaveAssignments(new)] if new else effects

    def _note_present(self, uids: frozenset[str]) -> list[Effect]:
        connected = {uid for uid, engine in self._engines.items() if engine.connected}
        # the list may be older than a pod whose engine is here already
        gone = self._assignments.present(uids | connected)
        for uid in [uid for uid in self._labels if uid not in uids]:
            del self._labels[uid]
        return [ForgetPods(gone)] if gone else []

    def _note_connected(self, message: messages.Connected, now: Now) -> list[Effect]:
        engine = self._engines.setdefault(message.pod.uid, Engine(message.pod))
        engine.story.append(
            f"{now.utc} a {'server' if message.hello.role == 'server' else 'rank'} connected "
            f"({message.conn})"
        )
        try:
            replaced = engine.connect(message.conn, message.hello, now)
        except ProtocolViolation as error:
            return [Close(message.conn, error.reason, str(error))]
        self._conns[message.conn] = message.pod.uid
        for conn in replaced:
            self._conns.pop(conn, None)
        return [Close(conn, "Replaced", "the same rank has connected again") for conn in replaced]

    def _note_gone(self, conn: int, now: Now) -> None:
        uid = self._conns.pop(conn, None)
        if uid is not None:
            self._engines[uid].story.append(f"{now.utc} a connection ended ({conn})")
            self._engines[uid].gone(conn)

    def _note_said(self, message: messages.FrameReceived, now: Now) -> list[Effect]:
        uid = self._conns.get(message.conn)
        if uid is None:  # we closed it; what was still in the queue counts no more
            return []
        engine = self._engines[uid]
        engine.story.append(f"{now.utc} {type(message.frame).__name__} ({message.conn})")
        before = engine.phase
        try:
            failure = engine.said(message.conn, message.frame, now)
        except ProtocolViolation as error:
            self._note_gone(message.conn, now)
            return [Close(message.conn, error.reason, str(error))]
        if failure is not None:
            record_failure(engine, failure, now.seconds)
        _note_phase(engine, before, now)
        return []

    # -- by level -------------------------------------------------------------------------------

    def _engine_effects(self, uid: str, now: Now) -> list[Effect]:
        engine = self._engines[uid]
        at = EngineContext(
            self.assignment(uid),
            self.versions,
            self._labels.get(uid, ""),
            now.seconds,
            lambda: next(self._ids),
            self._bounds,
        )
        before = engine.phase
        effects = next_effects(engine, at)
        for effect in effects:
            if isinstance(effect, Close):
                self._note_gone(effect.conn, now)
            else:
                frame = f" {type(effect.frame).__name__}" if isinstance(effect, Send) else ""
                engine.story.append(f"{now.utc} {type(effect).__name__}{frame}")
        _note_phase(engine, before, now)
        return effects

    def _version_effects(self, now: Now) -> list[Effect]:
        if not self._assignments.known:  # an empty list would let go of all that is here
            return []
        effects: list[Effect] = []
        awaited = self._awaited()
        if awaited != self._preferred:
            self._preferred = awaited
            effects.append(Prefer(awaited))
        return effects + self.versions.next_effects(
            self._assignments.stage(), self._needed(), now.seconds
        )

    def _awaited(self) -> frozenset[str]:
        """Versions without which a pod serves nothing: its engine boots, or is yet to come."""
        serving = {uid for uid, engine in self._engines.items() if not engine.booting}
        waiting = {*self._assignments.pods, *self._engines} - serving
        wanted = [self.assignment(uid) for uid in waiting]
        return frozenset(one.digest for one in wanted if one is not None and one.digest)

    def _needed(self) -> set[str]:
        """Versions that engines are about to take."""
        asked = {
            rank.pending.goal.digest
            for engine in self.engines
            for rank in engine.ranks.values()
            if rank.pending
        }
        leaders = (engine.leader for engine in self.engines)
        return asked | {
            leader.pending.goal.digest
            for leader in leaders
            if leader is not None and leader.pending
        }

    def _listed(self) -> Iterator[Listed]:
        """Engines to tell of: the connected ones, and those that should be."""
        pods = self._assignments.pods
        for uid, pod in pods.items():
            if uid not in self._engines:
                self._engines[uid] = Engine(Pod(uid, pod.namespace, pod.name))
        for uid in [
            u for u, engine in self._engines.items() if not engine.connected and u not in pods
        ]:
            del self._engines[uid]
        for uid in sorted(self._engines):  # one order: the status is compared as a whole
            yield self._engines[uid], self.assignment(uid)

    def _tell(self, now: Now) -> list[Effect]:
        """What pods are to show and the object is to say, where it changed.

        For a while after a start engines that live may not have come back yet; until then their
        pods keep showing what they show, and the object what it says: an agent's upgrade un-readies
        nobody.
        """
        if not self._assignments.known:
            return []
        listed = list(self._listed())
        started_at = now.seconds if self._started_at is None else self._started_at
        grace = now.seconds < started_at + self._reconnect_seconds
        # each pod as soon as its engine is back; the object, which is told as a whole, when all are
        effects = self._mark_pods([(e, wanted) for e, wanted in listed if e.seen or not grace], now)
        # what was never read cannot be answered; during the grace the old status says more
        if not self._assignments.heard or (grace and not all(engine.seen for engine, _ in listed)):
            return effects
        return effects + self._report(listed)

    def _mark_pods(self, listed: Sequence[Listed], now: Now) -> list[Effect]:
        effects: list[Effect] = []
        names = self._assignments.version_names()
        for engine, wanted in listed:
            effects += _safely(
                partial(self._mark_pod, engine, wanted, names, now), partial(_defect, "marking")
            )
        for uid in [uid for uid in self._shown if uid not in self._engines]:
            del self._shown[uid]
            effects.append(DropPodStatus(uid))
        return effects

    def _mark_pod(
        self, engine: Engine, wanted: PodAssignment | None, names: dict[str, str], now: Now
    ) -> list[Effect]:
        new = pod_status(
            engine,
            wanted,
            self.versions,
            names,
            self._assignments.stale.get(engine.pod.uid, 0),
            now.seconds,
        )
        engine.in_service = new.gate
        if self._shown.get(engine.pod.uid) == new:  # the writer brings it about by level
            return []
        self._shown[engine.pod.uid] = new
        return [WritePodStatus(engine.pod, new)]

    def _report(self, listed: Sequence[Listed]) -> list[Effect]:
        effects: list[Effect] = []
        me = self._me
        head = NodeWeightsStatus(
            observed_generation=self._assignments.generation,
            boot_id=me.boot_id,
            agent_version=me.version,
            endpoint=me.endpoint,
            endpoints=list(me.endpoints),
            peer_key=me.peer_key,
            capacity=self._capacity,
        )
        status = node_status(
            head,
            listed,
            self._assignments,
            self.versions,
            self._resolving,
            lambda error: effects.append(Defect("reporting", error)),
        )
        if status != self._reported:
            urgent = self._reported is None or without_progress(status) != without_progress(
                self._reported
            )
            self._reported = status
            effects.append(Report(status, urgent))
        return effects


def _note_phase(engine: Engine, before: Phase, now: Now) -> None:
    if engine.phase is not before:
        engine.story.append(f"{now.utc} {before} → {engine.phase}")


def _safely(
    step: Callable[[], list[Effect]], spoilt: Callable[[Exception], list[Effect]]
) -> list[Effect]:
    """What a step wants done; after a defect in it, what is to be done about that."""
    effects: list[Effect] = []
    with contained(lambda error: effects.extend(spoilt(error))):
        effects.extend(step())
    return effects


def _defect(where: str, error: Exception) -> list[Effect]:
    return [Defect(where, error)]
