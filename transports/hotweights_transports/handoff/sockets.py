"""Frames over a ``SOCK_SEQPACKET`` socket, with file descriptors beside them.

Like `frames` it runs inside vLLM, so it imports the standard library alone. Descriptors that came
with a frame that is refused are closed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from hotweights_transports.handoff import frames

MAX_PATH_BYTES = 107  # of a unix socket: sun_path has 108, one of them for the end (unix(7))


class ConnectionClosed(frames.WireError):
    """The other side has closed its end, or its process is gone."""


class DescriptorsLost(frames.WireError):
    """``frame`` came whole, and not all of the descriptors beside it: the kernel closes those that
    a process has no number left for (unix(7)).
    """

    def __init__(self, frame: frames.Frame) -> None:
        super().__init__(
            f"descriptors beside {frame.op} were lost, because this process may open no more files: "
            "raise its limit (ulimit -n, RLIMIT_NOFILE)"
        )
        self.frame = frame


@contextlib.contextmanager
def address(path: str | os.PathLike[str]) -> Iterator[str]:
    """What to bind or connect to for the unix socket at ``path``, whose folder exists: the path
    itself, or, where no socket's address has room for it, the same file by way of a descriptor of
    its folder. A node's name alone may have 253 bytes. Raises `OSError`.
    """
    if len(os.fsencode(path)) <= MAX_PATH_BYTES:
        yield os.fspath(path)
        return
    folder, name = os.path.split(path)
    descriptor = os.open(folder, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        short = f"/proc/self/fd/{descriptor}/{name}"  # proc_pid_fd(5)
        if len(os.fsencode(short)) > MAX_PATH_BYTES or not Path(short).parent.exists():
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), os.fspath(path))
        yield short
    finally:
        os.close(descriptor)


def connect(sock: socket.socket, path: str | os.PathLike[str], seconds: float) -> None:
    """Connect to the unix socket at ``path``, however long that is, and wait in line where many
    others do: a socket with a time-out of Python's own would fail at once (EAGAIN) when the
    listener's backlog is full. Raises `OSError`; without a place within ``seconds``,
    `BlockingIOError`. The socket blocks afterwards.
    """
    sock.settimeout(None)
    # of what waits in the kernel: SO_SNDTIMEO (socket(7)), which connect(2) of unix sockets heeds
    whole, part = divmod(seconds, 1.0)
    timeval = struct.pack("@ll", int(whole), int(part * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    with address(path) as name:
        sock.connect(name)
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
    `ConnectionClosed`, `DescriptorsLost`, `WireError` and `OSError`. After any `WireError` but the
    first the socket may be used again: a frame is a datagram, so the next one begins where it
    should.
    """
    data, fds, flags, _ = socket.recv_fds(
        sock, frames.MAX_FRAME_BYTES, frames.MAX_FDS_PER_FRAME, socket.MSG_CMSG_CLOEXEC
    )
    try:
        if not data:
            raise ConnectionClosed("the other side closed the connection")
        if flags & socket.MSG_CTRUNC and len(fds) < frames.MAX_FDS_PER_FRAME:
            raise DescriptorsLost(frames.decode(data))
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
