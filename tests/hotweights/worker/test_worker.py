"""Whole workers around a real coordinator: versions, engines, and what goes wrong."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from hotweights.worker.service import WorkerError
from hotweights.worker.sync import HeartbeatTiming
from hotweights_coordinator.wire.messages import CallRefused, CoordinatorUnreachable
from hotweights_transports.handoff import frames
from tests.agent.fake_engine import until
from tests.coordinator.running import lasting_endpoint, running
from tests.hotweights.worker.conftest import PACE, SECONDS, Group, Worker

pytestmark = pytest.mark.timeout(300)


async def test_a_worker_follows_version_after_version(group: Group) -> None:
    await group.worker("w1")
    for number, version in enumerate(("v1", "v2", "v3")):
        group.version(version, float(number))
        status = await group.rolled_out(version, 1)
        assert status["current"]["digest"] == group.plans[version].manifest.digest


async def test_an_engine_prepares_before_the_precommit_and_switches_at_the_commit(
    group: Group,
) -> None:
    worker = await group.worker("w1")
    engine = worker.engine()
    engine.state = "Serving"
    assert isinstance((await engine.start())[0], frames.Welcome)
    plan = group.version("v1", 1.0)
    await group.begin("v1")
    await group.reaches(lambda status: status["state"] == "precommitted")
    assert list(engine.tables) == [plan.manifest.digest]
    assert engine.commits == []
    await group.client.call("commit", version="v1")
    await group.reaches(lambda status: status["applied"] == ["w1"])
    assert [frame.digest for frame in engine.commits] == [plan.manifest.digest]
    await engine.stop()


async def test_several_engines_of_a_host_tell_themselves_apart(group: Group) -> None:
    worker = await group.worker("w1")
    engines = [worker.engine("left"), worker.engine("right")]
    for engine in engines:
        engine.state = "Serving"
        await engine.start()
    group.version("v1", 1.0)
    await group.rolled_out("v1", 1)
    assert [len(engine.commits) for engine in engines] == [1, 1]
    for engine in engines:
        await engine.stop()


async def test_an_engine_that_refuses_aborts_the_update_with_its_words(group: Group) -> None:
    worker = await group.worker("w1")
    engine = worker.engine()
    engine.state, engine.refuses = "Serving", "ShapeMismatch"
    await engine.start()
    group.version("v1", 1.0)
    await group.begin("v1")
    status = await group.reaches(lambda status: status["state"] == "aborted")
    assert "worker w1: ShapeMismatch" in status["reason"]
    assert "the test says so" in status["reason"]
    await engine.stop()


async def test_a_stranger_is_no_engine(group: Group) -> None:
    worker = await group.worker("w1")
    stranger = worker.engine(token="guessed")
    answer = (await stranger.start())[0]
    assert isinstance(answer, frames.Refused)
    assert answer.reason == "TokenInvalid"
    assert worker.running is not None
    assert worker.running.token_file.stat().st_mode & 0o777 == 0o600
    await stranger.stop()


async def test_an_engine_that_comes_late_is_brought_to_what_is_current(group: Group) -> None:
    worker = await group.worker("w1")
    plan = group.version("v1", 1.0)
    await group.rolled_out("v1", 1)
    engine = worker.engine()
    await engine.start()
    await until(lambda: engine.commits, SECONDS)
    assert engine.digest == plan.manifest.digest
    await engine.stop()


async def test_only_one_may_read_the_source_and_all_get_it(group: Group, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    for name in ("a", "z"):  # one before and one after the reader in the coordinator's chain
        await group.worker(name, roots=(nothing,))
    await group.worker("m")
    group.version("v1", 1.0, rows=256)
    status = await group.rolled_out("v1", 3)
    assert status["applied"] == ["a", "m", "z"]


async def test_a_late_worker_gets_it_from_several_donors(group: Group, tmp_path: Path) -> None:
    await group.worker("w1")
    await group.worker("w2")
    group.version("v1", 1.0, rows=256)
    await group.rolled_out("v1", 2)
    (group.sources / "v1").rename(tmp_path / "gone")
    await group.worker("late")
    status = await group.reaches(lambda status: len(status["applied"]) == 3)
    assert "late" in status["applied"]


async def test_a_plan_outside_the_roots_is_refused_with_the_remedy(
    group: Group, tmp_path: Path
) -> None:
    await group.worker("w1", roots=(tmp_path,))
    group.version("v1", 1.0)
    await group.rolled_out("v1", 1)
    await group.workers[0].end()
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    await group.reaches(lambda status: status["workers"] == [])
    await group.worker("w2", roots=(nothing,))
    group.version("v2", 2.0)
    await group.reaches(lambda status: status["workers"] == ["w2"])
    await group.begin("v2")
    status = await group.reaches(lambda status: status["state"] == "aborted")
    assert "SourceNotAllowed" in status["reason"]
    assert "--root" in status["reason"]
    assert status["current"]["version"] == "v1"


async def test_a_coordinator_that_forgot_everything_takes_nothing_from_engines(
    folder: Path, group: Group
) -> None:
    endpoint = lasting_endpoint()
    with ExitStack() as first:
        theirs = Group(first.enter_context(running(endpoint=endpoint)), folder, group.sources)
        worker = await theirs.worker("w1", timing=replace(PACE, call_seconds=0.5))
        engine = worker.engine()
        engine.state = "Serving"
        await engine.start()
        theirs.version("v1", 1.0)
        await theirs.rolled_out("v1", 1)
        await asyncio.to_thread(first.close)
    with running(endpoint=endpoint):
        await theirs.reaches(lambda status: status["workers"] == ["w1"])
        assert len(engine.commits) == 1
        theirs.version("v2", 2.0)
        await theirs.rolled_out("v2", 1)
        assert engine.commits[-1].version == "v2"
        await engine.stop()
        await theirs.close()


async def test_without_a_coordinator_a_worker_gives_up_and_says_so(group: Group) -> None:
    settings = group.settings(
        "w1",
        endpoints="tcp://127.0.0.1:9",
        timing=HeartbeatTiming(call_seconds=0.1, first_seconds=0.1),
    )
    worker = await Worker(settings).start()
    assert worker.task is not None
    with pytest.raises(CoordinatorUnreachable, match="coord-serve"):
        await worker.task


async def test_the_wrong_token_ends_it_at_once(folder: Path, group: Group) -> None:
    with running(token="right") as guarded:
        worker = await Worker(
            group.settings("w1", endpoints=guarded.endpoint, token="wrong")
        ).start()
        assert worker.task is not None
        with pytest.raises(CallRefused, match="not the coordinator's"):
            await worker.task


async def test_workers_know_each_other_by_the_coordinators_token(
    folder: Path, group: Group, tmp_path: Path
) -> None:
    with running(token="right") as guarded:
        theirs = Group(guarded, folder, group.sources, "right")
        nothing = tmp_path / "nothing"
        nothing.mkdir()
        await theirs.worker("w1", token="right")
        await theirs.worker("w2", token="right", roots=(nothing,))
        theirs.version("v1", 1.0)
        await theirs.rolled_out("v1", 2)
        await theirs.close()


async def test_with_once_it_ends_after_one_version(group: Group) -> None:
    worker = await group.worker("w1", once=True)
    group.version("v1", 1.0)
    await group.rolled_out("v1", 1)
    assert worker.task is not None
    await worker.task


async def test_two_workers_do_not_share_a_socket(group: Group, folder: Path) -> None:
    first = await group.worker("w1", folder=folder / "shared")
    second = await Worker(group.settings("w2", folder=folder / "shared")).start()
    assert second.task is not None
    with pytest.raises(WorkerError, match="--socket-folder"):
        await second.task
    third = await group.worker("w3", folder=folder / "shared", folder_is_named=False)
    assert first.running is not None
    assert third.running is not None
    assert third.running.socket != first.running.socket


async def test_nobody_listens_beyond_this_host_without_a_secret(group: Group) -> None:
    worker = await Worker(group.settings("w1", listen="tcp://0.0.0.0:0")).start()
    assert worker.task is not None
    with pytest.raises(WorkerError, match="HOTWEIGHTS_PEER_TOKEN"):
        await worker.task


async def test_workers_that_talk_over_ucx_are_taken_in(group: Group, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    worker = await group.worker("w1", transport="ucx")
    await group.worker("w2", transport="ucx", roots=(nothing,))
    assert worker.running is not None
    assert [endpoint.partition(":")[0] for endpoint in worker.running.endpoints] == ["ucx", "tcp"]
    group.version("v1", 1.0)
    await group.rolled_out("v1", 2)
