"""Runs the session: messages in, one after the other, and its effects out into the world.

The queue is bounded, so that whoever talks too much waits. Effects are done in their order; those
that take time are only begun here, and what comes of them returns as a message. Messages that wait
together are looked at together, because looking costs more than noting. A defect costs the message,
the engine or the effect that brought it to light; it is logged and counted, and the node goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, assert_never

from hotweights_agent.engines.socket_server import EngineServer
from hotweights_agent.local.state_file import StateFile, StateFileNotWritten
from hotweights_agent.metrics import Metrics
from hotweights_agent.session import effects as fx
from hotweights_agent.session.defects import contained
from hotweights_agent.session.messages import (
    AssignmentsLoaded,
    CapacityChanged,
    Message,
    Now,
    Pod,
    StageFailed,
    Ticked,
)
from hotweights_agent.session.session import Session
from hotweights_agent.staging.stager import Stager
from hotweights_agent.staging.store import Pin, Store, UnknownVersion
from hotweights_common.reasons import Reason
from hotweights_crds.nodeweights import NodeWeightsStatus
from hotweights_transports.handoff import frames

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25  # how late a deadline of the session may be noticed
CAPACITY_SECONDS = 5.0  # free memory changes all the time; it is only shown
MAX_WAITING_MESSAGES = 1024  # then whoever tells more waits, an engine in its own socket
MESSAGES_AT_ONCE = 64  # noted before they are acted upon
DISK_SECONDS = 5.0  # how soon a disk that took nothing is tried again
DEFECT_AGAIN_SECONDS = 60.0  # how often the same defect is logged; it is counted each time


class NodeStatusSink(Protocol):
    """Tells whoever is above what the node holds and serves."""

    def offer(self, status: NodeWeightsStatus, *, urgent: bool) -> None:
        """The newest status; ``urgent``: do not wait."""
        ...


class PodStatusSink(Protocol):
    """Makes the outside see what an engine serves."""

    def want(self, pod: Pod, pod_status: fx.PodStatus) -> None:
        """From now on this is to be shown."""
        ...

    def forget(self, uid: str) -> None:
        """Nothing is known of this pod any more: write nothing more to it."""
        ...


class _PinnedImage:
    """A pin as the engine server wants it."""

    def __init__(self, pin: Pin) -> None:
        self._pin = pin

    @property
    def fds(self) -> tuple[int, ...]:
        return self._pin.image.fds

    def release(self) -> None:
        self._pin.release()


class Driver:
    """One agent's session with everything around it. Parts that need `tell` are given after
    construction.
    """

    def __init__(
        self,
        session: Session,
        memory: StateFile,
        store: Store,
        metrics: Metrics,
        now: Callable[[], Now],
        *,
        memory_bytes: int = 0,
    ) -> None:
        self._session = session
        self._file = memory
        self._store = store
        self._metrics = metrics
        self._now = now
        self._memory_bytes = memory_bytes
        self._queue: asyncio.Queue[Message] = asyncio.Queue(MAX_WAITING_MESSAGES)
        self._own: deque[Message] = (
            deque()
        )  # what we tell the session ourselves; the queue may be full of others' words
        self._named: dict[tuple[str, str], float] = {}  # defect → when it was logged
        self._disk_at = 0.0
        self.turned_at = now().seconds
        self.server: EngineServer
        self.stager: Stager
        self.status: NodeStatusSink
        self.pod_status: PodStatusSink

    async def tell(self, message: Message) -> None:
        """Hand a message to the session; waits while too many are waiting."""
        await self._queue.put(message)

    async def run(self) -> None:
        """Turn messages into effects, until cancelled. What the disk remembers comes first, so that
        no engine is answered without it.
        """
        await self._turn(AssignmentsLoaded(self._file.pods))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick(), name="clock")
            while True:
                messages = [self._own.popleft() if self._own else await self._queue.get()]
                while len(messages) < MESSAGES_AT_ONCE and not self._queue.empty():
                    messages.append(self._queue.get_nowait())
                await self._turn(*messages)

    async def _tick(self) -> None:
        capacity_at = 0.0
        while True:
            if self._now().seconds >= capacity_at:
                capacity_at = self._now().seconds + CAPACITY_SECONDS
                usage = await asyncio.to_thread(self._store.usage)
                total = self._memory_bytes or usage.held + usage.promised + usage.free
                await self.tell(CapacityChanged(total, usage.free))
            await self.tell(Ticked())
            await asyncio.sleep(TICK_SECONDS)

    async def _turn(self, *messages: Message) -> None:
        now = self._now()
        for message in messages:
            self._metrics.note(message)
        for effect in self._session.handle_all(messages, now):
            with contained(partial(self._defect, type(effect).__name__)):
                await self._do(effect)
        # nobody may say it again: a restart would then remember what was true before
        if self._file.unwritten and now.seconds >= self._disk_at:
            await self._on_disk(self._file.retry)
        self.turned_at = now.seconds  # after the effects: one that hangs is seen from outside

    def _defect(
        self, where: str, error: Exception, subject: str = "", story: Sequence[str] = ()
    ) -> None:
        self._metrics.defects.inc()
        now, what = self._now().seconds, (where, type(error).__name__)
        if now >= self._named.get(what, float("-inf")) + DEFECT_AGAIN_SECONDS:
            self._named[what] = now
            whose = (
                f", which cost the engine of {subject} its connections ({'; '.join(story)})"
                if subject
                else ""
            )
            text = "a defect of the agent in %s%s; please report it. The node goes on without it"
            log.error(text, where, whose, exc_info=error)

    async def _do(self, effect: fx.Effect) -> None:
        match effect:
            case fx.Stage():
                log.info("staging %s %s", effect.item.version, effect.item.digest)
                self.stager.stage(effect.item)
            case fx.CancelStage():
                self.stager.cancel(effect.digest)
            case fx.Prefer():
                self.stager.prefer(effect.digests)
            case fx.ReleaseVersion():
                log.info("releasing %s", effect.digest)
                self._store.release(effect.digest)
            case fx.Resolve():
                self.stager.resolve(effect.item)
            case fx.CancelResolve():
                self.stager.cancel_resolve(effect.uid)
            case fx.SendPrepare():
                await self._prepare(effect)
            case fx.Send():
                log.info("to engine connection %d: %s", effect.conn, effect.frame)
                self.server.send(effect.conn, effect.frame)
            case fx.Close():
                self.server.close_connection(effect.conn, effect.reason, effect.message)
            case fx.SaveAssignments():
                await self._on_disk(self._file.save, *effect.pods)
            case fx.ForgetPods():
                await self._on_disk(self._file.forget, *effect.pod_uids)
            case fx.WritePodStatus():
                self.pod_status.want(effect.pod, effect.pod_status)
            case fx.DropPodStatus():
                self.pod_status.forget(effect.pod_uid)
            case fx.Report():
                self._metrics.show(effect.status)
                self.status.offer(effect.status, urgent=effect.urgent)
            case fx.Defect():
                self._defect(effect.where, effect.error, effect.subject, effect.story)
            case _:
                assert_never(effect)

    async def _prepare(self, effect: fx.SendPrepare) -> None:
        try:
            pin = self._store.image(effect.digest)
        except UnknownVersion as error:
            log.warning("engine connection %d: %s", effect.conn, error)
            # not by `tell`: it would wait for the queue that only this task empties
            self._own.append(
                StageFailed(effect.digest, Reason.NOT_STAGED, str(error), transient=True)
            )
            return
        frame = frames.Prepare(
            effect.id,
            effect.digest,
            memory=effect.memory,
            max_pause_seconds=effect.max_pause_seconds,
        )
        self.server.send_prepare(effect.conn, frame, _PinnedImage(pin))

    async def _on_disk(self, write: Callable[..., None], *arguments: object) -> None:
        try:
            await asyncio.to_thread(write, *arguments)
        # a full disk must not stop the node: what is lost is an answer while the API server is away
        except StateFileNotWritten as error:
            self._disk_at = self._now().seconds + DISK_SECONDS
            self._metrics.defects.inc()
            log.error("%s. Until then a restarted engine waits for the API server", error)
