"""Connecting where many others do."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotweights_transports.handoff import sockets


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
