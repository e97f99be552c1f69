"""Two sides that have the same secret hear each other; whoever has not hears and says nothing."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotweights_transports.broadcast.channel import (
    MAX_MESSAGE_NBYTES,
    Channel,
    Message,
    check_reach,
)
from hotweights_transports.peers.base import PeerError, PeerRefused, PeerTimeout, PeerUnreachable

SECONDS = 50.0  # for what comes about at once where the machine has nothing else to do
Pair = Callable[[bytes, bytes], tuple[Channel, Channel]]


@pytest.fixture
def pair() -> Iterator[Pair]:
    channels: list[Channel] = []

    def make(ours: bytes, theirs: bytes) -> tuple[Channel, Channel]:
        left, right = tcp_pair()
        with ThreadPoolExecutor(1) as pool:
            head = pool.submit(Channel, left, "head", ours, head=True, seconds=SECONDS)
            member = Channel(right, "member", theirs, head=False, seconds=SECONDS)
            channels.extend((head.result(SECONDS), member))
        return channels[-2], channels[-1]

    yield make
    for channel in channels:
        channel.close()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        right = socket.create_connection(listener.getsockname())
        return listener.accept()[0], right


def test_messages_arrive_in_order(pair: Pair) -> None:
    head, member = pair(b"secret", b"secret")
    messages: list[Message] = [{"number": number, "text": "ö" * number} for number in range(20)]
    for message in messages:
        head.send(message, SECONDS)
        member.send(message, SECONDS)
    assert [member.receive(SECONDS) for _ in messages] == messages
    assert [head.receive(SECONDS) for _ in messages] == messages


@pytest.mark.parametrize("theirs", [b"", b"guess", b"secret "])
def test_another_secret(pair: Pair, theirs: bytes) -> None:
    head, member = pair(b"secret", theirs)
    head.send({"kind": "welcome"}, SECONDS)
    with pytest.raises(PeerRefused, match="TokenInvalid"):
        member.receive(SECONDS)
    member.send({"kind": "hello"}, SECONDS)
    with pytest.raises(PeerRefused, match="TokenInvalid"):
        head.receive(SECONDS)


def test_silence_and_departure_are_told_apart(pair: Pair) -> None:
    head, member = pair(b"", b"")
    with pytest.raises(PeerTimeout):
        head.receive(0.3)
    member.close()
    with pytest.raises(PeerUnreachable):
        head.receive(SECONDS)


def test_what_was_said_to_one_cannot_be_said_to_another(pair: Pair) -> None:
    """The same message on a second connection, or back to its sender, or again."""
    left, right = tcp_pair()
    head, member = pair(b"secret", b"secret")
    with left, right, ThreadPoolExecutor(1) as pool:
        making = pool.submit(Channel, left, "head", b"secret", head=True, seconds=SECONDS)
        right.sendall(b"HWM1" + bytes(32))
        spy = making.result(SECONDS)
        right.recv(36, socket.MSG_WAITALL)
        spy.send({"kind": "welcome"}, SECONDS)
        said = right.recv(1000)
        right.sendall(said)
        with pytest.raises(PeerRefused, match="TokenInvalid"):
            spy.receive(SECONDS)
    for side in (head, member):
        side.hang_up()


@given(st.binary(max_size=200))
def test_garbage_after_the_nonces(garbage: bytes) -> None:
    left, right = tcp_pair()
    with left, right:
        right.sendall(b"HWM1" + bytes(32) + garbage)
        right.shutdown(socket.SHUT_WR)
        with (
            Channel(left, "head", b"", head=True, seconds=SECONDS) as channel,
            pytest.raises(PeerError),
        ):
            channel.receive(SECONDS)


@pytest.mark.parametrize("begin", [b"", b"GET / HTTP/1.1\r\n\r\n" + bytes(40), b"HWM1" + bytes(31)])
def test_garbage_instead_of_a_nonce(begin: bytes) -> None:
    left, right = tcp_pair()
    began = time.monotonic()
    with left, right:
        right.sendall(begin)
        with pytest.raises(PeerError):
            Channel(left, "head", b"", head=True, seconds=0.3)
    assert time.monotonic() - began < 30.0


def test_a_large_message_is_not_waited_for() -> None:
    left, right = tcp_pair()
    with left, right:
        right.sendall(
            b"HWM1" + bytes(32) + struct.pack("!4sI32s", b"HWM1", MAX_MESSAGE_NBYTES + 1, bytes(32))
        )
        with (
            Channel(left, "head", b"", head=True, seconds=SECONDS) as channel,
            pytest.raises(PeerError, match="no message"),
        ):
            channel.receive(SECONDS)


def test_without_a_secret_only_this_host() -> None:
    check_reach("mpi://x", "127.0.0.1", b"")
    check_reach("mpi://x", "10.0.0.1", b"secret")
    for host in ("10.0.0.1", "0.0.0.0", "node-1"):
        with pytest.raises(PeerRefused, match="HOTWEIGHTS_PEER_TOKEN"):
            check_reach("mpi://x", host, b"")
