"""A node that serves chunks, without a store: a memfd, a table, and switches for what may go
wrong.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
from blake3 import blake3

from hotweights_planner.manifest import Chunk
from hotweights_storage.errors import ChecksumMismatch
from hotweights_transports.peers.base import (
    ChunkProvider,
    ClientLimits,
    Identity,
    Lease,
    PeerClient,
    PeerServer,
    Pending,
    Prove,
    ServerLimits,
    Want,
)
from hotweights_transports.peers.registry import transport_for

TOKEN = "good"
LONG_SECONDS = 50.0
"""For what comes about at once where nothing else runs. A busy machine may keep a process waiting for
seconds; a test that nothing happens in any more ends a little later.
"""
MANIFEST = b'{"a":"manifest"}'
DIGEST = f"sha256:{hashlib.sha256(MANIFEST).hexdigest()}"


class Node(ChunkProvider):
    """Has some chunks, waits for others."""

    def __init__(self) -> None:
        self.manifests: dict[str, bytes] = {DIGEST: MANIFEST}
        self.answers: dict[str, bytes] = {}
        self.guests: list[Identity] = []
        self.pending: set[str] = set()
        self.leases_out = 0
        self.located: list[str] = []
        self.fd = os.memfd_create("test")
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        self._changed = threading.Condition()

    def add(self, data: bytes, blake3_hex: str = "") -> Want:
        """Hold `data`, under another's digest if one is given."""
        want = Want(blake3_hex or blake3(data).hexdigest(), len(data))
        os.pwrite(self.fd, data, self._end)
        with self._changed:
            self._places[want.blake3] = (self._end, len(data))
            self._end += -(-len(data) // 4096) * 4096
            self.pending.discard(want.blake3)
            self._changed.notify_all()
        return want

    def fill(self, count: int, nbytes: int = 5000, seed: int = 1) -> list[Want]:
        return [
            self.add(random.Random(seed * 1000 + number).randbytes(nbytes))
            for number in range(count)
        ]

    def give_up(self, blake3_hex: str) -> None:
        with self._changed:
            self.pending.discard(blake3_hex)
            self._changed.notify_all()

    def deliver(self, want: Want, data: memoryview) -> None:
        """What an image does: verify, then hold."""
        found = blake3(data).hexdigest()
        if found != want.blake3:
            raise ChecksumMismatch("peer", Chunk(want.blake3, want.nbytes, "file", 0, "tensor", 0))
        self.add(bytes(data))

    def holds(self, want: Want) -> bool:
        return want.blake3 in self._places

    def locate(self, blake3: str) -> Lease | Pending | None:
        with self._changed:
            self.located.append(blake3)
            if blake3 in self._places:
                offset, nbytes = self._places[blake3]
                self.leases_out += 1
                return Lease(
                    self.fd, offset, nbytes, self._released, sealed=len(self.located) % 2 == 0
                )  # both, in turn
            if blake3 in self.pending:
                return Pending(lambda seconds: self._wait(blake3, seconds))
            return None

    def manifest(self, digest: str) -> bytes | None:
        return self.manifests.get(digest)

    def answer(self, group: str, guest: Identity) -> bytes | None:
        self.guests.append(guest)
        return self.answers.get(group)

    def _wait(self, blake3_hex: str, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: blake3_hex not in self.pending, seconds)

    def has_all_leases_back(self) -> bool:
        """Whether every lease comes back: the server's thread gives it back a moment after the
        client has its answer.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self.leases_out == 0, LONG_SECONDS)

    def _released(self) -> None:
        with self._changed:
            self.leases_out -= 1
            self._changed.notify_all()


def authenticate(token: str) -> Identity | None:
    return Identity("system:serviceaccount:hotweights:agent") if token == TOKEN else None


Serve = Callable[..., PeerServer]
Connect = Callable[..., PeerClient]
LONGER = {
    *("connect_seconds", "silence_seconds", "stall_seconds", "floor_window_seconds"),
    *("handshake_seconds", "request_seconds", "send_seconds"),
}
Limits = TypeVar("Limits", ClientLimits, ServerLimits)


def patient(limits: Limits) -> Limits:
    """Those limits, and longer ones than production's where a test sets none: only what it set may
    run out.
    """
    usual = type(limits)()
    longer: dict[str, Any] = {
        field.name: LONG_SECONDS
        for field in dataclasses.fields(limits)
        if field.name in LONGER and getattr(limits, field.name) == getattr(usual, field.name)
    }
    return dataclasses.replace(limits, **longer)


@pytest.fixture(params=["inproc", "tcp", "ucx"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def new_node() -> Iterator[Callable[[], Node]]:
    nodes: list[Node] = []

    def make() -> Node:
        nodes.append(Node())
        return nodes[-1]

    yield make
    for node in nodes:
        os.close(node.fd)


@pytest.fixture
def serve(scheme: str) -> Iterator[Serve]:
    servers: list[PeerServer] = []

    def start(
        node: ChunkProvider,
        limits: ServerLimits | None = None,
        scheme: str = scheme,
        prove: Prove | None = None,
    ) -> PeerServer:
        uri = f"inproc://node-{len(servers)}" if scheme == "inproc" else f"{scheme}://127.0.0.1:0"
        limits = patient(limits or ServerLimits(waiting_seconds=0.05))
        servers.append(transport_for(uri).listen(uri, node, authenticate, limits, prove))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def connect() -> Iterator[Connect]:
    clients: list[PeerClient] = []

    def start(
        address: str, limits: ClientLimits | None = None, token: str = TOKEN, key: str = ""
    ) -> PeerClient:
        limits = patient(limits or ClientLimits())
        clients.append(transport_for(address).connect(address, lambda: token, limits, key))
        return clients[-1]

    yield start
    for client in clients:
        client.close()
