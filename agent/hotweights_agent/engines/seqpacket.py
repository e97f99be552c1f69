"""Frames over a unix ``SOCK_SEQPACKET`` socket in an event loop, which asyncio's streams do not
know.

One datagram is one frame, and descriptors travel beside it; so there is nothing to buffer and
nothing to split.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket

from hotweights_transports.handoff import frames, sockets

# no event tells when the kernel has room for descriptors again, so it is tried now and then
CROWDED_SECONDS = 0.05


async def receive(sock: socket.socket) -> frames.Frame:
    """The next frame. Descriptors beside it are closed: engines hand nothing over. Raises
    `WireError`, `ConnectionClosed`.
    """
    while (frame := receive_now(sock)) is None:
        await ready(sock, reading=True)
    return frame


def receive_now(sock: socket.socket) -> frames.Frame | None:
    """As `receive`, of what has come already; None: nothing has."""
    try:
        frame, fds = sockets.recv(sock)
    except BlockingIOError:
        return None
    except OSError as error:
        raise sockets.ConnectionClosed(f"the connection broke: {error.strerror}") from error
    for fd in fds:
        os.close(fd)
    return frame


async def send(sock: socket.socket, frame: frames.Frame, fds: tuple[int, ...] = ()) -> None:
    """Send one frame, as soon as the other side takes it. Raises `OSError`, `WireError`."""
    while True:
        try:
            sockets.send(sock, frame, fds)
            return
        except BlockingIOError:
            await ready(sock, reading=False)
        except OSError as error:
            if error.errno not in (errno.ETOOMANYREFS, errno.ENOBUFS):
                raise
            # too many descriptors are on their way (unix(7)); the other side is taking them
            await asyncio.sleep(CROWDED_SECONDS)


async def ready(sock: socket.socket, *, reading: bool) -> None:
    """Wait until the socket can be read (one that listens: somebody waits) or written."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    add, remove = (
        (loop.add_reader, loop.remove_reader) if reading else (loop.add_writer, loop.remove_writer)
    )
    add(sock.fileno(), _set, ready)
    try:
        await ready
    finally:
        remove(sock.fileno())


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
