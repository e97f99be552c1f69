"""The adapters for those who have no cluster, on real engines: a program that called
`install_autobind` follows a coordinator, and the extension updates a model inside vLLM's worker and
outside of vLLM.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from e2e.engine.conftest import SABOTAGE, checkpoint, golden, told_apart
from e2e.engine.images import Tensor
from e2e.engine.launch import VLLM
from e2e.engine.seed_world import (
    ROOT,
    Coordinator,
    Program,
    environment,
    plan_of,
    rewritten,
    run_inside,
)

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True, scope="module")
def two_versions() -> None:
    told_apart(old(), new())


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    started = Coordinator()
    yield started
    started.stop()


@pytest.fixture
def program(tmp_path: Path, coordinator: Coordinator) -> Iterator[Callable[..., Program]]:
    """Starts one that has an engine with the old weights; says its last words if a test failed."""
    started: list[Program] = []

    def start(kind: str, autobind: dict[str, Any] | None = None, **values: str) -> Program:
        folder = tmp_path / f"program-{len(started)}"
        folder.mkdir()
        arguments = {
            "endpoint": coordinator.endpoint,
            "roots": ["/"],
            "poll_interval": 0.5,
            **(autobind or {}),
        }
        asked = {"kind": kind, "model": str(old()), "autobind": arguments}
        started.append(Program(folder, asked, **values))
        assert started[-1].line() == {"bound": True}
        assert started[-1].line() == {"ready": True}
        return started[-1]

    yield start
    for one in started:
        print(f"--- {one.log}\n{one.tail()}")
        one.stop()


def old() -> Path:
    return checkpoint("llama", 0, shards=3)


def new() -> Path:
    return checkpoint("llama", 1, shards=2)


def serves(program: Program, model: Path) -> bool:
    """What a cold load of that checkpoint answers."""
    return answers(program.ask, model)


def answers(ask: Callable[[Sequence[int], int], list[int]], model: Path) -> bool:
    return all(
        ask(probe["promptTokenIds"], len(probe["tokenIds"])) == probe["tokenIds"]
        for probe in golden(model)
    )


@contextmanager
def worker_of_the_host(coordinator: Coordinator, folder: Path) -> Iterator[None]:
    """A `hotweights worker` whose engines connect in ``folder``."""
    command = [sys.executable, "-m", "hotweights.cli", "worker", "--endpoint", coordinator.endpoint]
    command += ["--root", "/", "--socket-folder", str(folder)]
    worker = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "HOTWEIGHTS_METRICS_PORT": "0"})
    try:
        coordinator.until((folder / "engine.token").is_file, 180.0)
        yield
    finally:
        worker.terminate()
        worker.wait(60)


def roll_out(coordinator: Coordinator, folder: Path, version: str) -> None:
    """Begin, wait until the engine is ready, commit, wait until it says that it serves it."""
    coordinator.begin(plan_of(folder, version))
    coordinator.until_state("precommitted", 300.0)
    coordinator.commit(version)
    coordinator.until(lambda: (coordinator.status() or {})["applied"], 300.0)


def test_an_llm_follows_the_coordinator_and_refuses_what_does_not_fit(
    coordinator: Coordinator, program: Callable[..., Program], tmp_path: Path
) -> None:
    engine = program("llm")
    assert serves(engine, old())
    coordinator.until(lambda: (coordinator.status() or {})["workers"])
    # Nobody serves what was only prepared.
    coordinator.begin(plan_of(new(), "v1"))
    coordinator.until_state("precommitted", 300.0)
    assert serves(engine, old())
    coordinator.commit("v1")
    coordinator.until(lambda: (coordinator.status() or {})["applied"], 300.0)
    assert serves(engine, new())
    # A version that lacks a tensor: the attempt is aborted with the engine's words, and what was
    # served goes on.
    lacking = rewritten(
        old(), tmp_path / "lacking", lambda t: None if t.name == "model.norm.weight" else t
    )
    coordinator.begin(plan_of(lacking, "v2"))
    status = coordinator.until_state("aborted", 300.0)
    assert "model.norm.weight" in status["reason"]
    assert status["current"]["version"] == "v1"
    assert serves(engine, new())
    # And back.
    roll_out(coordinator, old(), "v3")
    assert serves(engine, old())


def test_an_async_engine_follows_under_other_names(
    coordinator: Coordinator, program: Callable[..., Program], tmp_path: Path
) -> None:
    def slashed(tensor: Tensor) -> Tensor:
        return dataclasses.replace(tensor, name=tensor.name.replace(".", "/"))

    engine = program("async", {"slashes": True})
    assert serves(engine, old())
    roll_out(coordinator, rewritten(new(), tmp_path / "slashed", slashed), "v1")
    assert serves(engine, new())


def test_an_engine_in_the_callers_own_process_follows_too(
    coordinator: Coordinator, program: Callable[..., Program]
) -> None:
    engine = program("llm", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert serves(engine, old())
    roll_out(coordinator, new(), "v1")
    assert serves(engine, new())


def test_a_switch_that_breaks_is_undone_and_said_and_a_lost_engine_serves_nobody(
    coordinator: Coordinator, program: Callable[..., Program], tmp_path: Path
) -> None:
    order = tmp_path / "sabotage"
    paths = os.pathsep.join([environment()["PYTHONPATH"], str(SABOTAGE)])
    engine = program(
        "llm", PYTHONPATH=paths, HOTWEIGHTS_SABOTAGE=str(order), HOTWEIGHTS_REPAIR_SECONDS="60"
    )

    def failure() -> str:
        workers = coordinator.client.call("list_workers").result["workers"]
        said = [worker["failure"] or {} for worker in workers]  # none, where it was silent for long
        return "".join(str(failure.get("message", "")) for failure in said)

    # Half of a version was copied: the engine goes back to what it served, and says so.
    coordinator.begin(plan_of(new(), "v1"))
    coordinator.until_state("precommitted", 300.0)
    order.write_text("half")
    coordinator.commit("v1")
    coordinator.until(lambda: "sabotage: half" in failure(), 300.0)
    assert serves(engine, old())
    assert (coordinator.status() or {})["applied"] == []
    # There is no way back: whoever asks is told.
    coordinator.begin(plan_of(checkpoint("llama", 2), "v2"))
    coordinator.until_state("precommitted", 300.0)
    order.write_text("always")
    coordinator.commit("v2")
    coordinator.until(lambda: "is given up" in engine.log.read_text(errors="replace"), 300.0)
    with pytest.raises(RuntimeError, match="it ended with 1"):
        engine.ask([1, 2, 3], 2)
    assert "EngineDeadError" in engine.log.read_text(errors="replace")
    assert (coordinator.status() or {})["applied"] == []


def test_the_hosts_worker_can_stage_for_the_process(
    coordinator: Coordinator, program: Callable[..., Program], tmp_path: Path
) -> None:
    folder = tmp_path / "w"
    with worker_of_the_host(coordinator, folder):
        engine = program(
            "llm", HOTWEIGHTS_USE_IPC_AGENT="1", HOTWEIGHTS_SOCKET=str(folder / "agent.sock")
        )
        assert serves(engine, old())
        roll_out(coordinator, new(), "v1")
        assert serves(engine, new())


def test_a_vllm_server_follows_the_hosts_worker(coordinator: Coordinator, tmp_path: Path) -> None:
    folder = tmp_path / "w"
    token = {"HOTWEIGHTS_TOKEN_FILE": str(folder / "engine.token")}
    with worker_of_the_host(coordinator, folder):
        engine = VLLM(old(), tmp_path / "vllm", folder / "agent.sock", environment=token)
        try:
            engine.ready()  # nothing is current yet: it is told to keep what it booted
            assert answers(engine.complete, old())
            roll_out(coordinator, new(), "v1")
            assert answers(engine.complete, new())
        except BaseException:
            print(engine.tail())
            raise
        finally:
            engine.stop()


def test_the_extension_runs_inside_a_vllm_worker(tmp_path: Path) -> None:
    arguments = ["--model", str(old()), "--next", str(new())]
    output = run_inside(tmp_path, EXAMPLES / "vllm_extension_register.py", *arguments)
    assert f"Before: {golden(old())[0]['tokenIds'][:8]}" in output
    assert "Rank 0 applied: next" in output
    assert f"After:  {golden(new())[0]['tokenIds'][:8]}" in output


def test_the_smoke_demo_says_what_it_compared(tmp_path: Path, coordinator: Coordinator) -> None:
    for arguments in ([], ["--use-coord", "--endpoint", coordinator.endpoint]):
        output = run_inside(tmp_path, EXAMPLES / "vllm_smoke_demo.py", *arguments)
        assert output.splitlines()[-1] == "Applied weights match expected: True"
