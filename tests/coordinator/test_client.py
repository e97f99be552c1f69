"""Clients against real sockets: deadlines, several endpoints, coordinators that come, go, and
hang.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict

import pytest
import zmq

from hotweights_coordinator.client.client import (
    CONNECT_SECONDS,
    GONE_SECONDS,
    AsyncClient,
    Client,
    Reply,
    Subscriber,
    _EndpointFailover,
    _Watched,
)
from hotweights_coordinator.state.state import Event
from hotweights_coordinator.wire import auth, handshake
from hotweights_coordinator.wire.messages import (
    Answer,
    CallRefused,
    CoordinatorUnreachable,
    json_bytes,
    json_value,
    request_frames,
)
from tests.coordinator.running import CALL_SECONDS, lasting_endpoint, running

NOWHERE = "tcp://127.0.0.1:1"
Said = dict[str, object] | None


@contextmanager
def somebody(
    answers: list[Said] | Callable[[str], Said], asked: list[str] | None = None
) -> Iterator[str]:
    """A ROUTER that gives these answers, one to each request or by its method (None: no answer), with
    the request's id; the methods are added to ``asked``.
    """
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.linger = 0
    port = router.bind_to_random_port("tcp://127.0.0.1")
    stopped = threading.Event()

    def work() -> None:
        left = [] if callable(answers) else list(answers)
        while not stopped.is_set():
            if router.poll(20):
                route, body = router.recv_multipart()[:2]
                method = json.loads(body)["method"]
                if asked is not None:
                    asked.append(method)
                given = left.pop(0) if left else None
                answer = answers(method) if callable(answers) else given
                if answer is not None:
                    router.send_multipart(
                        [route, json.dumps({"id": json.loads(body)["id"]} | answer).encode()]
                    )

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        stopped.set()
        thread.join()
        router.close()
        context.term()


def until_answered(call: Callable[[], Reply]) -> Reply:
    """Where the time of a call is short because it has to pass, the machine may need it."""
    while True:
        with suppress(CoordinatorUnreachable):
            return call()


def test_one_that_is_silent_does_not_get_the_time_of_the_others() -> None:
    course = _EndpointFailover("tcp://127.0.0.1:1,tcp://127.0.0.1:2,tcp://127.0.0.1:3", "")
    before = time.monotonic()
    found = course.try_until(math.inf, 30.0)
    assert before + 10.0 <= found <= time.monotonic() + 10.0
    assert course.try_until(before, 30.0) == before


def test_does_not_wait_for_the_leader_that_just_went() -> None:
    course = _EndpointFailover("tcp://127.0.0.1:1,tcp://127.0.0.1:2,tcp://127.0.0.1:3", "")
    first = course.at
    assert course.connect_seconds == CONNECT_SECONDS
    course.follow(None)
    assert (course.at, course.connect_seconds) == ("tcp://127.0.0.1:2", CONNECT_SECONDS)
    course.follow(CallRefused("NotLeader", "ask the leader", first))
    assert (course.at, course.connect_seconds) == (first, GONE_SECONDS)
    course.accepted(Answer(1, {}, None, None))
    assert course.connect_seconds == CONNECT_SECONDS


def test_gives_up_in_time_and_says_what_to_do() -> None:
    with (
        Client(NOWHERE, timeout_seconds=0.2) as client,
        pytest.raises(CoordinatorUnreachable) as caught,
    ):
        client.call("status")
    assert NOWHERE in str(caught.value)
    assert "hotweights coord-serve" in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_gives_up_in_time_in_a_loop() -> None:
    async with AsyncClient([NOWHERE], timeout_seconds=0.2) as client:
        with pytest.raises(CoordinatorUnreachable, match="coord-serve"):
            await client.call("status")


def test_asks_the_next_endpoint() -> None:
    with (
        running() as there,
        Client(f"{NOWHERE},{there.endpoint}", "", timeout_seconds=CALL_SECONDS) as client,
    ):
        assert client.call("status").result["state"] == "idle"
        assert client._course.at == there.endpoint, "it did not stay there"
        assert client.call("status").result["state"] == "idle"


def test_goes_past_one_that_is_silent() -> None:
    with (
        somebody([None]) as silent,
        running() as there,
        Client([silent, there.endpoint], "", timeout_seconds=2.0) as client,
    ):
        assert until_answered(lambda: client.call("status")).result["state"] == "idle"


def test_asks_again_whether_it_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that is kept waiting may need longer for its no than the first time allows."""
    found: list[bool] = []

    def slow(endpoint: str, keys: auth.ClientKeys | None, seconds: float) -> bool:
        found.append(len(found) > 1 and is_refused(endpoint, keys, seconds))
        return found[-1]

    is_refused = handshake.is_refused
    monkeypatch.setattr(handshake, "is_refused", slow)
    with (
        running(token="secret") as there,
        there.client(token="other") as client,
        pytest.raises(CallRefused, match="not the coordinator's"),
    ):
        client.call("status")
    assert found[:2] == [False, False]


async def test_asks_again_whether_it_is_let_in_in_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []

    def slow(endpoint: str, keys: auth.ClientKeys | None, seconds: float) -> bool:
        found.append(len(found) > 1 and is_refused(endpoint, keys, seconds))
        return found[-1]

    is_refused = handshake.is_refused
    monkeypatch.setattr(handshake, "is_refused", slow)
    with running(token="secret") as there:
        async with AsyncClient(there.endpoint, "other", timeout_seconds=CALL_SECONDS) as client:
            with pytest.raises(CallRefused, match="not the coordinator's"):
                await client.call("status")
    assert found[:2] == [False, False]


def test_follows_who_is_said_to_lead() -> None:
    with running() as there:
        redirect = {
            "ok": False,
            "error": {"reason": "NotLeader", "message": "go there", "leader": there.endpoint},
        }
        with (
            somebody([redirect]) as follower,
            Client(follower, "", timeout_seconds=CALL_SECONDS) as client,
        ):
            assert client.call("status").result["instance_id"] == "test"


def test_asks_again_while_nobody_leads() -> None:
    nobody: dict[str, object] = {
        "ok": False,
        "error": {"reason": "NotLeader", "message": "wait", "leader": ""},
    }
    done: dict[str, object] = {"ok": True, "result": {"done": 1}}
    with (
        somebody([nobody, nobody, done]) as there,
        Client(there, "", timeout_seconds=CALL_SECONDS) as client,
    ):
        assert client.call("commit", version="v").result == {"done": 1}
    with (
        somebody([nobody] * 100) as there,
        Client(there, "", timeout_seconds=0.3) as client,
        pytest.raises(CallRefused, match="wait"),
    ):
        until_answered(lambda: client.call("commit", version="v"))


def test_what_is_no_answer_or_anothers_is_nobodys() -> None:
    late: dict[str, object] = {"id": -5, "ok": True, "result": {"late": 1}}
    odd: dict[str, object] = {"ok": "maybe"}
    with somebody([late, odd]) as there, Client(there, "", timeout_seconds=0.3) as client:
        for _ in range(2):
            with pytest.raises(CoordinatorUnreachable):
                client.call("status")


def test_is_not_stuck_after_an_answer_that_came_too_late() -> None:
    def answer(method: str) -> Said:
        return {"ok": True, "result": {"second": 2}} if method == "commit" else None

    asked: list[str] = []
    with somebody(answer, asked) as there, Client(there, "", timeout_seconds=0.2) as client:
        while not asked:  # until it was heard at all
            with pytest.raises(CoordinatorUnreachable):
                client.call("status")
        said = client.call("commit", version="v", timeout_seconds=CALL_SECONDS)
        assert said.result == {"second": 2}


def test_waits_for_one_that_starts_again() -> None:
    endpoint = lasting_endpoint()
    with running(endpoint=endpoint) as first:
        client = first.client()
        assert client.call("status").result["state"] == "idle"
    with running(endpoint=endpoint), client:
        assert client.call("status").result["uptime_seconds"] >= 0


def test_may_be_shared_by_threads() -> None:
    failed: list[BaseException] = []
    with running() as there, there.client() as client:

        def work(name: str) -> None:
            try:
                for _ in range(20):
                    client.call("register", worker_id=name)
            except BaseException as error:
                failed.append(error)
                raise

        threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert len(client.call("status").result["workers"]) == 4


async def test_goes_on_where_the_connection_goes_just_before_it_sends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seldom, so the moment is made: whoever would lead is gone when the socket has just said that
    it can send.
    """
    ready = _Watched.ready
    with running() as there, somebody([]) as ends:
        gone = zmq.Context()
        router = gone.socket(zmq.ROUTER)
        router.linger = 0
        endpoint = f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"

        async def and_then_it_is_gone(watched: _Watched, flag: int, seconds: float) -> bool:
            can = await ready(watched, flag, seconds)
            if not router.closed:
                router.close()
                gone.term()
                await asyncio.sleep(0.2)
            return can

        monkeypatch.setattr(_Watched, "ready", and_then_it_is_gone)
        async with AsyncClient([endpoint, ends, there.endpoint], "", timeout_seconds=3.0) as client:
            while True:
                with suppress(CoordinatorUnreachable):  # see `until_answered`
                    assert (await client.call("status")).result["state"] == "idle"
                    return


async def test_many_clients_in_a_loop() -> None:
    with running() as there:
        clients = [AsyncClient(there.endpoint, "", timeout_seconds=CALL_SECONDS) for _ in range(20)]
        await asyncio.gather(
            *(client.call("register", worker_id=f"w{n}") for n, client in enumerate(clients))
        )
        status = (await clients[0].call("status")).result
        for client in clients:
            await client.close()
        assert len(status["workers"]) == 20


def test_what_is_not_unicode_is_said_all_the_same() -> None:
    for value in (
        {"reason": "a path of half a surrogate: \udcff"},
        Event(1.0, "leader", "coordinator \udcff leads"),
    ):
        expected = asdict(value) if isinstance(value, Event) else value
        assert json_value(json_bytes(value)) == expected


def test_refuses_what_is_too_large_before_it_is_sent() -> None:
    with pytest.raises(CallRefused, match="is the most"):
        request_frames(1, "register", {"host": "x" * (2 << 20)}, "", None)


@pytest.mark.parametrize(
    "endpoint",
    ["", "tcp://", "http://127.0.0.1:1", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", ","],
)
def test_names_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(CallRefused, match=r"tcp://127\.0\.0\.1:5555"):
        Client(endpoint, "")


def test_events_may_be_chosen_and_may_not_come() -> None:
    with running() as there, Subscriber(there.events_endpoint, ["commit"]) as events:
        assert events.next(0.05) is None
