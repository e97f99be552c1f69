"""What only a wire can do to a peer: strangers who drip, garbage, pullers that do not read, servers
that fall silent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hotweights_common.strangers import REFUSAL_SECONDS, REFUSALS_AT_ONCE
from hotweights_transports.peers import frames
from hotweights_transports.peers.base import (
    AuthenticationUnavailable,
    ClientLimits,
    Identity,
    PeerClient,
    PeerError,
    PeerProtocolError,
    PeerRefused,
    PeerServer,
    PeerTimeout,
    PeerUnreachable,
    ServerLimits,
    Want,
)
from hotweights_transports.peers.frames import HEADER, Header, Kind
from hotweights_transports.peers.registry import resolution, transport_for
from hotweights_transports.peers.stream import address as addresses
from hotweights_transports.peers.stream.server import StreamServer

pytestmark = pytest.mark.timeout(180)  # some make a hundred connections

Node = Any  # conftest's; a conftest is no module to import from
Serve = Callable[..., PeerServer]
Connect = Callable[..., PeerClient]
LONG_SECONDS = 50.0  # as in conftest.py
PATIENT = ClientLimits(connect_seconds=LONG_SECONDS, silence_seconds=LONG_SECONDS)


@pytest.fixture
def scheme() -> str:
    return "tcp"


@pytest.fixture
def node(new_node: Callable[[], Node]) -> Node:
    return new_node()


@pytest.fixture
def digest(node: Node) -> str:
    return str(next(iter(node.manifests)))


def dial(server: PeerServer) -> socket.socket:
    return socket.create_connection(addresses.parse(server.address), timeout=LONG_SECONDS)


def read_all(sock: socket.socket) -> bytes:
    data = b""
    try:
        while piece := sock.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


def test_a_stranger_who_falls_silent_is_cut_off(node: Node, serve: Serve) -> None:
    with closing(dial(serve(node, ServerLimits(handshake_seconds=0.3)))) as sock:
        sock.send(b"H")
        assert read_all(sock) == b""


def test_strangers_who_say_nothing_cost_no_thread(
    node: Node, serve: Serve, connect: Connect, digest: str
) -> None:
    server = serve(node)
    before = set(threading.enumerate())
    with contextlib.ExitStack() as stack:
        for _ in range(32):
            stack.enter_context(closing(dial(server)))
        # it came after them, so they were looked at
        assert connect(server.address).fetch_manifest(digest)
        begun = set(threading.enumerate()) - before
        assert sum(thread.name == "peer connection" for thread in begun) == 1


def test_a_stranger_who_drips_is_cut_off_and_takes_no_room(
    node: Node, serve: Serve, connect: Connect
) -> None:
    server = serve(node, ServerLimits(handshake_seconds=0.5, max_handshakes=3))
    socks = [dial(server) for _ in range(10)]
    hello = frames.hello("good" * 200)
    cut_off = 0
    try:
        for number in range(len(hello)):
            for sock in list(socks):
                try:
                    sock.send(hello[number : number + 1])
                except OSError:
                    socks.remove(sock)
                    sock.close()
                    cut_off += 1
            if not socks:
                break
            time.sleep(0.02)
    finally:
        for sock in socks:
            sock.close()
    assert cut_off == 10
    assert number < len(hello) - 1, "it was let go on to the end"
    assert connect(server.address).fetch_manifest(next(iter(node.manifests)))


def test_silent_strangers_keep_no_puller_out(node: Node, serve: Serve, connect: Connect) -> None:
    server = serve(node, ServerLimits(max_handshakes=8, max_handshakes_of_address=4))
    strangers = []
    try:
        for number in range(52):
            strangers.append(dial(server))  # they come again and again
            strangers[-1].send(b"H")  # or the kernel would keep them to itself
            if number < 32:
                continue
            assert connect(server.address).fetch_manifest(next(iter(node.manifests)))
    finally:
        for sock in strangers:
            sock.close()


def test_tokens_of_one_address_are_reviewed_only_so_often(node: Node, digest: str) -> None:
    reviewed: list[str] = []

    def authenticate(token: str) -> Identity | None:
        reviewed.append(token)
        return Identity("agent") if token == "good" else None

    with StreamServer("tcp://127.0.0.1:0", node, authenticate, ServerLimits()) as server:

        def pull() -> bytes:
            transport = transport_for(server.address)
            with transport.connect(server.address, lambda: "good", PATIENT) as client:
                return client.fetch_manifest(digest)

        assert pull()
        began, answers = time.monotonic(), b""
        for number in range(40):
            with closing(dial(server)) as sock, contextlib.suppress(OSError):
                sock.sendall(frames.hello(f"random {number}"))
                answers += read_all(sock)
        seconds = time.monotonic() - began
        assert b"Busy" in answers
        assert pull(), "it was let in before, and comes from the same address"
    strangers = len(reviewed) - 2
    assert strangers <= REFUSALS_AT_ONCE + 1 + seconds / REFUSAL_SECONDS


def test_one_node_does_not_take_the_places_of_all_pullers(node: Node, digest: str) -> None:
    with (
        StreamServer(
            "tcp://127.0.0.1:0",
            node,
            lambda token: Identity("agent", token),
            ServerLimits(max_connections=6, max_connections_of_node=2),
        ) as server,
        contextlib.ExitStack() as stack,
    ):

        def pull(token: str) -> bytes:
            transport = transport_for(server.address)
            client = transport.connect(server.address, lambda: token, PATIENT)
            return stack.enter_context(client).fetch_manifest(digest)

        assert [pull("node-a"), pull("node-a")] == [node.manifests[digest]] * 2
        with pytest.raises(PeerRefused, match=r"Busy: 2 connections of node-a already"):
            pull("node-a")
        assert pull("node-b")


def test_a_thread_that_does_not_start_costs_one_connection(
    node: Node, serve: Serve, connect: Connect, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(node)
    start = threading.Thread.start
    failed = threading.Event()

    def fail_once(thread: threading.Thread) -> None:
        if thread.name == "peer connection" and not failed.is_set():
            failed.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail_once)
    with pytest.raises(PeerUnreachable):
        connect(server.address).fetch_manifest(digest)
    assert failed.is_set()
    assert server.trouble() == ""
    assert connect(server.address).fetch_manifest(digest)


def test_an_acceptor_that_is_gone_is_told_of(
    node: Node, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(node)

    assert server.trouble() == ""
    ended = threading.Thread()
    ended.start()
    ended.join()
    monkeypatch.setattr(server, "_acceptor", ended)
    assert server.trouble() == f"{server.address} accepts no peers any more"
    server.close()
    assert server.trouble() == "", "it was closed"


@pytest.mark.parametrize(
    ("ours", "theirs", "answer"), [((2, 1), [1], 1), ((2, 1), [1, 2], 2), ((1,), [3, 2, 1], 1)]
)
def test_the_highest_protocol_that_both_speak(
    node: Node,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    ours: tuple[int, ...],
    theirs: list[int],
    answer: int,
) -> None:
    monkeypatch.setattr(frames, "PROTOCOLS", ours)
    payload = json.dumps({"protocols": theirs, "token": "good"}).encode()
    with closing(dial(serve(node))) as sock:
        sock.sendall(Header(Kind.HELLO, len(payload)).encode() + payload)
        header = frames.decode_header(sock.recv(HEADER.size), frames.TO_STRANGER)
        assert header.kind is Kind.WELCOME
        assert frames.read_welcome(sock.recv(header.nbytes)) == answer


def test_a_token_as_large_as_the_moon_is_refused_unread(node: Node, serve: Serve) -> None:
    with closing(dial(serve(node))) as sock:
        sock.sendall(Header(Kind.HELLO, 2**32 - 1).encode())
        answer = read_all(sock)
    assert frames.decode_header(answer[: HEADER.size], frames.TO_STRANGER).kind is Kind.REFUSED
    assert b"at most" in answer


def test_a_request_before_hello_is_refused(node: Node, serve: Serve, digest: str) -> None:
    wants = node.fill(1)
    with closing(dial(serve(node))) as sock:
        sock.sendall(frames.chunks_request(digest, [wants[0].blake3]))
        answer = read_all(sock)
    assert frames.decode_header(answer[: HEADER.size], frames.TO_STRANGER).kind is Kind.REFUSED
    assert node.located == []


def test_an_older_protocol_is_named(node: Node, serve: Serve) -> None:
    with closing(dial(serve(node))) as sock:
        payload = b'{"protocols":[99],"token":"good"}'
        sock.sendall(Header(Kind.HELLO, len(payload)).encode() + payload)
        assert b"ProtocolUnsupported" in read_all(sock)


def test_a_review_that_fails_says_try_again(node: Node, connect: Connect) -> None:
    def authenticate(_token: str) -> Identity | None:
        raise AuthenticationUnavailable("the API server is away")

    with (
        StreamServer("tcp://127.0.0.1:0", node, authenticate, ServerLimits()) as server,
        pytest.raises(
            PeerRefused,
            match=r"AuthenticationUnavailable.*API server is away.*try "
            r"again",
        ),
    ):
        connect(server.address).fetch_manifest(next(iter(node.manifests)))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=100), st.booleans())
def test_garbage_ends_that_connection_only(
    node: Node, fuzzed: PeerServer, garbage: bytes, known: bool
) -> None:
    secret = b"the chunk that nobody has asked for"
    node.add(secret)
    with closing(dial(fuzzed)) as sock:
        if known:
            sock.sendall(frames.hello("good"))
            assert sock.recv(HEADER.size, socket.MSG_WAITALL)[2] == Kind.WELCOME
        sock.sendall(garbage)
        sock.shutdown(socket.SHUT_WR)
        answer = read_all(sock)
    assert secret not in answer
    with transport_for(fuzzed.address).connect(fuzzed.address, lambda: "good", PATIENT) as client:
        assert client.fetch_manifest(next(iter(node.manifests)))


@pytest.fixture
def fuzzed(node: Node, serve: Serve) -> PeerServer:
    return serve(node)


def test_a_puller_that_does_not_read_is_cut_off(node: Node, serve: Serve, digest: str) -> None:
    big = node.add(bytes(32 * 1024 * 1024))
    server = serve(node, ServerLimits(send_seconds=0.3))
    with closing(dial(server)) as sock:
        sock.sendall(frames.hello("good") + frames.chunks_request(digest, [big.blake3]))
        deadline = time.monotonic() + LONG_SECONDS
        while time.monotonic() < deadline and not (node.located and node.leases_out == 0):
            time.sleep(0.01)
        assert (bool(node.located), node.leases_out) == (True, 0)
        assert len(read_all(sock)) < big.nbytes


def test_close_ends_a_connection_that_waits(
    node: Node, serve: Serve, connect: Connect, digest: str
) -> None:
    node.pending.add("0" * 64)
    server = serve(node)
    threading.Timer(0.1, server.close).start()
    with pytest.raises(PeerUnreachable):
        connect(server.address).fetch_chunks(digest, [Want("0" * 64, 5)], node.deliver)


Script = Callable[[socket.socket], None]


@pytest.fixture
def impostor() -> Iterator[Callable[[Script], str]]:
    """A server that says whatever a test wants, after hello."""
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(script: Script) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve() -> None:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with closing(sock):
                sock.settimeout(LONG_SECONDS)
                try:
                    sock.recv(65536)
                    script(sock)
                except OSError:
                    return

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
    for thread in threads:
        thread.join()


def wait_for_its_end(sock: socket.socket) -> None:
    """Silent until the client has gone."""
    read_all(sock)


def test_no_welcome(impostor: Callable[[Script], str], connect: Connect, digest: str) -> None:
    limits = ClientLimits(connect_seconds=0.5)
    with pytest.raises(PeerTimeout, match="no welcome"):
        connect(impostor(wait_for_its_end), limits).fetch_manifest(digest)


def test_a_server_that_falls_silent(
    impostor: Callable[[Script], str], connect: Connect, node: Node, digest: str
) -> None:
    want = node.fill(1)[0]

    def script(sock: socket.socket) -> None:
        sock.sendall(
            frames.welcome(1)
            + Header(Kind.CHUNK, want.nbytes, bytes.fromhex(want.blake3)).encode()
            + b"some"
        )
        wait_for_its_end(sock)

    limits = ClientLimits(streams=1, silence_seconds=0.4)
    with pytest.raises(PeerTimeout, match="not a byte"):
        connect(impostor(script), limits).fetch_chunks(digest, [want], node.deliver)


def test_a_server_that_drips(
    impostor: Callable[[Script], str], connect: Connect, node: Node, digest: str
) -> None:
    want = node.fill(1)[0]

    def script(sock: socket.socket) -> None:
        sock.sendall(
            frames.welcome(1) + Header(Kind.CHUNK, want.nbytes, bytes.fromhex(want.blake3)).encode()
        )
        while True:  # until nobody is there any more
            sock.sendall(b"x")
            time.sleep(0.03)

    limits = ClientLimits(streams=1, floor_bytes_per_second=1000, floor_window_seconds=0.4)
    with pytest.raises(PeerTimeout, match="the floor is"):
        connect(impostor(script), limits).fetch_chunks(digest, [want], node.deliver)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n".ljust(64),
        Header(Kind.HELLO, 0).encode(),
        Header(Kind.MANIFEST_BYTES, 5).encode() + b"bytes",
        Header(Kind.CHUNK, 2**32 - 1).encode(),
        Header(Kind.CHUNK, 3, bytes(32)).encode() + b"abc",
    ],
)
def test_an_answer_that_nobody_asked_for(
    impostor: Callable[[Script], str], connect: Connect, node: Node, digest: str, answer: bytes
) -> None:
    want = node.fill(1)[0]
    address = impostor(lambda sock: sock.sendall(frames.welcome(1) + answer))
    with pytest.raises(PeerProtocolError):
        connect(address, ClientLimits(streams=1)).fetch_chunks(digest, [want], node.deliver)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=100))
def test_any_answer_is_an_error_and_no_chunk(
    impostor: Callable[[Script], str], node: Node, digest: str, answer: bytes
) -> None:
    got: list[Want] = []
    address = impostor(lambda sock: sock.sendall(frames.welcome(1) + answer))
    want = Want("ab" * 32, 50)
    with (
        transport_for(address).connect(address, lambda: "good", ClientLimits(streams=1)) as client,
        pytest.raises(PeerError),
    ):
        client.fetch_chunks(digest, [want], lambda want, _data: got.append(want))
    assert got == []


def test_a_manifest_larger_than_expected_is_refused_before_its_first_byte(
    impostor: Callable[[Script], str], connect: Connect, digest: str
) -> None:
    sent: list[int] = []

    def announce(sock: socket.socket) -> None:
        header = Header(Kind.MANIFEST_BYTES, 512 * 1024 * 1024).encode()
        sock.sendall(frames.welcome(1) + header)
        with contextlib.suppress(OSError):
            while len(sent) < 64:
                sent.append(sock.send(bytes(1 << 20)))

    with pytest.raises(PeerProtocolError, match=r"536870912 bytes; at most 1000 are expected"):
        connect(impostor(announce)).fetch_manifest(digest, 1000)
    assert sum(sent) < 64 << 20


def test_a_kept_connection_that_the_peer_closed_is_replaced(
    node: Node, serve: Serve, connect: Connect, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(node)
    assert isinstance(server, StreamServer)
    client = connect(server.address)
    assert client.fetch_manifest(digest)
    with monkeypatch.context() as soon:  # only after the next one: no request has to come so soon
        soon.setattr(server, "_limits", dataclasses.replace(server._limits, idle_seconds=0.1))
        assert client.fetch_manifest(digest)
        while server._threads:
            time.sleep(0.01)
    assert client.fetch_manifest(digest)


@pytest.mark.parametrize(
    ("uri", "endpoint"),
    [
        ("tcp://10.0.0.7:7441", ("10.0.0.7", 7441)),
        ("tcp://[fd00::1]:80", ("fd00::1", 80)),
        ("tcp://node-a:1", ("node-a", 1)),
    ],
)
def test_addresses(uri: str, endpoint: tuple[str, int]) -> None:
    assert addresses.parse(uri) == endpoint
    assert addresses.form(*endpoint) == uri


@pytest.mark.parametrize(
    "uri",
    [
        "tcp://",
        "tcp://host",
        "tcp://host:99999",
        "tcp://host:x",
        "tcp://h:1/path",
        "http://h:1",
        "tcp://u@h:1",
        "h:1",
    ],
)
def test_what_is_no_address(uri: str) -> None:
    with pytest.raises(ValueError, match="write tcp://host:port"):
        addresses.parse(uri)


def test_the_registry_knows_its_schemes() -> None:
    assert {scheme for scheme, found in resolution().items() if found.works} >= {"tcp", "inproc"}
    with pytest.raises(
        ValueError,
        match=r"no transport for carrier-pigeon; there are \['inproc', "
        r"'tcp'",
    ):
        transport_for("carrier-pigeon://coop")
