"""A real coordinator, asked over real sockets: what it answers, what it refuses, and that nothing
ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zmq

from hotweights_coordinator.backends.base import Fenced, Lease, Unavailable
from hotweights_coordinator.backends.memory import MemoryBackend
from hotweights_coordinator.client.client import Client, Subscriber
from hotweights_coordinator.server.server import Server
from hotweights_coordinator.server.settings import ServeSettings
from hotweights_coordinator.state import state
from hotweights_coordinator.state.state import CoordinatorState
from hotweights_coordinator.wire import address, auth
from hotweights_coordinator.wire.messages import (
    MAX_JSON_NBYTES,
    CallRefused,
    CoordinatorError,
    CoordinatorUnreachable,
)
from tests.coordinator.running import CALL_SECONDS, Coordinator, begun, manifest, plan, running


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    with running() as found:
        yield found


@pytest.fixture
def client(coordinator: Coordinator) -> Iterator[Client]:
    with coordinator.client() as found:
        yield found


def refusal(client: Client, method: str, **args: Any) -> str:
    with pytest.raises(CallRefused) as caught:
        client.call(method, **args)
    assert str(caught.value)
    return caught.value.reason


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_it_is_reached_over_ipv6() -> None:
    with running(endpoint="tcp://[::1]:0") as there, there.client() as client:
        assert there.endpoint.startswith("tcp://[::1]:")
        assert client.call("status")
        with Subscriber(there.events_endpoint):  # connects, or raises
            pass


def test_an_update_from_the_plan_to_the_last_worker(client: Client) -> None:
    made = plan()
    for name in ("a", "b"):
        client.call("register", worker_id=name, host="h", endpoints=[f"tcp://10.0.0.1:{ord(name)}"])
    submitted = client.call("submit_plan", binary=made.canonical).result
    assert submitted["digest"] == made.digest
    token = client.call("begin", version="v1").result["token"]

    assigned = client.call("heartbeat", worker_id="b").result
    assert (assigned["token"], assigned["state"], assigned["digest"]) == (
        token,
        "begun",
        made.manifest.digest,
    )
    assert (assigned["uri"], assigned["model"], assigned["current"]) == (made.source, "m", None)
    assert client.call("get_plan", digest=assigned["plan_digest"]).binary == made.canonical

    assert client.call("precommit", worker_id="a", token=token).result["state"] == "begun"
    assert refusal(client, "commit", version="v1") == "NotPrecommitted"
    assert client.call("status").result["waiting_for"] == ["b"]
    assert client.call("precommit", worker_id="b", token=token).result["state"] == "precommitted"
    assert (
        client.call("commit", version="v1", token=token).result
        == client.call("commit", version="v1").result
    )

    current = client.call("heartbeat", worker_id="a", have=[made.manifest.digest]).result["current"]
    assert (current["version"], current["digest"], current["token"]) == (
        "v1",
        made.manifest.digest,
        token,
    )
    said = {"digest": made.manifest.digest, "token": token}
    client.call("heartbeat", worker_id="a", applied=said)
    client.call("applied", worker_id="b", version="v1", **said)
    status = client.call("status").result
    assert (status["state"], status["applied"], status["waiting_for"]) == (
        "committed",
        ["a", "b"],
        [],
    )
    assert {"plan", "begin", "precommit", "commit", "applied"} <= {
        event["topic"] for event in status["last_events"]
    }
    assert client.call("get_current_manifest").binary == made.manifest.canonical
    donors = client.call("who_has", digest=made.manifest.digest).result["workers"]
    assert [donor["worker_id"] for donor in donors] == ["a"]


def test_who_joins_late_pulls_from_who_has_it(client: Client) -> None:
    token = begun(client, commit_when_ready=True)
    digest = manifest().digest
    client.call("register", worker_id="a", endpoints=["tcp://10.0.0.1:1"])
    client.call("precommit", worker_id="a", token=token)
    client.call("heartbeat", worker_id="a", have=[digest])
    assigned = client.call("register", worker_id="late", endpoints=["tcp://10.0.0.2:1"]).result
    assert (assigned["state"], assigned["digest"]) == ("committed", digest)
    assert [peer["endpoints"] for peer in assigned["parents"]] == [["tcp://10.0.0.1:1"]]


def test_a_silent_worker_is_dropped_and_has_to_register_again() -> None:
    with running(worker_ttl_seconds=600.0) as coordinator, coordinator.client() as client:
        token = begun(client)
        client.call("register", worker_id="dies", host="h")
        client.call("register", worker_id="lives", host="h")
        client.call("precommit", worker_id="lives", token=token)
        coordinator.fell_silent("dies")
        while client.call("status").result["state"] == "begun":
            client.call("heartbeat", worker_id="lives")
        assert client.call("status").result["workers"] == ["lives"]
        assert refusal(client, "heartbeat", worker_id="dies") == "UnknownWorker"


def test_what_no_live_worker_has_prepared_is_not_committed() -> None:
    with running(worker_ttl_seconds=600.0) as coordinator, coordinator.client() as client:
        token = begun(client)
        client.call("register", worker_id="dies")
        assert (
            client.call("precommit", worker_id="dies", token=token).result["state"]
            == "precommitted"
        )
        coordinator.fell_silent("dies")
        while client.call("status").result["workers"]:
            pass
        assert client.call("status").result["state"] == "begun"
        with pytest.raises(
            CallRefused, match="no live worker has prepared v1; start `hotweights worker`"
        ) as refused:
            client.call("commit", version="v1")
        assert refused.value.reason == "NotPrecommitted"
        assert client.call("register", worker_id="comes").result["state"] == "begun"


def test_a_failure_and_a_deadline_end_an_attempt(client: Client) -> None:
    first = begun(client)
    client.call("register", worker_id="a")
    failure = {"reason": "ChecksumMismatch", "message": "chunk 3 of t", "token": first}
    assert client.call("heartbeat", worker_id="a", failure=failure).result["state"] == "aborted"
    status = client.call("status").result
    assert status["token"] == first + 1
    assert "chunk 3 of t" in status["reason"]
    client.call("begin", version="v1")
    assert client.call("heartbeat", worker_id="a", failure=failure).result["state"] == "begun", (
        "a stale failure counted"
    )
    client.call("abort")
    third = client.call("begin", version="v1", deadline_seconds=0.05).result["token"]
    while client.call("status").result["state"] == "begun":
        pass
    assert "deadline" in client.call("status").result["reason"]
    assert refusal(client, "precommit", worker_id="a", token=third) == "StaleToken"


def test_names_what_is_wrong_with_a_plan(client: Client) -> None:
    garbage = {
        "nothing": b"",
        "text": b"no",
        "nested": b"[" * 100_000,
        "a list": b"[]",
        "other": b'{"plan_version":"9"}',
    }
    for content in garbage.values():
        with pytest.raises(CallRefused, match="submitted plan") as caught:
            client.call("submit_plan", binary=content)
        assert caught.value.reason == "BadPlan"
    assert refusal(client, "submit_plan") == "BadRequest"
    assert refusal(client, "get_plan") == "NoPlan"
    assert refusal(client, "begin", version="v1") == "WrongVersion"
    assert refusal(client, "get_current_manifest") == "NoManifest"
    with pytest.raises(CallRefused) as caught:
        client.call("set_current_manifest", binary=b"{}")
    assert caught.value.reason == "BadManifest"


def test_a_large_plan_is_looked_at_by_a_process_beside(client: Client) -> None:
    made = plan(tensors=1000)
    assert (
        client.call("submit_plan", binary=made.canonical, timeout_seconds=30.0).result["digest"]
        == made.digest
    )
    assert client.call("get_plan").binary == made.canonical
    with pytest.raises(CallRefused, match="submitted plan"):
        client.call("submit_plan", binary=made.canonical[:-1000], timeout_seconds=30.0)


@pytest.mark.timeout(60)
def test_nothing_that_is_no_request_ends_it(coordinator: Coordinator, client: Client) -> None:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(coordinator.endpoint)
    good = {"v": 1, "id": 7, "method": "status", "args": {}}
    bad: list[list[bytes]] = [
        [b"no json"],
        [b"\xff\xfe"],
        [b"[" * 100_000],
        [b"1"],
        [b"x" * (MAX_JSON_NBYTES + 1)],
        [json.dumps(good | {"id": "7"}).encode()],
        [json.dumps(good | {"id": 2**53}).encode()],
        [json.dumps(good | {"id": -1}).encode()],
        [json.dumps(good | {"id": 10**400}).encode()],
        [
            json.dumps(
                good | {"method": "precommit", "args": {"worker_id": "a", "token": 2**53}}
            ).encode()
        ],
        [json.dumps(good | {"v": 2}).encode()],
        [json.dumps(good | {"method": "nothing"}).encode()],
        [json.dumps(good | {"method": 3}).encode()],
        [json.dumps(good | {"args": []}).encode()],
        [json.dumps(good | {"args": {"unknown": 1}}).encode()],
        [json.dumps(good).encode(), b"", b""],
        [json.dumps(good).encode(), b"binary"],
        [json.dumps(good | {"method": "register", "args": {"worker_id": "../a b"}}).encode()],
        [
            json.dumps(
                good | {"method": "register", "args": {"worker_id": "a", "have": ["x"]}}
            ).encode()
        ],
        [
            json.dumps(
                good | {"method": "begin", "args": {"version": "v", "deadline_seconds": -1}}
            ).encode()
        ],
        [b'{"v":1,"id":7,"method":"begin","args":{"version":"v","deadline_seconds":NaN}}'],
        [b""],
    ]
    for frames in bad:
        dealer.send_multipart(frames)
        assert dealer.poll(int(CALL_SECONDS * 1000)), frames[0][:60]
        answer = json.loads(dealer.recv_multipart()[-1])
        assert answer["ok"] is False, frames[0][:60]
        assert answer["error"]["message"]
    dice = random.Random(4)
    for _ in range(200):
        dealer.send_multipart(
            [dice.randbytes(dice.randrange(40)) for _ in range(dice.randrange(1, 5))]
        )
    dealer.send_json(good)  # behind all of them: when it is answered, they were read
    while not (answer := json.loads(dealer.recv_multipart()[-1])).get("ok"):
        assert answer["error"]["message"]
    assert (answer["id"], answer["result"]["state"]) == (7, "idle")
    dealer.close()
    context.term()
    assert client.call("status").result["state"] == "idle"


NULL, CURVE = (name.ljust(20, b"\0") for name in (b"NULL", b"CURVE"))
# signature, version and mechanism of a ZMTP 3.1 greeting (https://rfc.zeromq.org/spec/37)
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01%b" + bytes(32)


@pytest.mark.parametrize(
    ("mechanism", "said"),
    [
        (NULL, b"\x04\x05\x05READY"),
        (CURVE, b"\x06" + (512 << 20).to_bytes(8)),  # a command of 512 MiB
    ],
)
def test_a_stranger_without_the_token_fills_no_memory(mechanism: bytes, said: bytes) -> None:
    """It sends frames of one message that never ends, or one that is as large as may be."""
    with running(token="secret") as coordinator:
        host = address.parse(coordinator.endpoint)
        with socket.create_connection(
            (host.bare_host, host.port), timeout=CALL_SECONDS
        ) as stranger:
            stranger.sendall(GREETING % mechanism + said)
            taken = 0
            with contextlib.suppress(ConnectionError):
                while taken < 64 << 20:
                    frame = b"\x03" + (1 << 16).to_bytes(8) + bytes(1 << 16)  # and more follows
                    stranger.sendall(frame)
                    taken += len(frame)
        assert taken < 16 << 20, "what the kernel's buffers hold"
        with coordinator.client(token="secret") as client:
            assert client.call("status").result["state"] == "idle"


def test_the_token_never_travels() -> None:
    passed = bytearray()

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                passed.extend(piece)
                sink.sendall(piece)

    with (
        running(token="secret") as coordinator,
        socket.create_server(("127.0.0.1", 0)) as listener,
        ThreadPoolExecutor(3) as pool,
    ):
        there = address.parse(coordinator.endpoint)

        def stand_between() -> None:
            near, _ = listener.accept()
            with near, socket.create_connection((there.bare_host, there.port)) as far:
                back = pool.submit(pass_on, far, near)
                pass_on(near, far)
                far.shutdown(socket.SHUT_RDWR)
                back.result()

        between = pool.submit(stand_between)
        way = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with Client(way, "secret", timeout_seconds=CALL_SECONDS) as client:
            assert client.call("status").result["state"] == "idle"
        between.result()
    assert b"CURVE" in passed
    assert b"secret" not in passed
    assert b"status" not in passed


def test_req_sockets_are_served_too(coordinator: Coordinator) -> None:
    context = zmq.Context()
    req = context.socket(zmq.REQ)
    req.linger = 0
    req.connect(coordinator.endpoint)
    for body in (
        {"v": 1, "id": 1, "method": "status", "args": {}},
        {"v": 1, "id": 2, "method": "x", "args": {}},
    ):
        req.send_json(body)
        assert req.poll(int(CALL_SECONDS * 1000))
        answer: Any = req.recv_json()
        assert answer["id"] == body["id"]
    req.close()
    context.term()


def test_events_tell_what_happened_and_no_token() -> None:
    with (
        running(token="secret") as coordinator,
        coordinator.client(token="secret") as client,
        Subscriber(coordinator.events_endpoint, token="secret") as events,
        Subscriber(coordinator.events_endpoint) as stranger,
    ):
        number = 0
        while events.next(0.05) is None:  # a subscription takes a moment to arrive
            number += 1
            client.call("register", worker_id=f"w{number}")
        begun(client)
        heard: list[str] = []
        while "begin" not in heard:
            event = events.next(CALL_SECONDS)
            assert event is not None
            heard.append(event[0])
            assert "secret" not in json.dumps(event[1])
        assert "plan" in heard
        assert stranger.next(0.0) is None, "nobody hears them without the token"


def test_wants_its_token() -> None:
    with running(token="secret") as coordinator:
        for wrong in ("", "other", "secret\udcff"):
            with coordinator.client(token=wrong) as client:
                assert refusal(client, "status") == "Unauthenticated"
        with coordinator.client(token="secret") as client:
            assert client.call("status").result["state"] == "idle"


def test_wants_a_key_that_it_knows(tmp_path: Path) -> None:
    auth.write_keys(tmp_path / "keys")
    auth.write_keys(tmp_path / "other")
    (tmp_path / "other" / "server.key").write_bytes((tmp_path / "keys" / "server.key").read_bytes())
    with running(curve=tmp_path / "keys") as coordinator:
        with coordinator.client(curve=tmp_path / "keys") as client:
            assert client.call("status").result["state"] == "idle"
        for stranger in (None, tmp_path / "other"):
            with coordinator.client(curve=stranger) as client:
                assert refusal(client, "status") == "Unauthenticated"
    with pytest.raises(CallRefused, match="another folder"):
        auth.write_keys(tmp_path / "keys")
    assert (tmp_path / "keys" / "server.key_secret").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "endpoint", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://10.1.2.3:0", "tcp://host.example:0"]
)
def test_binds_nothing_but_loopback_without_protection(endpoint: str) -> None:
    with pytest.raises(CallRefused, match="HOTWEIGHTS_COORD_TOKEN") as caught:
        Server(ServeSettings(endpoint=endpoint, metrics_port=0), MemoryBackend())
    assert caught.value.reason == "Unprotected"
    settings = ServeSettings(endpoint="tcp://127.0.0.1:0", events_endpoint=endpoint, metrics_port=0)
    with pytest.raises(CallRefused, match="HOTWEIGHTS_COORD_TOKEN"):
        Server(settings, MemoryBackend())


def test_names_the_port_that_is_taken(coordinator: Coordinator) -> None:
    with pytest.raises(CallRefused, match=f"{coordinator.endpoint}.*--endpoint"):
        Server(ServeSettings(endpoint=coordinator.endpoint, metrics_port=0), MemoryBackend())
    settings = ServeSettings(endpoint="tcp://127.0.0.1:0", metrics_port=coordinator.metrics_port)
    with pytest.raises(
        CoordinatorError, match=f"{coordinator.metrics_port}.*HOTWEIGHTS_COORD_METRICS_PORT"
    ):
        Server(settings, MemoryBackend())


def test_metrics_tell_what_holds() -> None:
    with running() as coordinator, coordinator.client() as client:
        token = begun(client)
        for name in ("a", "b"):
            client.call("register", worker_id=name, have=[manifest().digest])
        client.call("precommit", worker_id="a", token=token)
        refusal(client, "precommit", worker_id="stranger", token=token)
        wanted = {
            "hotweights_coord_workers 2.0",
            "hotweights_coord_precommit_acks 1.0",
            "hotweights_coord_have 2.0",
            'hotweights_coord_state{state="begun"} 1.0',
            "hotweights_coord_leader 1.0",
            'hotweights_coord_calls_total{method="precommit",result="UnknownWorker"} 1.0',
        }
        while True:
            for name in ("a", "b"):
                client.call("heartbeat", worker_id=name)
            with urllib.request.urlopen(
                f"http://127.0.0.1:{coordinator.metrics_port}/metrics", timeout=10
            ) as page:
                lines = set(page.read().decode().splitlines())
            if wanted <= lines:
                break
        assert any(
            line.startswith("hotweights_coord_token ") and float(line.split()[1]) == token
            for line in lines
        )
        assert any(
            line.startswith('hotweights_coord_call_seconds_bucket{le="0.05",method="begin"}')
            for line in lines
        )


class Failing(MemoryBackend):
    """Writes nothing while told so; ``wrote`` says whether the write had arrived all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None
        self.wrote = False
        self.renew_seconds = 0.05

    async def store(self, durable: CoordinatorState, lease: Lease) -> None:
        if self.error is None or self.wrote:
            await super().store(durable, lease)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [Unavailable("the store is away"), Fenced("another one leads")])
@pytest.mark.parametrize("wrote", [False, True])
def test_what_was_not_written_did_not_happen(error: Exception, wrote: bool) -> None:
    backend = Failing()
    with running(backend) as coordinator, coordinator.client() as client:
        token = begun(client)
        client.call("register", worker_id="a")
        client.call("precommit", worker_id="a", token=token)
        with Subscriber(coordinator.events_endpoint, ["commit"]) as events:
            backend.error, backend.wrote = error, wrote
            if wrote and not isinstance(error, Fenced):  # asked again, it is found to be done
                assert client.call("commit", version="v1").result["state"] == "committed"
            else:
                client.timeout_seconds = 1.0  # what is refused is asked again for so long
                while True:
                    with contextlib.suppress(CoordinatorUnreachable):  # nobody had time to refuse
                        reason = refusal(client, "commit", version="v1")
                        break
                assert reason in ("BackendUnavailable", "NotLeader")
                assert events.next(0.1) is None, "a commit was published that nobody wrote"
        backend.error = None
        client.timeout_seconds = CALL_SECONDS
        assert client.call("status").result["state"] == ("committed" if wrote else "precommitted")
        assert client.call("commit", version="v1", token=token).result["state"] == "committed"


class Slow(MemoryBackend):
    """Writes take as long as the test likes."""

    def __init__(self) -> None:
        super().__init__()
        self.renew_seconds = 0.05
        self.fence = 1
        self.arrived, self.go_on = threading.Event(), threading.Event()
        self.load_seconds = 0.0
        self.go_on.set()

    async def lead(self, instance_id: str, endpoint: str) -> Lease:
        return Lease(mine=True, fence=self.fence, leader=endpoint, until=math.inf)

    async def load(self) -> CoordinatorState | None:
        await asyncio.sleep(self.load_seconds)
        return await super().load()

    async def store(self, durable: CoordinatorState, lease: Lease) -> None:
        await super().store(durable, lease)
        self.arrived.set()
        await asyncio.to_thread(self.go_on.wait)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + CALL_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_calls_of_one_write_are_answered_in_their_order() -> None:
    """So somebody may hear of a state that was never alone in the store, but never of one that did
    not come about.
    """
    backend = Slow()
    with running(backend) as coordinator, coordinator.client() as client:
        token = begun(client)
        client.call("register", worker_id="a")
        with (
            coordinator.client() as other,
            coordinator.client() as third,
            ThreadPoolExecutor(3) as pool,
        ):
            backend.arrived.clear()
            backend.go_on.clear()
            first = pool.submit(client.call, "register", worker_id="a", host="moved")
            assert backend.arrived.wait(CALL_SECONDS)
            waiting = coordinator.server._waiting  # both for their turn, one behind the other
            prepared = pool.submit(other.call, "precommit", worker_id="a", token=token)
            until(lambda: [one.method for one in waiting] == ["precommit"])
            given_up = pool.submit(third.call, "abort", token=token)
            until(lambda: [one.method for one in waiting] == ["precommit", "abort"])
            backend.go_on.set()
            assert first.result().result["state"] == "begun"
            assert prepared.result().result == {"state": "precommitted", "token": token}
            assert given_up.result().result["state"] == "aborted"
        assert client.call("status").result["state"] == "aborted"


def test_a_lease_that_went_and_came_back_during_a_write_is_read_for_before_anybody_is_answered() -> (
    None
):
    backend = Slow()
    with (
        running(backend) as coordinator,
        coordinator.client() as client,
        coordinator.client() as other,
    ):
        begun(client)
        backend.arrived.clear()
        backend.go_on.clear()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(client.call, "register", worker_id="a")
            assert backend.arrived.wait(CALL_SECONDS)
            others = backend._state
            assert others is not None
            backend._state = state.abort(others, "decided by somebody else", 0.0)
            backend.load_seconds, backend.fence = 0.3, 3
            until(lambda: coordinator.server._lease.fence == backend.fence)
            backend.go_on.set()
            assert first.result().result["state"] == "begun", "it was written"
            assert other.call("status").result["state"] == "aborted"
