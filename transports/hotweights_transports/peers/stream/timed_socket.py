"""A connected socket on which every operation ends: by being done, by a deadline, or by the other
side's going.

The socket stays blocking and the kernel keeps a short timeout (`SO_RCVTIMEO`, `SO_SNDTIMEO`), so
that `MSG_WAITALL` and `sendfile` work on large pieces in one system call, without a poll before
each. At every piece and every tick the caller's `Tick` decides whether to go on: it raises when
not. This module knows no frame.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Final

TICK_SECONDS: Final = 0.2  # how late a deadline, a cancel or a close may be noticed
PIECE_NBYTES: Final = 1024 * 1024  # by which memory grows for what was only announced

Tick = Callable[[int], None]
"""Called with the bytes that moved since the last call (0: a tick without any); raises to give
up.
"""


class ConnectionBroken(Exception):
    """The other side closed the connection, or the network did."""


class DeadlinePassed(Exception):
    """What was to be done took longer than it may."""


class Unusable(Exception):
    """The two sides speak, but what is to carry the chunks cannot be set up between them; the
    message says why.
    """


def within(seconds: float) -> Tick:
    """A tick that raises `DeadlinePassed` once so many seconds have passed, however many bytes
    dripped in meanwhile.
    """
    deadline = time.monotonic() + seconds

    def tick(_nbytes: int) -> None:
        if time.monotonic() > deadline:
            raise DeadlinePassed(f"not done within {seconds:g} s")

    return tick


class Wire:
    """A connection, on either side. One thread sends and one receives at a time (they may be two);
    `hang_up` is for any thread. After an error only `say_last`, `hang_up` and `close` may be
    called, for it is not known how much has gone or come; unless a deadline passed before the
    first byte of what was to be received.
    """

    def __init__(self, sock: socket.socket) -> None:
        # a struct timeval, as SO_RCVTIMEO wants it (socket(7)); Python's own time-outs would make
        # the socket non-blocking
        seconds = int(TICK_SECONDS)
        timeout = struct.pack("@ll", seconds, int((TICK_SECONDS - seconds) * 1e6))
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        # requests are small and must not wait for an acknowledgement; what belongs together is
        # held back by MSG_MORE
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def prepare_to_pull(self, tick: Tick) -> None:
        """Once the server has said welcome; raises `Unusable`. On a socket there is nothing to
        prepare.
        """

    def prepare_to_serve(self, piece_nbytes: int | None, tick: Tick) -> None:
        """The same on the other side. `piece_nbytes`: chunks will be sent in pieces of that size,
        None: whole.
        """

    def send(self, data: bytes | memoryview, tick: Tick, *, more: bool = False) -> None:
        """All of `data`. `more`: further bytes follow at once, do not send a packet for these alone
        (MSG_MORE, send(2)). Raises `ConnectionBroken`, and what `tick` raises, as all below.
        """
        flags = socket.MSG_MORE if more else 0
        sent = 0
        while sent < len(data):
            try:
                with memoryview(data)[sent:] as rest:
                    nbytes = self._sock.send(rest, flags)
            except BlockingIOError:
                nbytes = 0
            except OSError as error:
                raise ConnectionBroken(_why(error)) from error
            sent += nbytes
            tick(nbytes)

    def send_file(self, fd: int, offset: int, nbytes: int, tick: Tick) -> None:
        """`nbytes` of a file from `offset`, straight into the socket (sendfile(2)): the pages are
        referenced, not copied.
        """
        end = offset + nbytes
        while offset < end:
            try:
                sent = os.sendfile(self._sock.fileno(), fd, offset, end - offset)
            except BlockingIOError:
                tick(0)
                continue
            except OSError as error:
                raise ConnectionBroken(_why(error)) from error
            if sent == 0:
                raise ConnectionBroken(f"the file ended at byte {offset}, before {end}")
            offset += sent
            tick(sent)

    def send_copy(self, fd: int, offset: int, nbytes: int, tick: Tick) -> None:
        """As `send_file`, but nothing of the file is held by the socket afterwards. The kernel
        copies out of a mapping.
        """
        if nbytes == 0:
            return  # nothing cannot be mapped
        begin = offset - offset % mmap.ALLOCATIONGRANULARITY  # a mapping begins on a page
        with (
            mmap.mmap(
                fd,
                offset - begin + nbytes,
                flags=mmap.MAP_SHARED,
                prot=mmap.PROT_READ,
                offset=begin,
            ) as mapped,
            memoryview(mapped)[offset - begin :] as view,
        ):
            self.send(view, tick)

    def receive_into(self, view: memoryview, tick: Tick) -> None:
        """All of `view`. Nothing of it is referenced afterwards, also when this raises."""
        received = 0
        while received < len(view):
            with view[received:] as rest:
                try:
                    nbytes = self._sock.recv_into(rest, 0, socket.MSG_WAITALL)
                except BlockingIOError:
                    tick(0)
                    continue
                except OSError as error:
                    raise ConnectionBroken(_why(error)) from error
            if nbytes == 0:
                raise ConnectionBroken("the other side closed the connection")
            received += nbytes
            tick(nbytes)

    def receive_chunk(self, view: memoryview, tick: Tick) -> None:
        """What `send_file` or `send_copy` sent: as `receive_into`, unless chunks come another
        way.
        """
        self.receive_into(view, tick)

    def receive(self, nbytes: int, tick: Tick) -> bytearray:
        """`nbytes`, in memory that grows with what arrives, not with what was announced."""
        data = bytearray()
        while len(data) < nbytes:
            piece = bytearray(min(PIECE_NBYTES, nbytes - len(data)))
            with memoryview(piece) as view:
                self.receive_into(view, tick)
            data += piece
        return data

    def is_quiet(self) -> bool:
        """Connected, and nothing to read: what a connection between two requests must be."""
        try:
            self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def say_last(self, data: bytes) -> None:
        """Send `data` and see it off: closing with unread input would reset the connection and lose
        it (RFC 2525, section 2.17). Raises nothing.
        """
        with contextlib.suppress(ConnectionBroken, DeadlinePassed, OSError):
            self.send(data, within(TICK_SECONDS))
            self._sock.shutdown(socket.SHUT_WR)
            # until the other side closes; more than the largest hello need not be read
            self.receive(64 * 1024, within(TICK_SECONDS * 2))

    def hang_up(self) -> None:
        """Wake whoever is blocked in this socket, in any thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up()
        self._sock.close()


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
