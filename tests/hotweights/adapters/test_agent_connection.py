"""The connection to the agent: made, made again, and harmless when it is not there."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotweights.adapters.vllm import agent_connection
from hotweights_transports.handoff import frames, sockets

SECONDS = 30.0


class Listener:
    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with sockets.address(path) as name:
            self.sock.bind(name)
        self.sock.listen()
        self.sock.settimeout(SECONDS)

    def welcome(self) -> tuple[socket.socket, frames.Frame]:
        peer, _ = self.sock.accept()
        peer.settimeout(SECONDS)
        hello, _ = sockets.recv(peer)
        sockets.send(peer, frames.Welcome())
        return peer, hello


class Engine:
    """A link with what it heard."""

    links: ClassVar[list[agent_connection.AgentLink]] = []

    def __init__(self, path: Path) -> None:
        self.heard: list[tuple[frames.Frame, int]] = []
        self.lost: list[tuple[frames.Frame, str]] = []
        self.closed = threading.Event()
        self.state = "Booting"
        self.link = agent_connection.AgentLink(
            str(path),
            lambda: frames.Hello(role="rank", state=self.state),
            self.handle,
            lost=lambda _, frame, why: self.lost.append((frame, why)),
            closed=lambda _: self.closed.set(),
        )
        self.links.append(self.link)
        self.link.start()

    def handle(
        self, connection: agent_connection.Connection, frame: frames.Frame, fds: list[int]
    ) -> None:
        self.heard.append((frame, len(fds)))
        for fd in fds:
            os.close(fd)
        connection.send(frames.Released(id=getattr(frame, "id", 0)))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_connection, "FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(agent_connection, "LAST_RETRY_SECONDS", 0.02)


@pytest.fixture(autouse=True)
def _no_link_goes_on() -> Iterator[None]:
    """One that did would open a socket every few seconds, and its number might be that of a
    descriptor that a later test of this process has closed.
    """
    yield
    while Engine.links:
        link = Engine.links.pop()
        link.stop()
        link.join(SECONDS)
        assert not link.is_alive()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    made = Listener(tmp_path / "agent.sock")
    yield made
    made.sock.close()


def test_frames_and_descriptors_reach_the_handler(listener: Listener) -> None:
    engine = Engine(listener.path)
    peer, hello = listener.welcome()
    sockets.send(peer, frames.Prepare(7, "d", 1), (0, 1))
    answer, _ = sockets.recv(peer)
    assert isinstance(hello, frames.Hello)
    assert (hello.role, answer) == ("rank", frames.Released(id=7))
    assert engine.heard == [(frames.Prepare(7, "d", 1), 2)]
    peer.close()


def test_who_handles_learns_of_descriptors_that_were_lost(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(listener.path)
    peer, _ = listener.welcome()
    receive = sockets.recv

    def lose(sock: socket.socket) -> tuple[frames.Frame, list[int]]:
        frame, fds = receive(sock)
        if fds:
            agent_connection.close_all(fds)
            raise sockets.DescriptorsLost(frame)
        return frame, fds

    monkeypatch.setattr(sockets, "recv", lose)
    sockets.send(peer, frames.Prepare(6, "d", 0), (0,))
    sockets.send(peer, frames.Prepare(7, "d", 0), (0,))
    sockets.send(peer, frames.Ping(id=8))
    while receive(peer)[0] != frames.Pong(id=8):
        pass
    frame, why = engine.lost[-1]  # the first may have been received before they got lost
    assert frame == frames.Prepare(7, "d", 0)
    assert "RLIMIT_NOFILE" in why
    peer.close()


def test_pings_are_answered_without_the_handler(listener: Listener) -> None:
    engine = Engine(listener.path)
    peer, _ = listener.welcome()
    sockets.send(peer, frames.Ping(id=3))
    assert sockets.recv(peer)[0] == frames.Pong(id=3)
    assert engine.heard == []
    peer.close()


def test_it_comes_back_with_the_state_of_now(listener: Listener) -> None:
    engine = Engine(listener.path)
    peer, first = listener.welcome()
    engine.state = "Serving"
    peer.close()
    peer, second = listener.welcome()
    assert isinstance(first, frames.Hello)
    assert isinstance(second, frames.Hello)
    assert (first.state, second.state) == ("Booting", "Serving")
    assert engine.closed.is_set()
    peer.close()


def test_it_waits_for_an_agent_that_comes_later(tmp_path: Path) -> None:
    Engine(tmp_path / "agent.sock")
    listener = Listener(tmp_path / "agent.sock")
    peer, _ = listener.welcome()
    peer.close()
    listener.sock.close()


def test_an_agent_is_found_however_long_the_name_of_its_node_is(tmp_path: Path) -> None:
    folder = tmp_path / ("n" * 253)
    folder.mkdir()
    listener = Listener(folder / "agent.sock")
    Engine(listener.path)
    peer, _ = listener.welcome()
    peer.close()
    listener.sock.close()


def test_a_refusal_is_tried_again(listener: Listener) -> None:
    Engine(listener.path)
    peer, _ = listener.sock.accept()
    sockets.recv(peer)
    sockets.send(peer, frames.Refused("TokenInvalid", "expired"))
    peer.close()
    peer, _ = listener.welcome()
    peer.close()


def test_an_unknown_frame_of_a_newer_agent_breaks_nothing(listener: Listener) -> None:
    Engine(listener.path)
    peer, _ = listener.welcome()
    peer.send(b'{"op":"teleport"}')
    sockets.send(peer, frames.Ping(id=1))
    assert sockets.recv(peer)[0] == frames.Pong(id=1)
    peer.close()


def test_sending_to_a_connection_that_has_gone_says_so() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection = agent_connection.Connection(one)
    other.close()
    assert not connection.send(frames.Pong())
    assert not connection.open
    connection.close()


def test_a_token_is_read_anew_and_may_be_absent(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("abc\n")
    assert agent_connection.read_token(str(tmp_path / "token")) == "abc"
    assert agent_connection.read_token(str(tmp_path / "nowhere")) == ""
    assert agent_connection.read_token("") == ""


FRAMES = st.sampled_from(
    [
        frames.Hello,
        frames.Prepare,
        frames.Commit,
        frames.Committed,
        frames.State,
        frames.Keep,
        frames.Ping,
    ]
)


@given(FRAMES, st.integers(0, frames.MAX_NUMBER), st.text(max_size=20))
def test_frames_survive_the_wire(kind: type[frames.Frame], number: int, text: str) -> None:
    values = {"id": number, "digest": text, "commit_token": number, "state": text, "token": text}
    frame = kind(
        **{key: value for key, value in values.items() if key in kind.__dataclass_fields__}
    )
    assert frames.decode(frames.encode(frame)) == frame


@given(
    st.binary(max_size=200)
    | st.text(max_size=50).map(lambda text: f'{{"op":"commit","digest":{text!r}}}'.encode())
)
def test_no_datagram_is_worse_than_a_wire_error(data: bytes) -> None:
    try:
        frame = frames.decode(data)
    except frames.WireError:
        return
    assert isinstance(frame, frames.Frame)
