"""The unix socket: who gets in, and what nonsense does to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hotweights_agent.engines.limits import FrameRate, Limits
from hotweights_agent.engines.socket_auth import AuthenticationUnavailable, Unauthenticated
from hotweights_agent.engines.socket_server import EngineServer, ServerNotStarted
from hotweights_agent.session.messages import Connected, Disconnected, FrameReceived, Message, Pod
from hotweights_transports.handoff import frames, sockets
from tests.agent.fake_engine import Process, until

POD = Pod("uid-1", "ns", "vllm-0")
OTHER = Pod("uid-2", "tenant", "vllm-0")


class Doorman:
    async def authenticate(self, token: str) -> Pod:
        if token == "other":
            return OTHER
        if token == "away":
            raise AuthenticationUnavailable("nobody to ask")
        if token != "good":
            raise Unauthenticated("TokenInvalid", "not a good token")
        return POD


class Pinned:
    def __init__(self, count: int) -> None:
        self.fds = tuple(os.memfd_create(f"slab-{i}") for i in range(count))
        self.released = 0

    def release(self) -> None:
        self.released += 1
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hw") as path:  # short: a socket's path has 107 bytes
        yield Path(path) / "node-a"


class Served:
    def __init__(self, folder: Path, limits: Limits) -> None:
        self.heard: list[Message] = []
        self.server = EngineServer(folder, Doorman(), self.hear, agent="test", limits=limits)

    async def hear(self, message: Message) -> None:
        self.heard.append(message)

    async def enter(self, token: str = "good", **changes: object) -> Process:
        process = Process(self.server.path, frames.Hello(role="rank", token=token, **changes))  # type: ignore[arg-type]
        assert isinstance(await process.open(), frames.Welcome)
        return process

    def said(self) -> list[frames.Frame]:
        return [m.frame for m in self.heard if isinstance(m, FrameReceived)]


@pytest.fixture
async def served(folder: Path) -> AsyncIterator[Served]:
    found = Served(
        folder, Limits(hello_seconds=0.3, send_seconds=0.5, max_strangers=4, max_queued_frames=8)
    )
    await found.server.start()
    yield found
    await found.server.close()


async def refusal(served: Served, hello: frames.Hello) -> frames.Refused:
    process = Process(served.server.path, hello)
    answer = await process.open()
    assert isinstance(answer, frames.Refused)
    process.close()
    return answer


async def test_a_process_with_a_good_token_is_welcome_and_heard(served: Served) -> None:
    process = await served.enter(rank=1, world_size=2)
    sockets.send(process.sock, frames.Prepared(3, "sha256:x"))
    await until(lambda: served.said() == [frames.Prepared(3, "sha256:x")])
    first = served.heard[0]
    assert isinstance(first, Connected)
    assert (first.pod, first.hello.rank) == (POD, 1)
    sockets.send(process.sock, frames.Ping(9))
    assert await process.receive() == (frames.Pong(9), [])
    process.close()
    await until(lambda: isinstance(served.heard[-1], Disconnected))


@pytest.mark.parametrize(
    ("token", "reason"), [("bad", "TokenInvalid"), ("", "TokenInvalid"), ("away", "Busy")]
)
async def test_others_are_refused_and_never_heard(served: Served, token: str, reason: str) -> None:
    assert (await refusal(served, frames.Hello(role="server", token=token))).reason == reason
    assert served.heard == []


async def test_a_protocol_that_nobody_speaks_is_refused(served: Served) -> None:
    answer = await refusal(served, frames.Hello(role="rank", token="good", protocols=[99]))
    assert answer.reason == "ProtocolUnsupported"
    assert "restart the pod" in answer.message


async def test_silence_ends_after_the_hello_deadline_and_strangers_are_few(served: Served) -> None:
    strangers = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(8)]
    for sock in strangers:  # before the server's loop has its turn: none is overdue before the last
        sock.connect(str(served.server.path))
        sock.setblocking(False)
    answers = []
    for sock in strangers:
        try:
            answers.append(await asyncio.get_running_loop().sock_recv(sock, 4096))
        except ConnectionResetError:
            answers.append(b"")
        sock.close()
    assert 0 < sum(b"no hello within" in answer for answer in answers) <= 4
    (await served.enter()).close()


async def test_one_pod_cannot_take_every_connection(folder: Path) -> None:
    served = Served(folder, Limits(spare_pod_connections=4, max_pod_connections=8))
    await served.server.start()
    ours = [await served.enter(rank=rank, world_size=16) for rank in range(8)]
    answer = await refusal(served, frames.Hello(role="rank", token="good", rank=8, world_size=16))
    assert (answer.reason, answer.message) == (
        "TooManyConnections",
        "pod ns/vllm-0 has 8 connections already",
    )
    others = await served.enter("other")
    ours.pop().close()
    await until(lambda: isinstance(served.heard[-1], Disconnected))
    ours.append(await served.enter(rank=8, world_size=16))
    for process in (*ours, others):
        process.close()
    await served.server.close()


async def test_a_pod_has_its_ranks_and_a_few_servers(folder: Path) -> None:
    served = Served(folder, Limits(spare_pod_connections=2))
    await served.server.start()
    ours = [await served.enter(rank=rank, world_size=2) for rank in range(2)]
    ours += [await served.enter(world_size=2) for _ in range(2)]
    answer = await refusal(served, frames.Hello(role="server", token="good", world_size=2))
    assert answer.reason == "TooManyConnections"
    # what it says of itself opens no more than the most
    ours += [await served.enter(world_size=4096) for _ in range(60)]
    answer = await refusal(served, frames.Hello(role="server", token="good", world_size=4096))
    assert answer.message == "pod ns/vllm-0 has 64 connections already"
    for process in ours:
        process.close()
    await served.server.close()


async def test_a_process_that_says_hello_at_once_is_heard_in_a_crowd(folder: Path) -> None:
    """All that wait in the backlog are accepted at a stretch; none pushes out who has spoken."""
    served = Served(folder, Limits(max_strangers=4, max_user_strangers=4))
    await served.server.start()
    process = Process(served.server.path, frames.Hello(role="rank", token="good"))
    process.sock.connect(str(served.server.path))
    sockets.send(process.sock, process.hello)
    strangers = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(100)]
    for sock in strangers:  # before the server's loop has its turn
        sock.connect(str(served.server.path))
    process.sock.setblocking(False)
    frame, _ = await process.receive()
    assert isinstance(frame, frames.Welcome)
    process.close()
    for sock in strangers:
        sock.close()
    await served.server.close()


class Counting(Doorman):
    asked = 0

    async def authenticate(self, token: str) -> Pod:
        self.asked += 1
        return await super().authenticate(token)


async def test_a_full_pods_hellos_are_refused_without_a_review(folder: Path) -> None:
    door, heard = Counting(), list[Message]()

    async def hear(message: Message) -> None:
        heard.append(message)

    server = EngineServer(folder, door, hear, limits=Limits(max_pod_connections=2))
    await server.start()
    hello = frames.Hello(role="server", token="good", world_size=4096)
    ours = [Process(server.path, hello) for _ in range(20)]
    answers = [await process.open() for process in ours]
    assert [type(answer) for answer in answers[:3]] == [
        frames.Welcome,
        frames.Welcome,
        frames.Refused,
    ]
    assert all(isinstance(answer, frames.Refused) for answer in answers[2:])
    assert door.asked == 2
    ours[0].close()
    await until(lambda: isinstance(heard[-1], Disconnected))
    again = Process(server.path, hello)
    assert isinstance(await again.open(), frames.Welcome), "a place is free again"
    for process in (*ours, again):
        process.close()
    await server.close()


async def test_a_token_without_connections_is_reviewed_again(folder: Path) -> None:
    """Nothing is remembered of a token beyond the connections that it let in."""
    door = Counting()

    async def hear(_: Message) -> None: ...

    server = EngineServer(folder, door, hear, limits=Limits(max_pod_connections=1))
    await server.start()
    for _ in range(3):
        process = Process(server.path, frames.Hello(role="server", token="good"))
        while not isinstance(await process.open(), frames.Welcome):
            process = Process(server.path, process.hello)  # the end of the last is not seen yet
        process.close()
        await until(lambda: not server._connections)
    assert door.asked == 3
    await server.close()


def is_open(process: Process) -> bool:
    """Whether the agent holds its end; what it said was read before."""
    try:
        return bool(process.sock.recv(4096, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


async def test_who_is_refused_is_held_for_a_while_and_only_so_many_are(folder: Path) -> None:
    served = Served(folder, Limits(refused_seconds=3600.0, max_refused=2))
    await served.server.start()
    refused = []
    for _ in range(3):
        process = Process(served.server.path, frames.Hello(role="rank", token="bad"))
        assert isinstance(await process.open(), frames.Refused)
        refused.append(process)
    await until(lambda: not is_open(refused[0]))
    assert all(is_open(process) for process in refused[1:])
    assert served.heard == []
    for process in refused:
        process.close()
    await served.server.close()


async def test_who_is_refused_is_held_for_a_while_whatever_it_goes_on_to_say(folder: Path) -> None:
    served = Served(folder, Limits(refused_seconds=0.5))
    await served.server.start()
    began = asyncio.get_running_loop().time()
    refused = [
        Process(served.server.path, frames.Hello(role="rank", token="bad")) for _ in range(2)
    ]
    for process in refused:  # before the server's loop has its turn: it cannot be through already
        process.sock.connect(str(served.server.path))
        process.sock.setblocking(False)
        sockets.send(process.sock, process.hello)
        with contextlib.suppress(BlockingIOError):  # what it goes on to say is not read
            while True:
                process.sock.send(b"{}")
    await until(lambda: not any(is_open(process) for process in refused))
    assert asyncio.get_running_loop().time() - began >= 0.5
    assert served.heard == []
    for process in refused:
        process.close()
    await served.server.close()


async def test_nothing_is_held_any_more_after_the_end(folder: Path) -> None:
    served = Served(folder, Limits(refused_seconds=3600.0))
    await served.server.start()
    process = Process(served.server.path, frames.Hello(role="rank", token="bad"))
    assert isinstance(await process.open(), frames.Refused)
    assert is_open(process)
    await served.server.close()
    assert not is_open(process)
    process.close()


async def test_others_words_are_heard_before_all_of_a_crowd_is(folder: Path) -> None:
    served = Served(folder, Limits(max_strangers=128, max_user_strangers=128))
    await served.server.start()
    process = await served.enter()
    crowd = [Process(served.server.path, frames.Hello(role="rank", protocols=[99]))
             for _ in range(120)]  # fmt: skip
    for one in crowd:
        one.sock.connect(str(served.server.path))
        sockets.send(one.sock, one.hello)
        one.sock.setblocking(False)
    sockets.send(process.sock, frames.Ping(1))
    # no `until`: a turn of the loop each, so that it is seen how many were heard meanwhile
    while True:
        await asyncio.sleep(0)
        with contextlib.suppress(BlockingIOError):
            assert sockets.recv(process.sock)[0] == frames.Pong(1)
            break
    heard = 0
    for one in crowd:
        with contextlib.suppress(BlockingIOError):
            sockets.recv(one.sock)
            heard += 1
    assert heard < len(crowd) / 2
    for one in (*crowd, process):
        one.close()
    await served.server.close()


async def test_whoever_waits_to_connect_finds_a_place_when_a_crowd_is_accepted(
    folder: Path,
) -> None:
    served = Served(folder, Limits())
    await served.server.start()
    crowd = []
    with contextlib.suppress(BlockingIOError):  # until nobody can connect any more
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            crowd.append(sock)
            sock.connect(str(served.server.path))
    patient = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    await asyncio.to_thread(sockets.connect, patient, str(served.server.path), 30.0)
    sockets.send(patient, frames.Hello(role="rank", token="good"))
    await until(lambda: any(isinstance(message, Connected) for message in served.heard))
    for sock in (*crowd, patient):
        sock.close()
    await served.server.close()


async def test_a_crowd_that_reconnects_without_end_keeps_nobody_out(folder: Path) -> None:
    served = Served(folder, Limits())
    await served.server.start()
    enough = threading.Event()

    def come_and_go() -> None:
        hello = frames.encode(frames.Hello(role="rank", token="bad"))
        while not enough.is_set():
            for first in (b"", hello):
                with (
                    socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock,
                    contextlib.suppress(OSError),
                ):
                    sock.setblocking(False)
                    sock.connect(str(served.server.path))
                    if first:
                        sock.send(first)

    crowd = asyncio.create_task(asyncio.to_thread(come_and_go))
    try:
        for _ in range(2):
            process = Process(served.server.path, frames.Hello(role="rank", token="good"))
            await asyncio.to_thread(sockets.connect, process.sock, str(process.path), 30.0)
            sockets.send(process.sock, process.hello)
            process.sock.setblocking(False)
            assert isinstance((await process.receive())[0], frames.Welcome)
            process.close()
    finally:
        enough.set()
        await crowd
    await served.server.close()


async def test_words_of_who_talks_too_much_come_together() -> None:
    """So that the session looks at all engines once for them, and not once for each."""
    words = FrameRate(Limits(frames_per_second=100))
    queue = asyncio.Queue[None]()

    async def say() -> None:
        await words.turn(POD)
        queue.put_nowait(None)

    sayings = [asyncio.create_task(say()) for _ in range(130)]
    heard = looks = 0
    while heard < len(sayings):
        await queue.get()
        heard += 1
        while not queue.empty():
            queue.get_nowait()
            heard += 1
        looks += 1
    assert looks < 15, "the first hundred at once, thirty more in a third of a second"
    await asyncio.gather(*sayings)


async def test_an_acceptor_that_is_gone_is_told_of(folder: Path) -> None:
    served = Served(folder, Limits())
    await served.server.start()
    assert served.server.trouble() == ""
    acceptor = next(task for task in asyncio.all_tasks() if task.get_name() == "engines")
    acceptor.cancel()
    await until(lambda: served.server.trouble() != "")
    assert "accepts no engines any more" in served.server.trouble()
    await served.server.close()


async def test_strangers_that_say_nothing_give_way_to_whoever_says_hello(folder: Path) -> None:
    """Long before their hello is overdue."""
    served = Served(folder, Limits(hello_seconds=3600.0, max_strangers=4))
    await served.server.start()
    strangers = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(20)]
    for sock in strangers:
        sock.connect(str(served.server.path))
    (await served.enter()).close()
    for sock in strangers:
        sock.close()
    await served.server.close()


async def test_one_pod_is_listened_to_only_so_fast_however_many_connections_it_has(
    folder: Path,
) -> None:
    loop, rate, word = asyncio.get_running_loop(), 8, frames.Prepared(7, "sha256:x")
    served = Served(folder, Limits(frames_per_second=rate))
    await served.server.start()
    began, sent = loop.time(), 0
    talkers = [await served.enter(rank=rank, world_size=4) for rank in range(4)]
    for process in talkers:
        with contextlib.suppress(BlockingIOError):  # a socket takes ten datagrams at least
            for number in range(50):
                sockets.send(process.sock, frames.Prepared(number))
                sent += 1
    other = await served.enter("other")
    sockets.send(other.sock, word)
    await until(lambda: word in served.said())
    before = served.said().index(word)  # heard of the talkers, before the other one was
    assert 0 < before < sent
    assert before <= rate + rate * (loop.time() - began)
    for process in (*talkers, other):
        process.close()
    await served.server.close()


@pytest.mark.parametrize("number", [10**30, -1, 2**53])
async def test_a_number_that_cannot_be_meant_is_refused_and_never_heard(
    served: Served, number: int
) -> None:
    process = Process(
        served.server.path,
        frames.Hello(role="server", token="good", state="Serving", commit_token=number),
    )
    answer = await process.open()
    assert isinstance(answer, frames.Refused)
    assert "hello.commit_token is no int" in answer.message
    assert served.heard == []
    process.close()
    talking = await served.enter()
    sockets.send(talking.sock, frames.State("Serving", None, number))
    await until(lambda: isinstance(served.heard[-1], Disconnected))
    assert served.said() == []
    talking.close()


@pytest.fixture
def left(folder: Path) -> None:
    """A socket of an agent that was killed."""
    folder.mkdir()
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    dead.bind(str(folder / "agent.sock"))
    dead.close()


async def test_the_socket_can_be_reached_by_everybody_and_replaces_a_dead_one(
    folder: Path, left: None
) -> None:
    served = Served(folder, Limits())
    await served.server.start()
    assert [stat.S_IMODE(p.stat().st_mode) for p in (folder, served.server.path)] == [
        0o755,
        0o666,
    ]
    (await served.enter()).close()
    await served.server.close()
    assert os.listdir(folder) == []  # noqa: PTH208


async def test_a_node_may_have_any_name_that_kubernetes_allows(folder: Path) -> None:
    place = folder.parent / ("node-" * 50 + "abc")
    served = Served(place, Limits())
    await served.server.start()
    (await served.enter()).close()
    # as the injected HOTWEIGHTS_SOCKET names it
    assert served.server.path == place / "agent.sock"
    await served.server.close()


async def test_what_no_folder_can_be_called_is_told_with_the_remedy(folder: Path) -> None:
    with pytest.raises(ServerNotStarted, match="choose a shorter run_folder"):
        await Served(folder / ("n" * 256), Limits()).server.start()


async def test_memory_goes_out_in_pieces_and_is_unpinned(served: Served) -> None:
    process = await served.enter()
    image = Pinned(600)
    served.server.send_prepare(1, frames.Prepare(5, "sha256:x"), image)
    received, count = [], 0
    while count < 600:
        frame, fds = await process.receive()
        received.append(frame)
        count += len(fds)
        for fd in fds:
            os.close(fd)
    assert received == [
        frames.Prepare(5, "sha256:x", 599),
        frames.MoreSlabs(5),
        frames.MoreSlabs(5),
    ]
    await until(lambda: image.released == 1)
    served.server.send_prepare(77, frames.Prepare(6, "sha256:x"), gone := Pinned(1))
    assert gone.released == 1
    process.close()


async def test_a_process_that_takes_nothing_is_let_go(served: Served) -> None:
    process = await served.enter()
    image = Pinned(2)
    for number in range(600):
        served.server.send(1, frames.Release(number, "sha256:" + "0" * 4000))
        await asyncio.sleep(0)
    served.server.send_prepare(1, frames.Prepare(5, "sha256:x"), image)
    await until(lambda: isinstance(served.heard[-1], Disconnected))
    assert image.released == 1
    process.close()


@pytest.mark.timeout(300)  # a machine that is busy gives each of the examples its turns late
@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    datagrams=st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=300),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=8), inner, max_size=4)
                ),
                max_leaves=8,
            ).map(lambda body: json.dumps(body).encode()),
            st.sampled_from(
                [
                    b'{"op":"hello","token":{}}',
                    b'{"op":"hello","token":"bad"}',
                    b'{"op":""}',
                    b"[" * 60000,
                ]
            ),
        ),
        min_size=1,
        max_size=4,
    ),
    first_hello=st.booleans(),
)
async def test_nonsense_ends_its_own_connection_and_nothing_else(
    served: Served, datagrams: list[bytes], first_hello: bool
) -> None:
    process = Process(served.server.path, frames.Hello(role="rank", token="good"))
    if first_hello:
        await process.open()
    else:
        process.sock.connect(str(served.server.path))
    try:
        for datagram in datagrams:
            process.sock.send(datagram)
    except (BrokenPipeError, ConnectionResetError, BlockingIOError):
        pass
    process.close()
    (await served.enter()).close()
