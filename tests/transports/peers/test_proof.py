"""A server shows that it is whom the route means before it hears the puller's token; whoever cannot
never hears it.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from hotweights_transports.peers import frames
from hotweights_transports.peers.base import (
    ClientLimits,
    PeerClient,
    PeerError,
    PeerServer,
    PeerTimeout,
    PeerUnproven,
    PeerUnreachable,
)
from hotweights_transports.peers.frames import HEADER, Header, Kind
from hotweights_transports.peers.proof import ServerKey, check
from hotweights_transports.peers.registry import transport_for
from hotweights_transports.peers.stream import address as addresses

Node = Any  # conftest's; a conftest is no module to import from
Serve = Callable[..., PeerServer]
Connect = Callable[..., PeerClient]

NONCE = bytes(range(32))
HERE = "tcp://10.0.0.1:7600"
SECRET = "the token that opens every version"
ANOTHERS = ServerKey().public
LONG_SECONDS = 50.0  # as in conftest.py


@pytest.fixture
def node(new_node: Callable[[], Node]) -> Node:
    return new_node()


@pytest.fixture
def digest(node: Node) -> str:
    return str(next(iter(node.manifests)))


@pytest.fixture
def tokens() -> list[str]:
    """Those that a puller of `pull` was asked for."""
    return []


Pull = Callable[..., bytes]


@pytest.fixture
def pull(digest: str, tokens: list[str]) -> Pull:
    """The manifest from that address, where whoever answers must have that key."""

    def once(address: str, key: str, seconds: float = LONG_SECONDS) -> bytes:
        def token() -> str:
            tokens.append("good")
            return "good"

        limits = ClientLimits(connect_seconds=seconds, silence_seconds=LONG_SECONDS)
        with transport_for(address).connect(address, token, limits, key) as client:
            return client.fetch_manifest(digest)

    return once


class Listener:
    """Somebody at a peer's address who is no peer: it takes all that comes, and answers what it is
    told to.
    """

    def __init__(self, answer: bytes) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.address = addresses.form("127.0.0.1", self._sock.getsockname()[1])
        self._answer = answer
        self.heard = b""
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        sock, _ = self._sock.accept()
        with sock:
            self.heard += sock.recv(65536)
            sock.sendall(self._answer)
            if self._answer:
                sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(65536):
                self.heard += piece

    def all_heard(self) -> bytes:
        """Once the puller has gone."""
        self._thread.join(timeout=LONG_SECONDS)
        assert not self._thread.is_alive()
        return self.heard

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def listener(request: pytest.FixtureRequest) -> Iterator[Listener]:
    with closing(Listener(getattr(request, "param", b""))) as found:
        yield found


def keyed(serve: Serve, node: Node, **more: object) -> tuple[PeerServer, ServerKey]:
    key = ServerKey()
    server = serve(node, prove=key.prove, **more)
    key.serves_at(server.address)
    return server, key


def test_weights_come_from_who_proves_itself(
    node: Node, new_node: Callable[[], Node], digest: str, serve: Serve, connect: Connect
) -> None:
    server, key = keyed(serve, node)
    wants, child = node.fill(20), new_node()
    client = connect(server.address, key=key.public)
    assert client.fetch_manifest(digest) == node.manifests[digest]
    assert client.fetch_chunks(digest, wants, child.deliver) == []
    assert all(child.holds(want) for want in wants)


def test_who_has_another_key_is_not_told_the_token(
    node: Node, serve: Serve, pull: Pull, tokens: list[str]
) -> None:
    server, _ = keyed(serve, node)
    with pytest.raises(PeerUnproven, match="got no token: its signature is not by the key") as told:
        pull(server.address, ANOTHERS)
    assert told.value.reason == "PeerUnproven"
    assert tokens == []


def test_who_is_elsewhere_by_its_own_word_is_not_told_the_token(
    node: Node, serve: Serve, pull: Pull, tokens: list[str]
) -> None:
    """As who passes the challenge on to the right one."""
    key = ServerKey()
    server = serve(node, prove=key.prove)
    key.serves_at(HERE)
    with pytest.raises(PeerUnproven, match=r"got no token: .*(is not at|no key for) "):
        pull(server.address, key.public)
    assert tokens == []


def test_who_has_no_key_is_not_told_the_token(
    node: Node, serve: Serve, pull: Pull, tokens: list[str]
) -> None:
    with pytest.raises(PeerUnproven, match="no key"):
        pull(serve(node).address, ANOTHERS)
    assert tokens == []


@pytest.mark.parametrize("key", ["ed25519:AAAA", "ed25519:!", "rsa:AAAA", "x"])
def test_a_key_that_nobody_knows_is_no_way_around_it(
    node: Node, serve: Serve, pull: Pull, tokens: list[str], key: str
) -> None:
    server, _ = keyed(serve, node)
    with pytest.raises(PeerUnproven, match="is none that this release knows: upgrade this agent"):
        pull(server.address, key)
    assert tokens == []


def test_without_a_key_in_the_route_all_is_as_it_was(
    node: Node, serve: Serve, pull: Pull, tokens: list[str]
) -> None:
    server, _ = keyed(serve, node)
    assert pull(server.address, "")
    assert tokens


@pytest.mark.parametrize(
    ("listener", "error"),
    [
        (b"", PeerTimeout),
        (b"SSH-2.0-OpenSSH_9.2\r\n".ljust(HEADER.size), PeerUnproven),
        (b"x", PeerUnreachable),  # it hangs up in the middle of an answer
        (frames.welcome(1), PeerUnproven),
        (frames.proof(bytes(64)), PeerUnproven),
        (frames.refused("Busy", "try another peer"), PeerUnproven),
        (Header(Kind.PROOF, 1000).encode() + b"[" * 1000, PeerUnproven),
        (Header(Kind.PROOF, 2**32 - 1).encode(), PeerUnproven),
    ],
    indirect=["listener"],
    ids=["silent", "ssh", "hangs up", "welcome", "forged", "refused", "no JSON", "endless"],
)
def test_a_plain_listener_never_gets_the_token(
    listener: Listener, error: type[PeerError], pull: Pull, tokens: list[str]
) -> None:
    with pytest.raises(error):
        pull(listener.address, ANOTHERS, seconds=0.4 if error is PeerTimeout else LONG_SECONDS)
    heard = listener.all_heard()
    # all of it is the challenge
    header = frames.decode_header(heard[: HEADER.size], frames.FROM_STRANGER)
    assert header.kind is Kind.CHALLENGE
    assert len(heard) == HEADER.size + header.nbytes
    assert frames.read_challenge(heard[HEADER.size :]).endpoint == listener.address
    assert tokens == []


def test_a_plain_listener_does_get_it_from_a_route_without_a_key(listener: Listener) -> None:
    """Why routes of agents have one."""
    limits = ClientLimits(connect_seconds=0.4)
    client = transport_for(listener.address).connect(listener.address, lambda: SECRET, limits)
    with client, pytest.raises(PeerTimeout):
        client.fetch_manifest("sha256:" + "a" * 64)
    assert SECRET.encode() in listener.all_heard()


def test_a_proof_is_for_one_nonce_and_one_endpoint() -> None:
    key = ServerKey()
    key.serves_at(HERE)
    key.serves_at("ucx://10.0.0.1:7601")
    signature = key.prove(NONCE, HERE)
    assert signature is not None
    check(HERE, key.public, NONCE, signature)
    for endpoint, nonce in ((HERE, bytes(32)), ("ucx://10.0.0.1:7601", NONCE)):
        with pytest.raises(PeerUnproven):
            check(endpoint, key.public, nonce, signature)
    assert key.prove(NONCE, "tcp://10.0.0.1:76000") is None
    with pytest.raises(ValueError, match="a nonce has 32 bytes"):
        key.prove(NONCE + b"tcp", HERE)


def test_each_process_has_a_key_of_its_own_and_shows_only_half_of_it() -> None:
    key = ServerKey()
    assert key.public != ServerKey().public
    assert key.public.startswith("ed25519:")
    assert len(key.public) == len("ed25519:") + 44


def conversation(server: PeerServer, *said: bytes) -> list[Header]:
    """What the server answers to all of it, frame by frame, until it is done."""
    with closing(socket.create_connection(addresses.parse(server.address), timeout=50)) as sock:
        for data in said:
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    headers: list[Header] = []
    while answer:
        headers.append(frames.decode_header(answer[: HEADER.size], frozenset(Kind)))
        answer = answer[HEADER.size + headers[-1].nbytes :]
    return headers


@pytest.mark.parametrize("scheme", ["tcp"])
def test_an_older_puller_is_let_in_as_before(node: Node, serve: Serve) -> None:
    server, _ = keyed(serve, node)
    payload = b'{"protocols":[1],"token":"good"}'  # word for word what the release before says
    (header,) = conversation(server, Header(Kind.HELLO, len(payload)).encode() + payload)
    assert header.kind is Kind.WELCOME


@pytest.mark.parametrize("scheme", ["tcp"])
def test_an_older_server_gets_no_token_where_the_route_has_a_key(
    node: Node, serve: Serve, pull: Pull, tokens: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "FROM_STRANGER", frozenset({Kind.HELLO}))
    server = serve(node)
    with pytest.raises(PeerUnproven, match="ProtocolError: a CHALLENGE frame has no place here"):
        pull(server.address, ANOTHERS)
    assert tokens == []
    assert pull(server.address, "")  # in a route without one it is a peer like any other


@pytest.mark.parametrize("scheme", ["tcp"])
def test_the_highest_common_protocol_is_spoken_after_a_proof_too(
    node: Node, serve: Serve, pull: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "PROTOCOLS", (1, 2))
    server, key = keyed(serve, node)
    payload = b'{"protocols":[1],"token":"good"}'
    headers = conversation(
        server,
        frames.challenge(NONCE, server.address),
        Header(Kind.HELLO, len(payload)).encode() + payload,
    )
    assert [header.kind for header in headers] == [Kind.PROOF, Kind.WELCOME]
    assert pull(server.address, key.public)


@pytest.mark.parametrize("scheme", ["tcp"])
def test_a_stranger_gets_one_proof_and_nothing_else(node: Node, serve: Serve) -> None:
    server, _ = keyed(serve, node)
    challenge = frames.challenge(NONCE, server.address)
    headers = conversation(server, challenge, challenge)
    assert [header.kind for header in headers] == [Kind.PROOF, Kind.REFUSED]
    headers = conversation(server, challenge, frames.hello("bad"))
    assert [header.kind for header in headers] == [Kind.PROOF, Kind.REFUSED]
    assert node.located == []
