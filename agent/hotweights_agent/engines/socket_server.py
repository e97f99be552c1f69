"""The node's unix socket: engines connect here, prove whose they are, and then only frames pass.

One connection is one process of an engine. It has ten seconds for its hello and is let in by its
token alone. A hello that has come with its connection is read at once: where its pod is full, it
is refused before a task or a review is spent on it. Whatever arrives is either a frame that goes on
to the session or the end of this connection, with a refusal that says why; nothing that a process
sends can do more. Who is refused at the door is held unread for a while, so that it does not knock
again at once. Its words wait
while the agent is busy (the socket's buffer fills, the sender blocks), and an engine that does not
take what it is sent is let go. Memory goes out as descriptors beside a frame; they are pinned until
the kernel has them. It does not know what frames mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import socket
import stat
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from hotweights_agent.engines import seqpacket
from hotweights_agent.engines.limits import FrameRate, Limits
from hotweights_agent.engines.pod_places import PodPlaces
from hotweights_agent.engines.refused_sockets import RefusedSockets
from hotweights_agent.engines.socket_auth import (
    AuthenticationUnavailable,
    Authenticator,
    Unauthenticated,
)
from hotweights_agent.session.messages import Connected, Disconnected, FrameReceived, Message, Pod
from hotweights_common.errors import HotweightsError
from hotweights_common.few_lines import FewLines
from hotweights_common.reasons import Reason
from hotweights_common.strangers import Strangers
from hotweights_transports.handoff import frames, sockets

log = logging.getLogger(__name__)
log.addFilter(FewLines())

SOCKET_NAME = "agent.sock"
CLOSE_SECONDS = 5.0  # then the process ends all the same, and the kernel closes what is left
# that wait to be accepted. No more: whoever comes then waits for a place (`sockets.connect`), which
# takes no longer than it takes to hear so many, and all of them are taken at once
BACKLOG = 128
ADMITTED_AT_ONCE = 16  # before the loop gets its turn


class ServerNotStarted(HotweightsError):
    """The socket could not be made."""


class PinnedImage(Protocol):
    """A version's descriptors, open until `release`."""

    @property
    def fds(self) -> tuple[int, ...]:
        """The table first, then the slabs."""
        ...

    def release(self) -> None:
        """They may be closed, once nobody else holds the version."""
        ...


class _Refusal(Exception):
    """The process may not enter; ``reason`` and text go into the frame that tells it so."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(slots=True)
class _Outgoing:
    frame: frames.Frame
    fds: tuple[int, ...] = ()
    pin: PinnedImage | None = None


@dataclass(slots=True, eq=False)
class _Connection:
    number: int
    sock: socket.socket
    queue: asyncio.Queue[_Outgoing | None] = field(default_factory=asyncio.Queue)
    pod: Pod | None = None
    task: asyncio.Task[None] | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    refused: bool = False  # its socket is `RefusedSockets`' now


class EngineServer:
    """Listens from `start` to `close`. Everything runs in one event loop."""

    def __init__(
        self,
        folder: Path,
        authenticator: Authenticator,
        tell: Callable[[Message], Awaitable[None]],
        *,
        agent: str = "",
        limits: Limits | None = None,
    ) -> None:
        """``tell`` hands a message to the session, and may make the caller wait."""
        self.path = folder / SOCKET_NAME
        self._authenticator = authenticator
        self._tell = tell
        self._agent = agent
        self._limits = limits or Limits()
        self._numbers = itertools.count(1)
        self._connections: dict[int, _Connection] = {}
        self._strangers = Strangers[int](
            self._limits.max_strangers, self._limits.max_user_strangers
        )
        self._words = FrameRate(self._limits)
        self._places = PodPlaces(self._limits)
        self._refused = RefusedSockets(self._limits.max_refused, self._limits.refused_seconds)
        self._listener: socket.socket | None = None
        self._acceptor: asyncio.Task[None] | None = None
        self._inode = 0

    async def start(self) -> None:
        """Make the socket, in place of one that a dead agent left. Raises `ServerNotStarted`."""
        beside = self.path.with_suffix(".new")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.parent.chmod(0o755)
            beside.unlink(missing_ok=True)
            # the folder has the node's name, which may be longer than a socket's address
            with sockets.address(beside) as name:
                listener.bind(name)
            # a vLLM that is not root connects too; the token is the authentication
            beside.chmod(0o666)
            listener.listen(BACKLOG)
            self._inode = beside.stat().st_ino
            beside.replace(self.path)  # connecting never finds nothing
        except OSError as error:
            listener.close()
            too_long = error.errno == errno.ENAMETOOLONG
            remedy = "choose a shorter" if too_long else "the agent must own its"
            raise ServerNotStarted(f"{self.path}: {error.strerror}; {remedy} run_folder") from error
        self._listener = listener
        self._acceptor = asyncio.create_task(self._accept(listener), name="engines")

    def trouble(self) -> str:
        """Why no engine can connect any more although it was not closed; empty: they can."""
        over = self._acceptor is not None and self._acceptor.done()
        return f"{self.path} accepts no engines any more" if over else ""

    async def close(self) -> None:
        """End everything; the socket goes if it is still ours."""
        tasks = [c.task for c in self._connections.values() if c.task] + (
            [self._acceptor] if self._acceptor else []
        )
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
        self._refused.close()
        if self._listener is not None:
            self._listener.close()
            with contextlib.suppress(FileNotFoundError):
                if self.path.stat().st_ino == self._inode and stat.S_ISSOCK(
                    self.path.stat().st_mode
                ):
                    self.path.unlink()

    def send(self, number: int, frame: frames.Frame) -> None:
        """Queue a frame; to a process that has gone or takes nothing, it is not sent."""
        connection = self._connections.get(number)
        if connection is not None:
            self._queue(connection, _Outgoing(frame))

    def send_prepare(self, number: int, prepare: frames.Prepare, image: PinnedImage) -> None:
        """Hand a version's memory over; the pin is released when the kernel has its descriptors, or
        nobody wants them. ``prepare`` needs no number of slabs.
        """
        connection = self._connections.get(number)
        if connection is None:
            image.release()
            return
        # the first one tells how many slabs there are, which the table's descriptor is none of
        most = frames.MAX_FDS_PER_FRAME
        fds = image.fds
        pieces = [fds[i : i + most] for i in range(0, len(fds), most)]
        parts: list[frames.Frame] = [replace(prepare, slabs=len(fds) - 1)]
        # the first piece goes with `Prepare`
        parts += [frames.MoreSlabs(prepare.id) for _ in pieces[1:]]
        # the pin goes with the last piece: a frame is sent after those before it
        last = len(pieces) - 1
        for index, (frame, piece) in enumerate(zip(parts, pieces, strict=True)):
            self._queue(connection, _Outgoing(frame, piece, image if index == last else None))

    def close_connection(self, number: int, reason: str, message: str) -> None:
        """End a connection, with a word about why; its `Disconnected` follows."""
        connection = self._connections.get(number)
        if connection is not None:
            log.info(
                "engine connection %d of %s is closed: %s: %s",
                number,
                connection.pod,
                reason,
                message,
            )
            # after what was queued before, so that it is the last thing that the process reads
            self._queue(connection, _Outgoing(frames.Refused(reason, message)))
            connection.queue.put_nowait(None)

    def _queue(self, connection: _Connection, outgoing: _Outgoing) -> None:
        if (
            connection.queue.qsize() < self._limits.max_queued_frames
            and not connection.over.is_set()
        ):
            connection.queue.put_nowait(outgoing)
            return
        if not connection.over.is_set():
            log.warning(
                "engine connection %d of %s takes no frames and is closed",
                connection.number,
                connection.pod,
            )
        connection.over.set()
        if outgoing.pin is not None:
            outgoing.pin.release()

    # -- one connection -------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            waiting: deque[socket.socket] = deque()
            try:
                # all that wait, before any of them is heard: whoever could not even connect because
                # of a crowd finds a place, however fast the crowd comes again
                self._take(listener, waiting)
                if not waiting:
                    await seqpacket.ready(listener, reading=True)
                while waiting:
                    # so few that they leave the table's places to each other until all were heard,
                    # and that others' words do not wait for a crowd
                    for _ in range(min(len(waiting), ADMITTED_AT_ONCE)):
                        self._admit(waiting.popleft())
                    await asyncio.sleep(0)
            except OSError as error:  # out of descriptors, or the client is gone already
                log.warning("%s: accept failed: %s", self.path, error.strerror)
                await asyncio.sleep(0.1)
            finally:
                for sock in waiting:
                    sock.close()

    def _take(self, listener: socket.socket, into: deque[socket.socket]) -> None:
        """Accept who waits, but no more than can wait at a time. Raises `OSError`."""
        for _ in range(BACKLOG):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError:
                if into:  # those first; what is wrong is met again by the next one
                    return
                raise
            sock.setblocking(False)
            into.append(sock)

    def _admit(self, sock: socket.socket) -> None:
        number = next(self._numbers)
        stays, leaves = False, None
        if len(self._connections) < self._limits.max_connections:
            now = asyncio.get_running_loop().time()
            stays, leaves = self._strangers.admit(number, str(sockets.peer_user(sock)), now)
        # without a word: whoever fills the table is not worth a frame each
        if leaves is not None and (task := self._connections[leaves].task) is not None:
            task.cancel()
        if not stays:
            sock.close()
            return
        connection = _Connection(number, sock)
        self._connections[number] = connection
        try:
            hello = self._known_hello(connection)
        except sockets.ConnectionClosed:
            self._end(connection)
            return
        except (_Refusal, frames.WireError) as error:
            self._turn_away(connection, error)
            return
        connection.task = asyncio.create_task(
            self._converse(connection, hello), name=f"engine {number}"
        )
        connection.task.add_done_callback(partial(self._over, connection))

    def _known_hello(self, connection: _Connection) -> frames.Hello | None:
        """The hello that came with the connection, if it did. Raises as `_checked`."""
        frame = seqpacket.receive_now(connection.sock)
        return None if frame is None else self._checked(connection, frame)

    def _checked(self, connection: _Connection, frame: frames.Frame) -> frames.Hello:
        """A first frame whose token is worth a review. Raises `_Refusal`."""
        if not isinstance(frame, frames.Hello):
            raise _Refusal(
                Reason.PROTOCOL_UNSUPPORTED, f"the first frame is a hello, not {frame.op}"
            )
        if not set(frame.protocols) & set(frames.PROTOCOLS):
            text = f"this agent speaks {list(frames.PROTOCOLS)}: restart the pod to get its plugin"
            raise _Refusal(Reason.PROTOCOL_UNSUPPORTED, text)
        pod = self._places.pod_of(frame.token)
        if pod is not None:
            self._look_for_place(pod, frame)
        self._strangers.said_hello(connection.number)
        return frame

    def _look_for_place(self, pod: Pod, hello: frames.Hello) -> None:
        most = self._places.most(hello.world_size)
        if self._places.count(pod) >= most:
            raise _Refusal(
                Reason.TOO_MANY_CONNECTIONS,
                f"pod {pod.namespace}/{pod.name} has {most} connections already",
            )

    async def _converse(self, connection: _Connection, hello: frames.Hello | None) -> None:
        """From the hello on; None: it has not come yet."""
        try:
            hello = hello or await self._hello(connection)
            connection.pod = await self._greet(hello)
            self._places.enter(connection.number, connection.pod, hello.token)
            self._strangers.leave(connection.number)
            # a hello is a word too: connecting again and again is no way round the limit
            await self._words.turn(connection.pod)
        except sockets.ConnectionClosed:
            return
        except (_Refusal, frames.WireError) as error:
            self._turn_away(connection, error)
            return
        protocol = max(set(hello.protocols) & set(frames.PROTOCOLS))
        connection.queue.put_nowait(_Outgoing(frames.Welcome(protocol, self._agent)))
        await self._tell(Connected(connection.number, connection.pod, hello))
        parts = (
            self._read(connection, connection.pod),
            self._write(connection),
            _wait_for(connection.over),
        )
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # closed before it is told: nothing of it can come after that
            self._end(connection)
            await self._tell(Disconnected(connection.number))

    async def _hello(self, connection: _Connection) -> frames.Hello:
        """Wait for it. Raises `_Refusal`, `WireError`."""
        try:
            async with asyncio.timeout(
                self._limits.hello_seconds
            ):  # (`wait_for` may swallow a cancellation before 3.12)
                frame = await seqpacket.receive(connection.sock)
        except TimeoutError as error:
            raise _Refusal(
                Reason.PROTOCOL_UNSUPPORTED, f"no hello within {self._limits.hello_seconds:g} s"
            ) from error
        return self._checked(connection, frame)

    async def _greet(self, hello: frames.Hello) -> Pod:
        """Whose process it is, if it may enter. Raises `_Refusal`."""
        try:
            pod = await self._authenticator.authenticate(hello.token)
        except Unauthenticated as error:
            raise _Refusal(error.reason, str(error)) from error
        except AuthenticationUnavailable as error:
            raise _Refusal(Reason.BUSY, f"{error}; connect again") from error
        self._look_for_place(pod, hello)
        return pod

    def _turn_away(self, connection: _Connection, error: Exception) -> None:
        """Say why it may not enter, and hold it if it is still there."""
        reason = getattr(error, "reason", Reason.PROTOCOL_UNSUPPORTED)
        connection.refused = self._refuse(connection, reason, str(error))
        self._end(connection)
        if connection.refused:
            self._refused.hold(connection.sock)

    def _refuse(self, connection: _Connection, reason: str, message: str) -> bool:
        """Whether it could be told."""
        log.warning("an engine connection is refused: %s: %s", reason, message)
        try:
            # cut, so that it fits into a frame whatever was in the way
            sockets.send(connection.sock, frames.Refused(reason, message[:1024]))
        except (OSError, frames.WireError):
            return False
        return True

    async def _read(self, connection: _Connection, pod: Pod) -> None:
        """Hand frames on until the connection ends, or says what is no frame."""
        while True:
            await self._words.turn(pod)
            try:
                frame = await seqpacket.receive(connection.sock)
            except sockets.ConnectionClosed:
                return
            except frames.WireError as error:
                self._refuse(connection, Reason.PROTOCOL_UNSUPPORTED, str(error))
                return
            if isinstance(frame, frames.Ping):
                self.send(connection.number, frames.Pong(frame.id))
            else:
                await self._tell(FrameReceived(connection.number, frame))

    async def _write(self, connection: _Connection) -> None:
        """Send what is queued, until None or until the other side takes nothing more."""
        while (outgoing := await connection.queue.get()) is not None:
            try:
                async with asyncio.timeout(self._limits.send_seconds):
                    await seqpacket.send(connection.sock, outgoing.frame, outgoing.fds)
            except (OSError, frames.WireError, TimeoutError) as error:
                log.warning("engine connection %d of %s: a %s was not taken: %s",
                            connection.number, connection.pod, outgoing.frame.op, error or "too slow")  # fmt: skip
                return
            finally:
                if outgoing.pin is not None:
                    outgoing.pin.release()

    def _over(self, connection: _Connection, _: asyncio.Task[None]) -> None:
        self._end(connection)  # of one that was cancelled before it began, too

    def _end(self, connection: _Connection) -> None:
        self._connections.pop(connection.number, None)
        self._strangers.leave(connection.number)
        self._places.leave(connection.number)
        if not connection.refused:
            connection.sock.close()
        while not connection.queue.empty():
            left = connection.queue.get_nowait()
            if left is not None and left.pin is not None:
                left.pin.release()


async def _wait_for(event: asyncio.Event) -> None:
    await event.wait()
