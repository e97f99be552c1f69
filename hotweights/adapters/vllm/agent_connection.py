"""The connection of one process of the engine to its node's agent: made outwards, made again when
it breaks.

An agent that is away harms nobody: requests are served, a commit that has begun ends by itself, and
this thread tries again with growing pauses. What is answered goes over the connection that asked;
an answer to a connection that has gone is dropped, because the agent learns the state from the next
`hello`. Frames are handled one by one on this thread, so a handler that takes long hands its work
on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hotweights_transports.handoff import frames, sockets

logger = logging.getLogger("vllm.hotweights.agent_connection")
FIRST_RETRY_SECONDS = 0.1  # an agent that restarts is back within moments
LAST_RETRY_SECONDS = 5.0  # what an engine loses at most, once an agent that was away long is back
# for connecting and for the answer; the agent gives a hello as long (`Limits.hello_seconds`)
HELLO_SECONDS = 10.0
# of our own: the process's is seeded by others, who expect to be alone with it
_jitter = random.Random()


class Connection:
    """One life of the socket. `send` may be called from any thread and never raises: the connection
    is simply gone then. `close` is for the thread that receives.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self.open = True

    def send(self, frame: frames.Frame) -> bool:
        """Whether the kernel took it; that the agent reads it is another matter."""
        with self._lock:
            if not self.open:
                return False
            try:
                sockets.send(self._sock, frame)
            except frames.WireError:
                # the connection is as good as before: nothing of the frame went out
                logger.exception("A frame to the agent is too large and was dropped: %s", frame.op)
                return False
            except OSError as error:
                logger.info("Could not send %s to the agent: %s", frame.op, error)
                self.open = False
                return False
        return True

    def close(self) -> None:
        """Close the socket. Under the lock, so that nobody sends on a number that is another's."""
        with self._lock:
            self.open = False
            self._sock.close()

    def hang_up(self) -> None:
        """From another thread than the one that receives: it wakes (shutdown(2); close(2) would
        not wake it) and closes the socket.
        """
        with self._lock, contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


class AgentLink(threading.Thread):
    """Connects, says hello, hands frames to ``handle`` until the end of the process, or `stop`.

    ``hello`` is called for every connection, so that the agent always learns the state of now.
    ``handle`` owns the descriptors; ``lost`` gets a frame whose descriptors never arrived, and why.
    All of them are called on this thread.
    """

    def __init__(
        self,
        path: str,
        hello: Callable[[], frames.Hello],
        handle: Callable[[Connection, frames.Frame, list[int]], None],
        *,
        lost: Callable[[Connection, frames.Frame, str], None] = lambda *_: None,
        closed: Callable[[Connection], None] = lambda connection: None,
    ) -> None:
        super().__init__(name="hotweights-link", daemon=True)
        self._path = path
        self._hello = hello
        self._on_frame = handle
        self._lost = lost
        self._closed = closed
        self._told = False
        self._ended = threading.Event()
        self.connection: Connection | None = None

    def stop(self) -> None:
        """End the connection and the thread; the process goes on. From any other thread."""
        self._ended.set()
        connection = self.connection
        if connection is not None:
            connection.hang_up()

    def run(self) -> None:
        """The thread: one connection after the other, until `stop`."""
        delay = FIRST_RETRY_SECONDS
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                self._serve()
            except (OSError, frames.WireError) as error:
                self._say(error)
            if time.monotonic() - began > LAST_RETRY_SECONDS:
                delay = FIRST_RETRY_SECONDS  # it was a connection, not an attempt
            self._ended.wait(delay * _jitter.uniform(0.5, 1.0))  # not all engines of a node at once
            delay = min(delay * 2, LAST_RETRY_SECONDS)

    def _serve(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sockets.connect(sock, self._path, HELLO_SECONDS)
            sock.settimeout(HELLO_SECONDS)
            sockets.send(sock, self._hello())
            answer, fds = sockets.recv(sock)
            close_all(fds)
            if isinstance(answer, frames.Refused):
                raise frames.WireError(f"the agent refused: {answer.reason}: {answer.message}")
            if not isinstance(answer, frames.Welcome):
                raise frames.WireError(f"the agent answered the hello with {answer.op}")
            sock.settimeout(None)  # from here on an agent may be silent for as long as it likes
            connection = self.connection = Connection(sock)
            # `stop` came before there was a connection to hang up
            if self._ended.is_set():
                return
            logger.info("Connected to the agent at %s", self._path)
            self._told = False
            try:
                self._receive(sock, connection)
            finally:
                # first nobody new sends, then nobody can, then what was half said is dropped
                self.connection = None
                connection.close()
                self._closed(connection)

    def _receive(self, sock: socket.socket, connection: Connection) -> None:
        while True:
            try:
                frame, fds = sockets.recv(sock)
            except sockets.ConnectionClosed:  # a `WireError` too, but no frame to skip
                raise
            except sockets.DescriptorsLost as error:
                logger.warning("%s", error)
                self._lost(connection, error.frame, str(error))
                continue
            # from a newer agent: what we do not know, we do not do
            except frames.WireError as error:
                logger.warning("The agent sent what this plugin does not understand: %s", error)
                continue
            if isinstance(frame, frames.Ping):  # here: whoever handles may be busy for seconds
                close_all(fds)
                connection.send(frames.Pong(id=frame.id))
            else:
                self._on_frame(connection, frame, fds)

    def _say(self, error: Exception) -> None:
        """Once per outage: an agent that is away for an hour is one line, not thousands."""
        if not self._told:
            self._told = True
            logger.warning("No agent at %s (%s); serving goes on, trying again", self._path, error)


def read_token(path: str | None) -> str:
    """The projected token as it is now (the kubelet renews it in place); empty when there is none,
    and the agent decides.
    """
    if not path:
        return ""
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        logger.warning("Cannot read the token at %s: %s", path, error)
        return ""


def close_all(fds: list[int]) -> None:
    """Close the descriptors of a frame that nobody wants, or that was dealt with."""
    for fd in fds:
        os.close(fd)
