"""Workers in this process, around a real coordinator; engines are played."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from hotweights.worker import service
from hotweights.worker.service import Running, WorkerSettings
from hotweights.worker.sync import HeartbeatTiming
from hotweights_agent.settings import EngineSettings, StagingSettings
from hotweights_coordinator.client.client import AsyncClient
from hotweights_planner.plan import Plan
from tests.agent.fake_engine import FakeEngine, until
from tests.coordinator.running import Coordinator, running
from tests.hotweights.checkpoints import checkpoint, plan

SECONDS = 90.0  # whoever imports it has a longer time-out
PACE = HeartbeatTiming(
    beat_seconds=0.1, hurry_seconds=0.01, call_seconds=30.0, away_seconds=0.5, first_seconds=30.0
)
STAGING = StagingSettings(patience_seconds=2.0, reserve_bytes=0)


@dataclass
class Worker:
    """One that runs in the test's loop."""

    settings: WorkerSettings
    once: bool = False
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    running: Running | None = None
    task: asyncio.Task[None] | None = None

    async def start(self) -> Worker:
        def started(found: Running) -> None:
            self.running = found

        run = service.run(self.settings, "test", self.stop, once=self.once, started=started)
        self.task = asyncio.create_task(run)
        await until(lambda: self.running or (self.task and self.task.done()), SECONDS)
        return self

    async def end(self) -> None:
        self.stop.set()
        if self.task is not None:
            await self.task

    def engine(self, name: str = "", token: str = "") -> FakeEngine:
        assert self.running is not None
        token = token or self.running.token_file.read_text().strip()
        return FakeEngine(self.running.socket, f"{token}:{name}" if name else token)


class Group:
    """The coordinator, its workers, and the versions that they are given."""

    def __init__(
        self, coordinator: Coordinator, folder: Path, sources: Path, token: str = ""
    ) -> None:
        self.coordinator = coordinator
        self.folder = folder
        self.sources = sources
        self.client = AsyncClient(coordinator.endpoint, token, timeout_seconds=SECONDS)
        self.workers: list[Worker] = []
        self.plans: dict[str, Plan] = {}

    def settings(self, name: str, **settings: Any) -> WorkerSettings:
        defaults = WorkerSettings(
            self.coordinator.endpoint,
            roots=(self.sources,),
            worker_id=name,
            transport="tcp",
            folder=self.folder / name,
            metrics_port=0,
            memory_bytes=2**28,
            staging=STAGING,
            engines=EngineSettings(reconnect_seconds=0.0),
            timing=PACE,
        )
        return replace(defaults, **settings)

    async def worker(self, name: str, *, once: bool = False, **settings: Any) -> Worker:
        worker = await Worker(self.settings(name, **settings), once).start()
        self.workers.append(worker)
        return worker

    def version(self, version: str, value: float, rows: int = 64) -> Plan:
        manifest = checkpoint(self.sources / version, version, value, rows)
        self.plans[version] = plan(self.sources / version, manifest)
        return self.plans[version]

    async def begin(self, version: str, **args: Any) -> int:
        await self.client.call("submit_plan", binary=self.plans[version].canonical)
        return int((await self.client.call("begin", version=version, **args)).result["token"])

    async def status(self) -> dict[str, Any]:
        return (await self.client.call("status")).result

    async def reaches(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The coordinator's status as soon as something holds of it."""
        deadline = asyncio.get_running_loop().time() + SECONDS
        while not holds(status := await self.status()):
            assert asyncio.get_running_loop().time() < deadline, (
                status["state"],
                status["reason"],
                status["workers"],
            )
            await asyncio.sleep(0.02)
        return status

    async def forgets(self, worker: str) -> None:
        """Of one that ended without a word the coordinator hears nothing more, and drops it; who
        is only slow would be dropped as soon, so only now.
        """
        membership = self.coordinator.server._membership
        ttl_seconds, membership.ttl_seconds = membership.ttl_seconds, 6.0  # it is heard every 5 s
        await self.reaches(lambda status: worker not in status["workers"])
        membership.ttl_seconds = ttl_seconds

    async def rolled_out(self, version: str, workers: int) -> dict[str, Any]:
        """Begun, committed, and applied by so many."""
        await self.reaches(lambda status: len(status["workers"]) >= workers)
        await self.begin(version, commit_when_ready=True)
        return await self.reaches(
            lambda status: served(status) == version and len(status["applied"]) >= workers
        )

    async def close(self) -> None:
        for worker in self.workers:
            with suppress(asyncio.CancelledError):
                await worker.end()
        await self.client.close()


def served(status: dict[str, Any]) -> str:
    """The version that is current."""
    return str(status["current"]["version"]) if status["current"] else ""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, because a unix socket's path is."""
    path = Path(tempfile.mkdtemp(prefix="hw"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def group(folder: Path, tmp_path: Path) -> AsyncIterator[Group]:
    with running() as coordinator:
        sources = tmp_path / "the sources"
        sources.mkdir()
        found = Group(coordinator, folder, sources)
        yield found
        await found.close()
