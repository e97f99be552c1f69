"""Strangers who send nonsense, and what others notice of it.

    python bench/strangers.py [--rounds 8] [--only NAME] [--json FILE]

One process is a node and a coordinator, one is the stranger (at a lower priority, as a pod with CPU
shares of its own would be), and this one does what pods, peers and workers do: pulls chunks, says
hello and is answered, sends heartbeats. Each piece of work is timed alone, beside the stranger, and
beside somebody who takes as much processor time as he did and touches nothing of ours ("the same
load elsewhere"), by turns, so that all see the same machine; the fastest rounds are compared,
because the machine may have other work. Told as well: the processor time that the node took for the
work, which other work on the machine hardly changes, and how much memory was taken meanwhile. It
ends with 1 where the work takes more than a tenth longer than alone (but for a row that is
open), where any of it fails, or where a process grew by more than 64 MiB.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import multiprocessing
import os
import secrets
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from blake3 import blake3

from hotweights_agent.driver import MAX_WAITING_MESSAGES, MESSAGES_AT_ONCE
from hotweights_agent.engines.socket_auth import Unauthenticated
from hotweights_agent.engines.socket_server import EngineServer
from hotweights_agent.node import now
from hotweights_agent.session.messages import Message, Pod
from hotweights_agent.session.session import AgentInfo, Session
from hotweights_coordinator.backends.memory import MemoryBackend
from hotweights_coordinator.client.client import Client
from hotweights_coordinator.server.server import Server
from hotweights_coordinator.server.settings import ServeSettings
from hotweights_coordinator.wire import address as endpoints
from hotweights_storage.slab import sealed_memfd
from hotweights_transports.handoff import frames, sockets
from hotweights_transports.peers import frames as peer_frames
from hotweights_transports.peers.base import (
    ChunkProvider,
    Identity,
    Lease,
    PeerError,
    ServerLimits,
    Want,
)
from hotweights_transports.peers.frames import Header, Kind
from hotweights_transports.peers.registry import transport_for
from hotweights_transports.peers.stream import address as addresses

MOST_RATIO = 1.1
MOST_GROWTH_NBYTES = 64 << 20
MANIFEST_NBYTES = 64 << 20  # what an agent takes from a peer (`stager.MANIFEST_NBYTES`)
TOKEN = "of this installation"
CONTENT = bytes(4 << 20)
WANT = Want(blake3(CONTENT).hexdigest(), len(CONTENT))
VERSION = "sha256:" + "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
CHUNKS = 150  # of one pull
HELLOS = 40
PINGS = 20
HEARTBEATS = 1500
PERIOD_SECONDS = 0.05  # of the strangers: most of them rest for as long


@dataclass(frozen=True)
class Place:
    """Where the node is reached."""

    pid: int
    peers: str
    engines: Path
    coordinator: str


class OneChunk(ChunkProvider):
    def __init__(self) -> None:
        self._slab = sealed_memfd(CONTENT, "strangers")

    def locate(self, blake3: str) -> Lease | None:
        if blake3 != WANT.blake3:
            return None
        return Lease(self._slab.fd, 0, WANT.nbytes, lambda: None, sealed=True)

    def manifest(self, digest: str) -> bytes | None:
        return b"" if digest == VERSION else None


class Doorman:
    """Each token is a pod of its own, but for those that are no pod's."""

    async def authenticate(self, token: str) -> Pod:
        await asyncio.sleep(0.005)  # an API server takes a moment
        if not token.startswith("pod"):
            raise Unauthenticated("TokenInvalid", "no pod's")
        return Pod(token, "ns", token)


def peer(token: str) -> Identity | None:
    if token != TOKEN:
        time.sleep(0.005)
        return None
    return Identity("agent")


def serve(folder: str, to_parent: Connection) -> None:
    asyncio.run(_serve(Path(folder), to_parent))


async def _serve(folder: Path, to_parent: Connection) -> None:
    logging.disable()  # a line for each refusal is not what is measured
    messages: asyncio.Queue[Message] = asyncio.Queue(MAX_WAITING_MESSAGES)
    engines = EngineServer(folder, Doorman(), messages.put)
    await engines.start()
    deciding = asyncio.create_task(_decide(messages))
    settings = ServeSettings(endpoint="tcp://127.0.0.1:0", metrics_port=0, token=TOKEN)
    coordinator = Server(settings, MemoryBackend())
    await coordinator.start()
    transport = transport_for("tcp://127.0.0.1:0")
    with transport.listen("tcp://127.0.0.1:0", OneChunk(), peer, ServerLimits()) as server:
        to_parent.send(
            Place(os.getpid(), server.address, engines.path, coordinator.sockets.endpoint)
        )
        stop = asyncio.Event()
        asyncio.get_running_loop().add_reader(to_parent.fileno(), stop.set)
        await coordinator.run(stop)
    deciding.cancel()
    await engines.close()


async def _decide(messages: asyncio.Queue[Message]) -> None:
    """As `Driver.run`, without effects."""
    session = Session(AgentInfo("bench"))
    while True:
        batch = [await messages.get()]
        while len(batch) < MESSAGES_AT_ONCE and not messages.empty():
            batch.append(messages.get_nowait())
        session.handle_all(batch, now())


# -- the work of others -------------------------------------------------------------------------


def pull(place: Place) -> None:
    """Ten children, one after the other, each with connections of its own."""
    for _ in range(10):
        with transport_for(place.peers).connect(place.peers, lambda: TOKEN) as client:
            missing = client.fetch_chunks(VERSION, [WANT] * (CHUNKS // 10), lambda _w, _d: None)
            if missing:
                raise RuntimeError("a chunk is missing")


def greet(place: Place) -> None:
    """A pod's processes come, are heard, and go."""
    for number in range(HELLOS):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sockets.connect(sock, str(place.engines), 5.0)
            sock.settimeout(5.0)
            sockets.send(sock, frames.Hello(role="rank", token=f"pod-{number}"))
            for ping in range(PINGS):
                frame, _ = sockets.recv(sock)
                if isinstance(frame, frames.Refused):
                    raise ConnectionError(frame.message)
                sockets.send(sock, frames.Ping(ping))


def beat(place: Place) -> None:
    with Client(place.coordinator, TOKEN) as client:
        client.call("register", worker_id="worker")
        for _ in range(HEARTBEATS):
            client.call("heartbeat", worker_id="worker")


# -- strangers: each runs until it is ended -----------------------------------------------------


def silent_peers(place: Place) -> None:
    """32 connections to the peers' port that say nothing, and come again when they are dropped."""
    _come_again(32, lambda: _of_another_pod(place))


def _of_another_pod(place: Place) -> socket.socket:
    return socket.create_connection(addresses.parse(place.peers), 1.0, ("127.0.0.2", 0))


def silent_engines(place: Place) -> None:
    """The same with 64, to the socket of engines."""

    def connect() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(place.engines))
        return sock

    _come_again(64, connect)


def _come_again(count: int, connect: Callable[[], socket.socket]) -> None:
    held: list[socket.socket] = []
    while True:
        for sock in list(held):
            with contextlib.suppress(BlockingIOError):
                if not _read(sock):
                    held.remove(sock)
                    sock.close()
        while len(held) < count:
            try:
                held.append(connect())
            except OSError:
                break
            held[-1].setblocking(False)
        time.sleep(0.05)


def _read(sock: socket.socket) -> bytes:
    try:
        return sock.recv(4096)
    except ConnectionError:
        return b""


def tokens_of_peers(place: Place) -> None:
    """Tokens that nobody gave out, each another one."""
    while True:
        socks = []
        with contextlib.suppress(OSError):
            for _ in range(16):
                socks.append(_of_another_pod(place))
                socks[-1].sendall(peer_frames.hello(secrets.token_hex(400)))
        time.sleep(0.05)
        for sock in socks:
            sock.close()


def one_pod(place: Place) -> None:
    """1000 connections of one pod, all of them API servers that talk as fast as they may."""
    hello = frames.encode(frames.Hello(role="server", token="pod-loud", world_size=4096))
    state = frames.encode(frames.State("Serving", None, 7))
    held: list[socket.socket] = []
    while True:
        while len(held) < 1000:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.settimeout(1.0)
            try:
                sock.connect(str(place.engines))
                sock.send(hello)
            except OSError:
                sock.close()
                break
            sock.setblocking(False)
            held.append(sock)
        for sock in list(held):
            try:
                sock.send(state)
            except BlockingIOError:
                continue
            except OSError:
                held.remove(sock)
                sock.close()
        time.sleep(0.05)


def reconnecting(place: Place) -> None:
    """Connects and goes, without end and without a pause; every other time with a forged token."""
    hello = frames.encode(frames.Hello(role="server", token="forged"))
    while True:
        for first in (b"", hello):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(1.0)
                with contextlib.suppress(OSError):
                    sock.connect(str(place.engines))
                    if first:
                        sock.send(first)


def large_numbers(place: Place) -> None:
    """Tokens of 2^63 and more from a pod that is let in."""
    hello = frames.encode(frames.Hello(role="server", token="pod-large"))
    bad = [b'{"op":"state","state":"Serving","commit_token":%d}' % n for n in (2**63, 10**300)]
    while True:
        for frame in bad:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(1.0)
                with contextlib.suppress(OSError):
                    sock.connect(str(place.engines))
                    sock.send(hello)
                    sock.recv(4096)
                    sock.send(frame)
                    sock.recv(4096)
        time.sleep(0.01)


def endless_message(place: Place) -> None:
    """A message of a coordinator's client that never ends, and commands of 512 MiB."""
    at = endpoints.parse(place.coordinator)
    null, curve = (
        b"\xff" + bytes(8) + b"\x7f\x03\x01" + name.ljust(20, b"\0") + bytes(32)
        for name in (b"NULL", b"CURVE")
    )
    frame = b"\x03" + (1 << 16).to_bytes(8, "big") + bytes(1 << 16)
    opening = {null: b"\x04\x05\x05READY", curve: b"\x06" + (512 << 20).to_bytes(8, "big")}
    while True:
        for greeting, first in opening.items():
            with (
                contextlib.suppress(OSError),
                socket.create_connection((at.bare_host, at.port), 1.0) as sock,
            ):
                sock.sendall(greeting + first)
                for _ in range(16384):  # 1 GiB
                    sock.sendall(frame)
        time.sleep(0.05)


def large_manifests(place: Place) -> None:
    """Says that its manifest has 512 MiB, and sends them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        Path(f"{place.engines}.manifests").write_text(
            f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        )
        while True:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):
                sock.recv(65536)
                header = Header(Kind.MANIFEST_BYTES, 512 << 20).encode()
                sock.sendall(peer_frames.welcome(1) + header)
                for _ in range(512):
                    sock.sendall(bytes(1 << 20))


def pull_with_manifest(place: Place) -> None:
    """As a child whose first parent is that one."""
    rogue = Path(f"{place.engines}.manifests")
    if rogue.exists():
        for _ in range(2):
            address = rogue.read_text()
            with transport_for(address).connect(address, lambda: TOKEN) as client:
                try:
                    client.fetch_manifest(VERSION, MANIFEST_NBYTES)
                except PeerError:
                    continue
                raise RuntimeError("it was taken")
    pull(place)


@dataclass(frozen=True)
class Case:
    stranger: Callable[[Place], None]
    work: Callable[[Place], None]
    open: bool = False  # told and not judged: docs/reliability.md says what is owed


CASES = {
    "32 silent sockets, peers": Case(silent_peers, pull),
    "forged tokens, peers": Case(tokens_of_peers, pull),
    "512 MiB manifests, peers": Case(large_manifests, pull_with_manifest),
    "64 silent connections, engines": Case(silent_engines, greet),
    "1000 connections of one pod": Case(one_pod, greet),
    "one who reconnects without end": Case(reconnecting, greet, open=True),
    "tokens of 2^63, engines": Case(large_numbers, greet),
    "endless multipart, coordinator": Case(endless_message, beat),
}


def elsewhere(share: float, _: Place) -> None:
    """Takes ``share`` of a core, in pieces as short as those of a stranger, and nothing of ours."""
    while True:
        period = time.monotonic() + PERIOD_SECONDS
        until = time.thread_time() + share * PERIOD_SECONDS
        while time.thread_time() < until:
            pass
        time.sleep(max(0.0, period - time.monotonic()))


def _as_stranger(stranger: Callable[[Place], None], place: Place, started: Event) -> None:
    os.nice(10)
    started.set()
    with contextlib.suppress(KeyboardInterrupt):
        stranger(place)


@contextlib.contextmanager
def beside(stranger: Callable[[Place], None], place: Place) -> Iterator[int]:
    """A stranger in a process of its own, whose id is given."""
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=_as_stranger, args=(stranger, place, started), daemon=True)
    process.start()
    started.wait(30.0)
    time.sleep(1.0)  # until all of them have come
    try:
        yield process.pid or 0
    finally:
        process.terminate()
        process.join()
        Path(f"{place.engines}.manifests").unlink(missing_ok=True)
        time.sleep(0.5)  # until the node has noticed


def resident_nbytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """Processor time, user and system, of all threads that a process has and had."""
    # how Linux names the clock of a process's CPU time: clock_getcpuclockid(3)
    return time.clock_gettime(~pid << 3 | 2)


@dataclass
class Rounds:
    """One round's seconds each: of the work, and of processor time that the node took for it."""

    seconds: list[float] = field(default_factory=list)
    node_cpu_seconds: list[float] = field(default_factory=list)


def measure(name: str, case: Case, place: Place, rounds: int) -> dict[str, Any]:
    def timed(into: Rounds) -> float:
        """Seconds that it took."""
        node_began, began = cpu_seconds(place.pid), time.monotonic()
        case.work(place)
        into.seconds.append(time.monotonic() - began)
        into.node_cpu_seconds.append(cpu_seconds(place.pid) - node_began)
        return into.seconds[-1]

    timed(Rounds())  # connections, pages and caches
    before = {pid: resident_nbytes(pid) for pid in (place.pid, os.getpid())}
    growth, failures = 0, []
    alone, crowded, loaded = Rounds(), Rounds(), Rounds()
    shares: list[float] = []  # of a core, that the stranger took
    for _ in range(rounds):
        timed(alone)
        with beside(case.stranger, place) as stranger:
            stranger_began = cpu_seconds(stranger)
            try:
                took_seconds = timed(crowded)
                shares.append((cpu_seconds(stranger) - stranger_began) / took_seconds)
            except (RuntimeError, OSError, PeerError, frames.WireError) as error:
                failures.append(f"{type(error).__name__}: {error}")
            growth = max(growth, *(resident_nbytes(pid) - was for pid, was in before.items()))
        with beside(partial(elsewhere, statistics.median(shares or [0.0])), place):
            timed(loaded)
    found: dict[str, Any] = {
        "case": name,
        "alone_seconds": round(min(alone.seconds), 3),
        "elsewhere_seconds": round(min(loaded.seconds), 3),
        "beside_seconds": None,
        "elsewhere_ratio": round(min(loaded.seconds) / min(alone.seconds), 3),
        "ratio": None,
        "stranger_cpu_share": round(statistics.median(shares), 2) if shares else None,
        "alone_node_cpu_seconds": round(min(alone.node_cpu_seconds), 3),
        "beside_node_cpu_seconds": None,
        "grown_mebibytes": round(growth / 2**20, 1),
        "failures": failures,
    }
    if crowded.seconds:
        found["beside_seconds"] = round(min(crowded.seconds), 3)
        found["ratio"] = round(min(crowded.seconds) / min(alone.seconds), 3)
        found["beside_node_cpu_seconds"] = round(min(crowded.node_cpu_seconds), 3)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory(prefix="hw") as folder:
        node = context.Process(target=serve, args=(folder, theirs), daemon=True)
        node.start()
        place = ours.recv()
        results = []
        for name, case in CASES.items():
            if given.only in name:
                results.append(measure(name, case, place, given.rounds))
                print(json.dumps(results[-1]), flush=True)
        ours.send("enough")
        node.join(10.0)
    if given.json:
        given.json.write_text(json.dumps({"cores": os.cpu_count(), "cases": results}, indent=1))
    bad = [
        result["case"]
        for result in results
        if result["failures"]
        or (result["ratio"] > MOST_RATIO and not CASES[result["case"]].open)
        or result["grown_mebibytes"] * 2**20 > MOST_GROWTH_NBYTES
    ]
    print(f"not so: {', '.join(bad)}" if bad else "others went on within a tenth of their time")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
