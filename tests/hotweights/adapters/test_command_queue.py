"""What the agent orders: whole before it is done, in its order, and no descriptor is left open."""

from __future__ import annotations

import os
import socket
import sys
import threading
from contextlib import suppress
from typing import Any, cast

import pytest

from hotweights.adapters.vllm.agent_connection import Connection
from hotweights.adapters.vllm.rank.command_queue import CommandQueue
from hotweights.adapters.vllm.rank.throttle import SWITCH_SECONDS, giving_way
from hotweights_transports.handoff import frames, sockets

CONNECTION = cast(Connection, object())  # only handed on


class Engine:
    """What was asked of it."""

    def __init__(self) -> None:
        self.done: list[tuple[str, Any]] = []
        self.raises = False
        self.orders = CommandQueue(self.prepare, self.release)

    def prepare(self, connection: Connection, frame: frames.Prepare, fds: list[int]) -> None:
        for fd in fds:
            os.fstat(fd)
        self.done.append((frame.digest, len(fds)))
        if self.raises:
            raise RuntimeError("any model's code may raise anything")

    def release(self, connection: Connection, frame: frames.Release) -> None:
        self.done.append(("release", frame.digest))

    def finish(self) -> list[tuple[str, Any]]:
        """Everything that was ordered, done."""
        finished = threading.Event()
        self.orders.later(finished.set)
        assert finished.wait(50.0)
        return self.done


@pytest.fixture
def engine() -> Engine:
    return Engine()


_FILES: dict[int, int] = {}


def descriptors(count: int) -> list[int]:
    """Each of a file of its own."""
    fds = [os.memfd_create("test") for _ in range(count)]
    _FILES.update((fd, os.fstat(fd).st_ino) for fd in fds)
    return fds


def is_open(fd: int) -> bool:
    """Whether it still is what `descriptors` opened: another thread may get a number again as soon
    as it is closed.
    """
    try:
        return os.fstat(fd).st_ino == _FILES[fd]
    except OSError:
        return False


def test_slabs_in_several_frames_are_one_order(engine: Engine) -> None:
    engine.orders.start()
    fds = descriptors(5)
    engine.orders.handle(CONNECTION, frames.Prepare(id=1, digest="a", slabs=4), fds[:2])
    engine.orders.handle(CONNECTION, frames.MoreSlabs(id=1), fds[2:4])
    assert engine.finish() == []
    engine.orders.handle(CONNECTION, frames.MoreSlabs(id=1), fds[4:])
    engine.orders.handle(CONNECTION, frames.Release(id=2, digest="a"), [])
    assert engine.finish() == [("a", 5), ("release", "a")]
    assert not any(map(is_open, fds))


def test_what_is_released_is_known_before_its_turn(engine: Engine) -> None:
    """Else the thread would prepare it to the end first."""
    engine.orders.handle(CONNECTION, frames.Prepare(id=1, digest="a", slabs=0), descriptors(1))
    engine.orders.handle(CONNECTION, frames.Release(id=2, digest="a"), [])
    assert engine.orders.released == "a"
    engine.orders.handle(CONNECTION, frames.Prepare(id=3, digest="a", slabs=0), descriptors(1))
    assert engine.orders.released == "", "it is wanted again"
    engine.orders.start()
    assert [name for name, _ in engine.finish()] == ["a", "release", "a"]


def test_a_connection_that_goes_leaves_nothing(engine: Engine) -> None:
    fds = descriptors(4)
    engine.orders.handle(CONNECTION, frames.Prepare(id=1, digest="a", slabs=3), fds[:2])
    engine.orders.forget(CONNECTION)
    engine.orders.handle(CONNECTION, frames.MoreSlabs(id=1), fds[2:3])
    engine.orders.handle(CONNECTION, frames.Welcome(), fds[3:])
    assert not any(map(is_open, fds))
    engine.orders.start()
    assert engine.finish() == []


@pytest.mark.parametrize("arrived", [0, 2])
def test_an_order_whose_descriptors_are_lost_is_answered(engine: Engine, arrived: int) -> None:
    """By whichever of its frames: the agent would wait until its time is over."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection, fds = Connection(ours), descriptors(arrived + 1)
    prepare, more = frames.Prepare(id=1, digest="a", slabs=3), frames.MoreSlabs(id=1)
    if arrived:
        engine.orders.handle(connection, prepare, fds[:arrived])
    engine.orders.refuse(connection, more if arrived else prepare, "no number is left")
    engine.orders.refuse(connection, more, "no number is left")
    engine.orders.handle(connection, more, fds[arrived:])
    assert not any(map(is_open, fds))
    with theirs:
        expected = frames.Rejected(1, "a", "MapFailed", "no number is left")
        assert sockets.recv(theirs) == (expected, [])
        connection.close()
        with pytest.raises(sockets.ConnectionClosed):  # one answer, and no more
            sockets.recv(theirs)
    engine.orders.start()
    assert engine.finish() == []


def test_it_lives_on_whatever_a_model_raises(engine: Engine) -> None:
    engine.orders.start()
    engine.raises = True
    for request, digest in enumerate("ab"):
        (fd,) = descriptors(1)
        engine.orders.handle(CONNECTION, frames.Prepare(id=request, digest=digest, slabs=0), [fd])
        assert engine.finish()[-1] == (digest, 1)
        assert not is_open(fd)


def test_others_wait_as_long_as_before_when_it_is_done() -> None:
    usual = sys.getswitchinterval()
    with giving_way():
        with suppress(KeyError), giving_way():
            raise KeyError
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS, abs=1e-5), (
            "it counts whole microseconds"
        )
    assert sys.getswitchinterval() == usual
