"""Frames over a ``SOCK_SEQPACKET`` socket, with file descriptors beside them.

Like `frames` it runs inside vLLM, so it imports the standard library alone. Descriptors that came
with a frame that is refused are closed.
"""

from __future__ import annotations

import os
import socket
import struct

from hotweights_transports.handoff import frames


class ConnectionClosed(frames.WireError):
    """The other side has closed its end, or its process is gone."""


def connect(sock: socket.socket, path: str, seconds: float) -> None:
    """Connect, and wait in line where many others do: a socket with a time-out of Python's own
    would fail at once (EAGAIN) when the listener's backlog is full. Raises `OSError`; without a
    place within ``seconds``, `BlockingIOError`. The socket blocks afterwards.
    """
    sock.settimeout(None)
    # of what waits in the kernel: SO_SNDTIMEO (socket(7)), which connect(2) of unix sockets heeds
    whole, part = divmod(seconds, 1.0)
    timeval = struct.pack("@ll", int(whole), int(part * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    sock.connect(path)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 0, 0))


def send(sock: socket.socket, frame: frames.Frame, fds: tuple[int, ...] = ()) -> None:
    """Send one frame, with file descriptors beside it (SCM_RIGHTS, unix(7)); the caller keeps (and
    closes) its own copies. Raises `WireError` for a frame that is too large, and `OSError`.
    """
    socket.send_fds(sock, [frames.encode(frame)], list(fds)) if fds else sock.send(
        frames.encode(frame)
    )


def recv(sock: socket.socket) -> tuple[frames.Frame, list[int]]:
    """Receive one frame and the descriptors beside it, which the caller owns. Raises
    `ConnectionClosed`, `WireError` and `OSError`. After any other `WireError` the socket may be
    used again: a frame is a datagram, so the next one begins where it should.
    """
    data, fds, flags, _ = socket.recv_fds(
        sock, frames.MAX_FRAME_BYTES, frames.MAX_FDS_PER_FRAME, socket.MSG_CMSG_CLOEXEC
    )
    try:
        if not data:
            raise ConnectionClosed("the other side closed the connection")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise frames.WireError(
                f"a frame larger than {frames.MAX_FRAME_BYTES} bytes or "
                f"{frames.MAX_FDS_PER_FRAME} descriptors"
            )
        return frames.decode(data), list(fds)
    except frames.WireError:
        for fd in fds:
            os.close(fd)
        raise


def peer_user(sock: socket.socket) -> int:
    """The user whose process is at the other end, as the kernel says: pid, uid and gid are what
    SO_PEERCRED holds (unix(7)). Raises `OSError`.
    """
    layout = struct.Struct("3i")
    _, uid, _ = layout.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size))
    return int(uid)
