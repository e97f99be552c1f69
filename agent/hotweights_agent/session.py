"""The node's mind: messages in, effects out, and nothing else.

`Session.handle` takes one thing that happened and gives what is to be done about it, in order. It opens no socket, reads no
clock and waits for nobody, so that whole lives of a node can be played in a test. It decides by level: every message changes what
is known, and then everything that is known is looked at again; doing a step twice changes nothing.

Whose word counts for what a pod is to serve is told in `word`; for what an engine serves, only its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import assert_never

from hotweights_agent import messages
from hotweights_agent.effects import (
    Close,
    Effect,
    Forget,
    MarkPod,
    Marks,
    Remember,
    Report,
    UnmarkPod,
)
from hotweights_agent.engine import Engine
from hotweights_agent.holdings import Holdings
from hotweights_agent.messages import Message, Now, Pod
from hotweights_agent.processes import ProtocolBroken
from hotweights_agent.report import engine_status, marks
from hotweights_agent.resolving import Resolving
from hotweights_agent.steering import Bounds, Situation, count, satisfied, steer
from hotweights_agent.word import Word
from hotweights_crds.base import human_size
from hotweights_crds.nodeweights import (
    Capacity,
    Endpoint,
    NodeWeightsStatus,
    PodAssignment,
)

_Listed = tuple[Engine, PodAssignment | None]


@dataclass(frozen=True, slots=True)
class Self:
    """What the agent says about itself."""

    boot_id: str
    version: str = ""
    endpoint: str = ""
    endpoints: tuple[Endpoint, ...] = ()


class Session:
    """One node's state, from the start of the agent to its end."""

    def __init__(self, me: Self, bounds: Bounds | None = None, reconnect_seconds: float = 15.0) -> None:
        """After a start, engines that live have ``reconnect_seconds`` to come back before they are called disconnected."""
        self._me = me
        self._bounds = bounds or Bounds()
        self._reconnect_seconds = reconnect_seconds
        self._started_at: float | None = None
        self._word = Word()
        self._engines: dict[str, Engine] = {}
        self._conns: dict[int, str] = {}  # connection → pod UID
        self._labels: dict[str, str] = {}
        self._shown: dict[str, Marks] = {}
        self.holdings = Holdings()
        self._resolving = Resolving()
        self._capacity = Capacity()
        self._reported: NodeWeightsStatus | None = None
        self._ids = itertools.count(1)

    # -- for those who look ------------------------------------------------------------------------------------------

    @property
    def engines(self) -> tuple[Engine, ...]:
        """All engines that are known."""
        return tuple(self._engines.values())

    def assignment(self, uid: str) -> PodAssignment | None:
        """What a pod is to serve, by whoever's word counts now."""
        return self._word.of(uid)

    # -- messages ----------------------------------------------------------------------------------------------------

    def handle(self, message: Message, now: Now) -> list[Effect]:
        """Everything to do about one message, in this order."""
        if self._started_at is None:
            self._started_at = now.seconds
        effects = self._note(message, now)
        effects += self._steer_engines(now)
        effects += self.holdings.steer(self._word.stage(), self._needed(), now.seconds) if self._word.known else []
        effects += self._resolving.steer(now.seconds)
        return effects + self._tell(now)

    def _note(self, message: Message, now: Now) -> list[Effect]:
        match message:
            case messages.Recalled():
                self._word.recalled(message.pods)
            case messages.Assigned():
                return self._note_assigned(message)
            case messages.ApiAway():
                self._word.silent()
            case messages.PodsPresent():
                return self._note_present(message.uids)
            case messages.Marked():
                self._labels[message.pod_uid] = message.digest_label
            case messages.StageProgressed():
                self.holdings.progressed(message)
            case messages.StageDone():
                return self.holdings.done(message)
            case messages.StageFailed():
                self.holdings.failed(message, now.seconds)
            case messages.CapacityChanged():
                free = message.free_bytes
                self._capacity = Capacity(memory_bytes=message.memory_bytes, free_bytes=free, free=human_size(free))
            case messages.ResolveDone():
                self._resolving.done(message, now.seconds)
            case messages.Connected():
                return self._note_connected(message, now)
            case messages.Gone():
                self._note_gone(message.conn)
            case messages.Said():
                return self._note_said(message, now)
            case messages.Ticked():
                pass
            case _:
                assert_never(message)
        return []

    def _note_assigned(self, message: messages.Assigned) -> list[Effect]:
        new = self._word.assigned(message.spec, message.generation)
        self._resolving.wanted({item.uid: item for item in message.spec.resolve})
        return [Remember(new)] if new else []

    def _note_present(self, uids: frozenset[str]) -> list[Effect]:
        connected = {uid for uid, engine in self._engines.items() if engine.connected}
        gone = self._word.present(uids | connected)
        for uid in [uid for uid in self._labels if uid not in uids]:
            del self._labels[uid]
        return [Forget(gone)] if gone else []

    def _note_connected(self, message: messages.Connected, now: Now) -> list[Effect]:
        engine = self._engines.setdefault(message.pod.uid, Engine(message.pod))
        try:
            replaced = engine.connect(message.conn, message.hello, now)
        except ProtocolBroken as error:
            return [Close(message.conn, error.reason, str(error))]
        self._conns[message.conn] = message.pod.uid
        for conn in replaced:
            self._conns.pop(conn, None)
        return [Close(conn, "Replaced", "the same rank has connected again") for conn in replaced]

    def _note_gone(self, conn: int) -> None:
        uid = self._conns.pop(conn, None)
        if uid is not None:
            self._engines[uid].gone(conn)

    def _note_said(self, message: messages.Said, now: Now) -> list[Effect]:
        uid = self._conns.get(message.conn)
        if uid is None:
            return []
        engine = self._engines[uid]
        try:
            failure = engine.said(message.conn, message.frame, now)
        except ProtocolBroken as error:
            self._note_gone(message.conn)
            return [Close(message.conn, error.reason, str(error))]
        if failure is not None:
            count(engine, failure, now.seconds)
        return []

    # -- by level ----------------------------------------------------------------------------------------------------

    def _steer_engines(self, now: Now) -> list[Effect]:
        effects: list[Effect] = []
        for uid, engine in self._engines.items():
            at = Situation(
                self.assignment(uid),
                self.holdings,
                self._labels.get(uid, ""),
                now.seconds,
                lambda: next(self._ids),
                self._bounds,
            )
            effects += steer(engine, at)
        for effect in effects:
            if isinstance(effect, Close):
                self._note_gone(effect.conn)
        return effects

    def _needed(self) -> set[str]:
        """Versions that engines are about to take."""
        asked = {rank.asked.goal.digest for engine in self.engines for rank in engine.ranks.values() if rank.asked}
        leaders = (engine.leader for engine in self.engines)
        return asked | {leader.asked.goal.digest for leader in leaders if leader is not None and leader.asked}

    def _listed(self) -> Iterator[_Listed]:
        """Engines to tell of: the connected ones, and those that should be."""
        pods = self._word.pods
        for uid, pod in pods.items():
            if uid not in self._engines:
                self._engines[uid] = Engine(Pod(uid, pod.namespace, pod.name))
        for uid in [u for u, engine in self._engines.items() if not engine.connected and u not in pods]:
            del self._engines[uid]
        for uid in sorted(self._engines):
            yield self._engines[uid], self.assignment(uid)

    def _tell(self, now: Now) -> list[Effect]:
        """What pods are to show and the object is to say, where it changed.

        For a while after a start engines that live may not have come back yet; until then their pods keep showing what they
        show, and the object what it says: an agent's upgrade un-readies nobody.
        """
        if not self._word.known:
            return []
        listed = list(self._listed())
        started_at = now.seconds if self._started_at is None else self._started_at
        grace = now.seconds < started_at + self._reconnect_seconds
        effects = self._mark_pods([(e, wanted) for e, wanted in listed if e.seen or not grace])
        if not self._word.heard or (grace and not all(engine.seen for engine, _ in listed)):
            return effects
        return effects + self._report(listed)

    def _mark_pods(self, listed: Sequence[_Listed]) -> list[Effect]:
        effects: list[Effect] = []
        versions = self._word.versions()
        for engine, wanted in listed:
            new = marks(engine, wanted, self.holdings, versions, self._word.stale.get(engine.pod.uid, 0))
            if self._shown.get(engine.pod.uid) != new:
                self._shown[engine.pod.uid] = new
                effects.append(MarkPod(engine.pod, new))
        for uid in [uid for uid in self._shown if uid not in self._engines]:
            del self._shown[uid]
            effects.append(UnmarkPod(uid))
        return effects

    def _report(self, listed: Sequence[_Listed]) -> list[Effect]:
        status = self._status(listed)
        if status == self._reported:
            return []
        urgent = self._reported is None or _without_progress(status) != _without_progress(self._reported)
        self._reported = status
        return [Report(status, urgent)]

    def _status(self, listed: Sequence[_Listed]) -> NodeWeightsStatus:
        """All that the node's object says, but for the conditions, which carry times."""
        versions = self._word.versions()
        right = sum(1 for engine, wanted in listed if wanted is not None and satisfied(engine, wanted))
        return NodeWeightsStatus(
            observed_generation=self._word.generation,
            boot_id=self._me.boot_id,
            agent_version=self._me.version,
            endpoint=self._me.endpoint,
            endpoints=list(self._me.endpoints),
            capacity=self._capacity,
            staged=self.holdings.status(),
            engines=[
                engine_status(engine, wanted, self.holdings, versions, self._word.stale.get(engine.pod.uid, 0))
                for engine, wanted in listed
            ],
            resolved=self._resolving.status(),
            summary=f"{right}/{len(listed)}",
        )


def _without_progress(status: NodeWeightsStatus) -> NodeWeightsStatus:
    """What must be written at once: all but how far a fetch is, and the texts that say it."""
    staged = [s if s.phase != "Fetching" else s.model_copy(update=_NO_PROGRESS) for s in status.staged]
    engines = [e if e.reason != "Staging" else e.model_copy(update={"message": ""}) for e in status.engines]
    return status.model_copy(update={"staged": staged, "engines": engines, "capacity": Capacity()})


_NO_PROGRESS = {"bytes_done": 0, "bytes_total": 0, "bytes_fetched": 0, "seconds": 0.0}
