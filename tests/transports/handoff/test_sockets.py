"""Unix sockets: addresses, which have room for 107 bytes, crowds, and descriptors that get lost."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotweights_transports.handoff import frames, sockets


def open_paths() -> Iterator[Path]:
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # another thread's, closed meanwhile
            yield link.readlink()


@pytest.mark.parametrize("name", ["node-a", "n" * 253])
def test_any_path_can_be_bound_and_met(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "agent.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        with sockets.address(path) as short:
            listener.bind(short)
        listener.listen()
        assert path.is_socket()
        sockets.connect(other, path, 30.0)
        # what stands for the folder is closed again
        assert path.parent not in open_paths()


def test_a_name_that_has_no_room_by_any_way_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File name too long"), sockets.address(tmp_path / ("n" * 99)):
        pass


def test_descriptors_that_the_limit_loses_are_told_as_such() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        sockets.send(ours, frames.Prepare(1, "sha256:x", 9), (ours.fileno(),) * 10)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with Path("/dev/null").open() as lowest:
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno() + 3, hard))
            try:
                with pytest.raises(sockets.DescriptorsLost, match=r"RLIMIT_NOFILE") as lost:
                    sockets.recv(theirs)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert lost.value.frame == frames.Prepare(1, "sha256:x", 9)
        # the next frame begins where it should
        sockets.send(ours, frames.Ping(2), (ours.fileno(),))
        frame, (descriptor,) = sockets.recv(theirs)
        os.close(descriptor)
        assert frame == frames.Ping(2)


@pytest.fixture
def crowded() -> Iterator[tuple[socket.socket, str]]:
    """A listener at which nobody can connect any more, and its path."""
    with tempfile.TemporaryDirectory(prefix="hw") as folder, contextlib.ExitStack() as stack:
        path = str(Path(folder) / "sock")
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(path)
        listener.listen(2)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                sock.settimeout(5.0)
                sock.connect(path)
        yield listener, path


def test_who_connects_in_a_crowd_waits_for_a_place(crowded: tuple[socket.socket, str]) -> None:
    listener, path = crowded
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        connecting = threading.Thread(target=sockets.connect, args=(sock, path, 30.0))
        connecting.start()
        accepted: list[socket.socket] = []
        listener.setblocking(False)
        while connecting.is_alive():
            with contextlib.suppress(BlockingIOError):
                accepted.append(listener.accept()[0])
            connecting.join(0.01)
        sock.send(b"x")
        for peer in accepted:
            peer.close()
        wait = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16)
        assert wait == bytes(16), "what it sends later is no business of this"


def test_it_does_not_wait_for_ever(crowded: tuple[socket.socket, str]) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock,
        pytest.raises(BlockingIOError),
    ):
        sockets.connect(sock, crowded[1], 0.05)
