"""A one-way road for chunks between two processes: a UCX worker of its own at each end, and one
endpoint between the two.

Whoever waits here drives UCX in its own thread: it progresses the worker while there is something
to do and else sleeps in `poll`, for UCX's event or for the hanging up of the socket beside it,
which tells of a dead peer before UCX does. So nothing polls while a connection is idle, no thread
waits for another, and every wait ends by a tick, like those of a plain socket.

Messages come in the order in which they were sent, and both ends know how large each is. What they
mean, it does not know.
"""

from __future__ import annotations

import logging
import select
import time
from typing import Any, Final

from hotweights_transports.peers.stream.timed_socket import TICK_SECONDS, ConnectionBroken, Tick
from hotweights_transports.peers.ucx.library import load

logger = logging.getLogger(__name__)

SETTLE_SECONDS: Final = 0.3  # for each step of `close`, so that it ends within some seconds
HOLD_SECONDS: Final = 3.0
"""For the other side to let go of a message, or to hang up, both of which it may do late. An
endpoint that is closed while it holds one leaks its worker, with nine descriptors (ucxx 0.52).
"""
HUNG_UP: Final = select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL

_abandoned: list[Channel] = []
"""Closed while UCX still owned their memory, because the other side neither goes on nor goes away:
they stay until the end.
"""


class Channel:
    """One end, on either side. Used by one thread at a time, which also closes it. After an error
    it can only be closed: UCX may still own the memory of a message.
    """

    def __init__(self, socket_fd: int, tag: int) -> None:
        """`tag` marks the messages of this pair of ends; `socket_fd` is of the connection whose end
        is the channel's end.
        """
        self._library = load()
        self._tag = self._library.tag(tag)
        self._socket_fd = socket_fd
        self._context, self._worker = self._library.open()
        self._endpoint: Any = None
        self._request: Any = None
        self._memory: Any = None  # of the request
        self._poll = select.poll()
        self._poll.register(self._worker.epoll_file_descriptor, select.POLLIN)
        self._poll.register(socket_fd, select.POLLRDHUP)

    @property
    def address(self) -> bytes:
        """Where the other end finds this one."""
        return bytes(self._worker.address.tobytes())

    def connect(self, address: bytes) -> None:
        """Raises `ConnectionBroken` where UCX sees no way there."""
        try:
            remote = self._library.api.UCXAddress.create_from_buffer(address)
            self._endpoint = self._library.api.UCXEndpoint.create_from_worker_address(
                self._worker, remote, True
            )
        except self._library.error as error:
            raise ConnectionBroken(
                f"UCX sees no way to the other side ({error}): see UCX_NET_DEVICES on both"
            ) from error

    def send(self, message: memoryview, tick: Tick) -> None:
        """`message` may change as soon as this returns; not one byte of it is referenced
        afterwards. Raises `ConnectionBroken`, and what `tick` raises; then `close` must follow
        before it may change.
        """
        self._memory = self._library.array(message)
        self._submit(self._endpoint.tag_send)
        self._complete(len(message), tick)

    def receive_into(self, message: memoryview, tick: Tick) -> None:
        """A message of exactly that size. Nothing of it is written afterwards, also when this
        raises and `close` follows.
        """
        self._memory = self._library.array(message)
        self._submit(self._endpoint.tag_recv)
        self._complete(len(message), tick)

    def _submit(self, operation: Any) -> None:
        try:
            self._request = operation(self._memory, self._tag)
        except self._library.error as error:
            raise ConnectionBroken(_why(error)) from error

    def _complete(self, nbytes: int, tick: Tick) -> None:
        try:
            while not self._request.completed:
                # UCX sleeps only when armed, and arms only when there is nothing left to do
                if not self._worker.progress_once() and self._worker.arm():
                    self._wait(tick)
            self._request.check_error()
        except self._library.error as error:
            raise ConnectionBroken(_why(error)) from error
        self._request = self._memory = None
        tick(nbytes)

    def _wait(self, tick: Tick) -> None:
        """For UCX to have something to do."""
        events = self._poll.poll(TICK_SECONDS * 1000)  # in milliseconds
        if any(fd == self._socket_fd and event & HUNG_UP for fd, event in events):
            while self._worker.progress_once():  # what came before the end counts
                pass
            if not self._request.completed:
                raise ConnectionBroken("the other side closed the connection")
        tick(0)

    def close(self) -> None:
        """In bounded time. The socket must have been hung up, so that the other end lets go as
        well.
        """
        if self._worker is None:
            return
        self._settle(HOLD_SECONDS)
        if self._endpoint is not None:
            # periods are in nanoseconds
            self._endpoint.close_blocking(period=int(SETTLE_SECONDS * 1e9), max_attempts=1)
            self._endpoint.remove_close_callback()
            self._settle()
            self._worker.cancel_inflight_requests(period=int(SETTLE_SECONDS * 1e9), max_attempts=1)
        if self._request is not None and not self._request.completed:
            logger.warning(
                "the other side holds on to a UCX channel that was closed: its memory is not freed"
            )
            _abandoned.append(self)
            return
        self._request = self._memory = self._endpoint = None
        self._worker = self._context = None

    def _settle(self, seconds: float = SETTLE_SECONDS) -> None:
        """Until UCX has done with the request, at most so long: it may own the request's memory, or
        the peer may.
        """
        deadline = time.monotonic() + seconds
        while (
            self._request is not None
            and not self._request.completed
            and time.monotonic() < deadline
        ):
            self._worker.progress()
            if not self._request.completed:
                time.sleep(0.002)


def _why(error: Exception) -> str:
    return f"UCX: {error}".lower().replace("ucx:", "UCX:", 1)
