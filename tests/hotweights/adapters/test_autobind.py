"""What `install_autobind` puts beside the engines of a process: a node that takes part while they
are there, and only when all are.

The coordinator and the node are real, the engine speaks the wire; real engines are in e2e.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from hotweights.adapters.inprocess.embedded_node import EmbeddedNode, EmbeddedNodeSettings
from hotweights.adapters.inprocess.metrics import BinderMetrics
from hotweights.adapters.vllm_auto import install_autobind
from hotweights_planner.plan import Plan
from hotweights_transports.handoff import frames
from tests.agent.fake_engine import FakeEngine
from tests.coordinator.running import running
from tests.hotweights.checkpoints import checkpoint, plan

SECONDS = 30.0
pytestmark = pytest.mark.timeout(120)


class World:
    """A coordinator, and rooms for engines."""

    def __init__(self, endpoint: str, client: Any, folder: Path) -> None:
        self.endpoint, self.client, self.folder = endpoint, client, folder
        self.rooms: list[EmbeddedNode] = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    async def room(self, **values: Any) -> EmbeddedNode:
        settings = EmbeddedNodeSettings(
            self.endpoint, roots=(self.folder,), worker_id="vllm", beat_seconds=0.1, **values
        )
        self.rooms.append(await asyncio.to_thread(EmbeddedNode, self.folder, self.loop, settings))
        return self.rooms[-1]

    async def call(self, method: str, **values: Any) -> dict[str, Any]:
        reply = await asyncio.to_thread(self.client.call, method, **values)
        return dict(reply.result)

    async def begin(self, wanted: Plan) -> None:
        await self.call("submit_plan", binary=wanted.canonical)
        await self.call("begin", version=wanted.version)

    async def until(self, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        deadline = asyncio.get_running_loop().time() + SECONDS
        while not condition(status := await self.call("status")):
            assert asyncio.get_running_loop().time() < deadline, status
            await asyncio.sleep(0.02)
        return status

    def version(self, name: str, value: float) -> Plan:
        folder = self.folder / name
        return plan(folder, checkpoint(folder, name, value))

    async def end(self) -> None:
        for room in self.rooms:
            await asyncio.to_thread(room.close)
        self.loop.call_soon_threadsafe(self.loop.stop)
        await asyncio.to_thread(self.thread.join)
        self.loop.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    with running() as served, served.client() as client:
        made = World(served.endpoint, client, tmp_path)
        yield made
        await made.end()


async def test_it_is_ready_and_has_applied_only_with_its_engine(world: World) -> None:
    room = await world.room()
    wanted = world.version("v1", 1.0)
    await world.begin(wanted)
    assert (await world.call("status"))["workers"] == []  # no engine was constructed yet
    room.wait_until_connected(1)
    await world.until(lambda status: status["workers"] == ["vllm"])
    await world.until(
        lambda status: status["state"] == "begun" and status["waiting_for"] == ["vllm"]
    )
    engine = FakeEngine(room.socket, f"{room.token()}:engine-1", state="Serving")
    try:
        await engine.start()
        await world.until(lambda status: status["state"] == "precommitted")
        assert engine.commits == []
        await world.call("commit", version="v1")
        await world.until(lambda status: status["applied"] == ["vllm"])
        assert [commit.digest for commit in engine.commits] == [wanted.manifest.digest]
        assert engine.keeps == 0
    finally:
        await engine.stop()


async def test_a_stranger_does_not_get_in(world: World) -> None:
    room = await world.room()
    engine = FakeEngine(room.socket, "guessed", state="Serving")
    try:
        (answer, _) = await engine.start()
        assert isinstance(answer, frames.Refused)
    finally:
        await engine.stop()


async def test_what_the_engine_refuses_aborts_the_attempt(world: World) -> None:
    room = await world.room()
    engine = FakeEngine(
        room.socket, f"{room.token()}:engine-1", state="Serving", refuses="ShapeMismatch"
    )
    try:
        await engine.start()
        room.wait_until_connected(1)
        await world.begin(world.version("v1", 1.0))
        status = await world.until(lambda status: status["state"] == "aborted")
        assert "the test says so" in status["reason"]
        assert status["applied"] == []
        assert engine.commits == []
    finally:
        await engine.stop()


def shouted(document: dict[str, Any]) -> dict[str, str]:
    return {
        item["key"]: item["tensor"].upper()
        for bucket in document["buckets"]
        for item in bucket["items"]
    }


async def test_the_engine_gets_the_names_that_the_map_says(world: World) -> None:
    room = await world.room(name_map=shouted)
    engine = FakeEngine(room.socket, f"{room.token()}:engine-1", state="Serving")
    try:
        await engine.start()
        room.wait_until_connected(1)
        await world.begin(world.version("v1", 1.0))
        await world.until(lambda status: status["state"] == "precommitted")
        (table,) = engine.tables.values()
        assert [tensor["name"] for tensor in table["tensors"]] == ["BODY", "HEAD"]  # type: ignore[attr-defined]
    finally:
        await engine.stop()


async def test_a_map_that_cannot_be_meant_aborts_the_attempt(world: World) -> None:
    def broken(document: dict[str, Any]) -> dict[str, str]:
        raise KeyError("layers")

    room = await world.room(name_map=broken)
    engine = FakeEngine(room.socket, f"{room.token()}:engine-1", state="Serving")
    try:
        await engine.start()
        room.wait_until_connected(1)
        await world.begin(world.version("v1", 1.0))
        status = await world.until(lambda status: status["state"] == "aborted")
        assert "layers" in status["reason"]
        assert engine.tables == {}
    finally:
        await engine.stop()


async def test_a_lost_engine_holds_the_commit_up(world: World) -> None:
    room = await world.room()
    engine = FakeEngine(room.socket, f"{room.token()}:engine-1", state="Serving")
    await engine.start()
    room.wait_until_connected(1)
    await world.until(lambda status: status["workers"] == ["vllm"])
    await engine.stop()
    await world.begin(world.version("v1", 1.0))
    await world.until(
        lambda status: status["state"] == "begun" and status["waiting_for"] == ["vllm"]
    )
    back = FakeEngine(room.socket, f"{room.token()}:engine-1", state="Serving")
    try:
        await back.start()
        await world.until(lambda status: status["state"] == "precommitted")
    finally:
        await back.stop()


def test_without_vllm_nothing_is_bound_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert (
        install_autobind(
            None, endpoint="tcp://127.0.0.1:1", use_mpi=True, pinned=True, device="cuda"
        )
        is False
    )
    assert "vLLM cannot be imported" in caplog.text


def test_metrics_count_what_engines_confirmed() -> None:
    metrics = BinderMetrics()
    metrics.note(frames.Committed(1, "sha256:1", 7, 0.25))
    metrics.note(frames.CommitFailed(2, "sha256:2", 8, "Busy", ""))

    def sample(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    assert sample("hotweights_binder_updates_total", result="committed") == 1
    assert sample("hotweights_binder_updates_total", result="failed") == 1
    assert sample("hotweights_binder_last_pause_seconds") == 0.25
    assert sample("hotweights_binder_current_version_info", digest="sha256:1", token="7") == 1
