"""A real coordinator at a free port, in a thread of this process, and the plans that it is
given.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hotweights_coordinator.backends.base import Backend
from hotweights_coordinator.backends.memory import MemoryBackend
from hotweights_coordinator.client.client import Client
from hotweights_coordinator.server.server import Server
from hotweights_coordinator.server.settings import ServeSettings
from hotweights_planner.header import TensorEntry
from hotweights_planner.manifest import Manifest, build
from hotweights_planner.plan import Plan
from hotweights_planner.plan import build as build_plan
from tests.ports import free_ports

START_SECONDS = 50.0
CALL_SECONDS = 50.0  # as long as a busy machine may need for what is answered at once
LOOK_SECONDS = 0.05


class Coordinator:
    """One that runs."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.loop = loop
        self.endpoint = server.sockets.endpoint
        self.events_endpoint = server.sockets.events_endpoint
        self.metrics_port = server.web.port

    def client(
        self, token: str = "", curve: Path | None = None, timeout_seconds: float = CALL_SECONDS
    ) -> Client:
        return Client(self.endpoint, token, curve, timeout_seconds=timeout_seconds)

    def fell_silent(self, worker_id: str) -> None:
        """As if that worker had been heard for the last time long ago: a TTL that is short enough to
        be waited for would be over for others too where the machine keeps them waiting.
        """

        def age() -> None:
            self.server._membership._seen[worker_id] -= 2 * self.server.settings.worker_ttl_seconds

        self.loop.call_soon_threadsafe(age)


@contextmanager
def running(backend: Backend | None = None, **settings: Any) -> Iterator[Coordinator]:
    """Serves until the block ends, and has then let go of everything."""
    started: list[Coordinator | BaseException] = []
    ready, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        defaults: dict[str, Any] = {
            "endpoint": "tcp://127.0.0.1:0",
            "metrics_port": 0,
            "instance_id": "test",
        }
        server = Server(ServeSettings(**(defaults | settings)), backend or MemoryBackend())
        # so that nobody waits for that: who is silent, and what is past its deadline
        server._look_seconds = min(server._look_seconds, LOOK_SECONDS)
        await server.start()
        started.append(Coordinator(server, asyncio.get_running_loop()))
        ready.set()
        await server.run(stop)

    def work() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            started.append(error)
            ready.set()
            raise

    thread = threading.Thread(target=work, name="coordinator")
    thread.start()
    if not ready.wait(START_SECONDS):
        raise TimeoutError("the coordinator does not start")
    found = started[0]
    if isinstance(found, BaseException):
        thread.join()
        raise found
    try:
        yield found
    finally:
        found.loop.call_soon_threadsafe(stop.set)
        thread.join()


def lasting_endpoint() -> str:
    """For one that comes back to where it was. Of the ports that the system deals out, another
    process may have the next one, that of the events, or get either while nobody listens.
    """
    return f"tcp://127.0.0.1:{free_ports(2)[0]}"


def manifest(version: str = "v1", tensors: int = 1, model: str = "m") -> Manifest:
    """Tensors of four bytes each."""
    entries = [TensorEntry(f"t{n}", "F32", (1,), 4, 8 + 4 * n) for n in range(tensors)]
    chunks = {
        entry.name: [hashlib.sha256(f"{version}/{entry.name}".encode()).hexdigest()]
        for entry in entries
    }
    return build(model, version, {"model.safetensors": entries}, chunks)


def plan(version: str = "v1", tensors: int = 1, model: str = "m") -> Plan:
    """From nothing to that version."""
    return build_plan(manifest(version, tensors, model), None, f"file:///weights/{version}")


def begun(client: Client, version: str = "v1", **args: Any) -> int:
    """Submit a plan of that version and begin it."""
    client.call("submit_plan", binary=plan(version).canonical)
    token: int = client.call("begin", version=version, **args).result["token"]
    return token
