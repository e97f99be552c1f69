"""What only UCX can do to a peer: a process that dies in the middle of a message, one that hangs,
and what is left behind of both.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from hotweights_transports.peers import frames
from hotweights_transports.peers.base import (
    ClientLimits,
    PeerClient,
    PeerRefused,
    PeerServer,
    PeerTimeout,
    PeerUnreachable,
    ServerLimits,
    Want,
)
from hotweights_transports.peers.frames import HEADER, Header, Kind
from hotweights_transports.peers.registry import resolution
from hotweights_transports.peers.stream import address as addresses
from hotweights_transports.peers.ucx.channel import Channel
from hotweights_transports.peers.ucx.library import describe

Node = Any  # conftest's; a conftest is no module to import from
Serve = Callable[..., PeerServer]
Connect = Callable[..., PeerClient]

CHUNK_NBYTES = 3 * 1024 * 1024
LONG_SECONDS = 50.0  # as in conftest.py
PROCESS_SECONDS = 100.0
DIGEST = "sha256:" + "0" * 64

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def scheme() -> str:
    return "ucx"


@pytest.fixture
def node(new_node: Callable[[], Node]) -> Node:
    return new_node()


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def settles(condition: Callable[[], bool], seconds: float = LONG_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


SERVER = f"""
import mmap, os, random, sys, time
from blake3 import blake3
from hotweights_transports.peers.base import ChunkProvider, Identity, Lease
from hotweights_transports.peers.registry import transport_for

content = bytes({CHUNK_NBYTES})
fd = os.memfd_create("chunk")
os.pwrite(fd, content, 0)

class Endless(ChunkProvider):
    def locate(self, digest):
        return Lease(fd, 0, len(content), lambda: None)
    def manifest(self, digest):
        return b""

server = transport_for("ucx://x:0").listen("ucx://127.0.0.1:0", Endless(), lambda token: Identity("x"))
print(server.address, flush=True)
time.sleep(600)
"""


@pytest.fixture
def other() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves one chunk as often as it is asked for it."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def endlessly() -> Iterator[Want]:
    want = Want(blake3(bytes(CHUNK_NBYTES)).hexdigest(), CHUNK_NBYTES)
    while True:
        yield want


@pytest.mark.parametrize(
    ("sent", "expected"),
    [(signal.SIGKILL, PeerUnreachable), (signal.SIGSTOP, PeerTimeout)],
    ids=["killed", "stopped"],
)
def test_a_process_that_ends_in_the_middle(
    other: tuple[subprocess.Popen[str], str],
    connect: Connect,
    sent: signal.Signals,
    expected: type[Exception],
) -> None:
    process, address = other
    arrived = 0
    sent_at = 0.0

    def deliver(_want: Want, _data: memoryview) -> None:
        nonlocal arrived, sent_at
        arrived += 1
        if arrived == 5:
            os.kill(process.pid, sent)
            sent_at = time.monotonic()

    silence_seconds = 1.0 if expected is PeerTimeout else LONG_SECONDS
    client = connect(address, ClientLimits(streams=1, silence_seconds=silence_seconds))
    while not sent_at:  # more than once where the machine kept them waiting so long before
        with pytest.raises(expected):
            client.fetch_chunks(DIGEST, endlessly(), deliver)
    assert time.monotonic() - sent_at < 30.0


def test_nothing_is_left_of_connections_that_broke(
    node: Node, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    wants = [node.add(os.urandom(CHUNK_NBYTES)) for _ in range(6)]
    digest = next(iter(node.manifests))

    class Enough(Exception):
        pass

    def stop(_want: Want, _data: memoryview) -> None:
        raise Enough

    def interrupt() -> None:
        server = serve(node)
        client = connect(server.address)
        with pytest.raises(Enough):
            client.fetch_chunks(digest, wants, stop)
        client.close()
        server.close()

    def late(channel: Channel) -> None:
        if threading.current_thread().name.startswith("pull"):
            time.sleep(0.6)  # as one that is kept from its processor: the server has closed by then
        closes(channel)

    interrupt()  # what libraries open once
    before = open_fds()
    interrupt()
    closes = Channel.close
    monkeypatch.setattr(Channel, "close", late)
    for _ in range(2):
        interrupt()
    assert settles(lambda: open_fds() <= before)
    assert node.has_all_leases_back()


def test_pieces_are_agreed_on(
    node: Node, new_node: Callable[[], Node], serve: Serve, connect: Connect
) -> None:
    """A limited server sends smaller pieces; a chunk is rarely a multiple of one."""
    child = new_node()
    wants = [
        node.add(os.urandom(nbytes)) for nbytes in (1, 999_999, 1_000_000, 1_000_001, 5_000_000)
    ]
    server = serve(node, ServerLimits(bandwidth_bytes_per_second=30_000_000, waiting_seconds=0.05))
    assert (
        connect(server.address).fetch_chunks(next(iter(node.manifests)), wants, child.deliver) == []
    )
    assert all(child.holds(want) for want in wants)


def greet(server: PeerServer) -> socket.socket:
    address = addresses.parse(server.address, "ucx")
    while True:
        sock = socket.create_connection(address, timeout=LONG_SECONDS)
        sock.sendall(frames.hello("good"))
        if welcome := sock.recv(HEADER.size, socket.MSG_WAITALL):
            assert welcome[2] == Kind.WELCOME
            return sock
        sock.close()  # where a server has little time for a hello, the machine may need it


@pytest.mark.parametrize(
    "greeting",
    [
        Header(Kind.GREETING, 0).encode(),
        Header(Kind.GREETING, 5).encode() + b"short",
        Header(Kind.GREETING, 13).encode() + bytes(13),
        Header(Kind.GREETING, 2**31).encode(),
        Header(Kind.MANIFEST, 2).encode() + b"{}",
    ],
    ids=["empty", "short", "messages of nothing", "too large", "another frame"],
)
def test_no_greeting_no_chunk(node: Node, serve: Serve, connect: Connect, greeting: bytes) -> None:
    server = serve(node)
    with closing(greet(server)) as sock:
        sock.sendall(greeting)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    assert b"ProtocolError" in answer
    assert node.located == []
    assert connect(server.address).fetch_manifest(next(iter(node.manifests)))


def test_a_puller_that_never_greets_is_cut_off(node: Node, serve: Serve) -> None:
    with closing(greet(serve(node, ServerLimits(handshake_seconds=0.3)))) as sock:
        while sock.recv(65536):
            pass


def test_a_tcp_peer_is_no_ucx_peer(node: Node, serve: Serve, connect: Connect) -> None:
    server = serve(node, scheme="tcp")
    address = server.address.replace("tcp:", "ucx:")
    with pytest.raises(PeerRefused, match="no place here"):
        connect(address).fetch_manifest(next(iter(node.manifests)))


INFO = """#
# UCP context
#
#     component 0  :  self
#     component 1  :  tcp
{more}#
#            md 0  :  component 0  self
#
#      resource 0  :  md 0  dev 0  flags -- self/memory
#      resource 1  :  md 1  dev 1  flags -- tcp/eth0
#      resource 2  :  md 1  dev 2  flags -- tcp/lo
"""


def test_it_says_which_networks_are_live() -> None:
    assert describe(INFO.format(more="")).startswith(
        "tcp on eth0 lo only: this libucx has no verbs"
    )
    with_ib = INFO.format(more="#     component 2  :  ib\n")
    assert describe(with_ib).startswith("tcp on eth0 lo only: no RDMA device")
    rdma = with_ib + "#      resource 3  :  md 2  dev 3  flags -- rc_mlx5/mlx5_0:1\n"
    assert describe(rdma) == "rc_mlx5 on mlx5_0:1, tcp on eth0 lo"


def test_the_registry_says_what_ucx_has() -> None:
    found = resolution()["ucx"]
    assert found.works
    assert "UCX 1." in found.because
    assert "tcp on" in found.because


@pytest.mark.parametrize("blocked", ["ucxx", "libucxx"])
def test_without_ucxx_it_says_what_to_install(blocked: str) -> None:
    code = f"""
import sys
sys.modules[{blocked!r}] = None
from hotweights_transports.peers.registry import resolution
found = resolution()
assert found["tcp"].works
print(found["ucx"])
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=PROCESS_SECONDS,
        check=True,
    )
    if blocked == "ucxx":
        assert "works=False" in ran.stdout
        assert "pip install" in ran.stdout


def test_nothing_is_printed_and_nothing_waits_at_the_end() -> None:
    """A process that used both sides and cleaned up nothing ends at once, with its output to
    itself.
    """
    code = """
import hashlib, os
from hotweights_transports.peers.base import ChunkProvider, Identity
from hotweights_transports.peers.registry import transport_for

class Node(ChunkProvider):
    def locate(self, digest):
        return None
    def manifest(self, digest):
        return b"m"

server = transport_for("ucx://x:0").listen("ucx://127.0.0.1:0", Node(), lambda token: Identity("x"))
client = transport_for("ucx://x:0").connect(server.address, lambda: "x")
client.fetch_manifest("sha256:" + hashlib.sha256(b"m").hexdigest())
"""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=PROCESS_SECONDS,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_what_a_user_set_counts() -> None:
    code = (
        "from hotweights_transports.peers.registry import resolution; "
        "print(resolution()['ucx'].because)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "UCX_NET_DEVICES": "lo"},
        capture_output=True,
        text=True,
        timeout=PROCESS_SECONDS,
        check=True,
    )
    assert "tcp on lo only" in ran.stdout
