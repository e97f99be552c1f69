"""Workers as processes: killed, back again, and told to stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.hotweights.worker.conftest import SECONDS, Group

pytestmark = pytest.mark.timeout(300)  # they import everything, one process after the other


@pytest.fixture
def processes() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(
    group: Group, processes: ExitStack, name: str, *arguments: object
) -> subprocess.Popen[str]:
    """One that says that it takes part."""
    command = [
        sys.executable,
        "-m",
        "hotweights.cli",
        "worker",
        "--endpoint",
        group.coordinator.endpoint,
        "--json",
    ]
    command += [
        "--worker-id",
        name,
        "--transport",
        "tcp",
        "--metrics-port",
        "0",
        "--root",
        str(group.sources),
    ]
    command += ["--socket-folder", str(group.folder / name), *map(str, arguments)]
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("HOTWEIGHTS_")
    }
    process = processes.enter_context(
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    )
    processes.callback(process.kill)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["worker_id"] == name
    return process


async def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code, and what it said on standard error."""
    _, said = await asyncio.to_thread(process.communicate, None, SECONDS)
    return process.returncode, said


async def test_a_killed_worker_comes_back_and_follows(group: Group, processes: ExitStack) -> None:
    start(group, processes, "w1")
    killed = start(group, processes, "w2")
    group.version("v1", 1.0)
    await group.rolled_out("v1", 2)
    killed.kill()
    await asyncio.to_thread(killed.wait)
    await group.forgets("w2")
    await group.reaches(lambda status: status["workers"] == ["w1"])
    group.version("v2", 2.0)
    await group.rolled_out("v2", 1)
    start(group, processes, "w2")
    status = await group.reaches(lambda status: status["applied"] == ["w1", "w2"])
    assert status["current"]["version"] == "v2"


async def test_it_ends_when_it_is_told_to(group: Group, processes: ExitStack) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        worker = start(group, processes, "w1")
        await group.reaches(lambda status: status["workers"] == ["w1"])
        worker.send_signal(number)
        assert (await ended(worker))[0] == 0


def test_without_a_coordinator_it_is_one_line_and_exit_code_1(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "hotweights.cli",
        "worker",
        "--endpoint",
        "tcp://127.0.0.1:9",
        "--wait",
        "0.1",
    ]
    command += ["--transport", "tcp", "--metrics-port", "0", "--socket-folder", str(folder)]
    done = subprocess.run(
        command,
        env=os.environ | {"HOTWEIGHTS_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "coord-serve" in done.stderr
    assert float(done.stderr.split("(waited ")[1].split()[0]) >= 0.1
