"""One plan on one host: staged, verified, committed, and what goes wrong on the way."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from hotweights.commands import replicate as replication
from hotweights.replicate import version_store as depots
from hotweights.replicate.version_store import VersionStore
from hotweights_planner.manifest import FILE_NAME
from tests.coordinator.running import running
from tests.hotweights.checkpoints import checkpoint, plan
from tests.hotweights.command_line import Run

MOST_SECONDS = 120
pytestmark = pytest.mark.timeout(300)  # some start processes, one after the other


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where two versions lie, in a folder with a blank in its name; the current one."""
    folder = tmp_path / "my models"
    old = checkpoint(folder / "v 0", "v0", 1.0)
    new = checkpoint(folder / "v 1", "v1", 2.0)
    (folder / "plan0.json").write_bytes(plan(folder / "v 0", old).canonical)
    (folder / "plan1.json").write_bytes(plan(folder / "v 1", new, old).canonical)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOTWEIGHTS_HOME", str(tmp_path / "home"))
    for name in ("HOTWEIGHTS_COORD", "WORLD_SIZE", "RANK", "HOTWEIGHTS_ROOTS"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def replicate(run: Run, *arguments: object) -> dict[str, object]:
    done = run("replicate", "--metrics-port", 0, "--json", *arguments)
    assert done.returncode == 0, done
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.usefixtures("folder")
def test_it_says_what_it_measured(run: Run) -> None:
    done = run("replicate", "--plan", "plan1.json", "--verify", "--metrics-port", 0)
    assert done.returncode == 0
    assert "GB/s" in done.stdout
    assert "read again and equal" in done.stdout


def test_a_commit_puts_the_same_files_in_place(folder: Path, home: Path, run: Run) -> None:
    shown = replicate(run, "--plan", "plan0.json", "--verify", "--commit")
    assert shown["committed"] == str((home / "current").resolve())
    for name in ("model.safetensors", "config.json", FILE_NAME):
        assert (home / "current" / name).read_bytes() == (folder / "v 0" / name).read_bytes()
    assert json.loads((home / "current_manifest.json").read_text())["version"] == "v0"


def test_what_is_here_is_not_read_again(folder: Path, home: Path, run: Run) -> None:
    replicate(run, "--plan", "plan0.json", "--commit")
    second = replicate(run, "--plan", "plan1.json", "--commit")
    assert second["reused_nbytes"] == 64 * 256 * 4
    assert second["nbytes"] == 64 * 64 * 4
    assert load_file(home / "current" / "model.safetensors")["head"][0, 0] == np.float32(2.0)
    assert (home / "previous" / "model.safetensors").read_bytes() == (
        folder / "v 0/model.safetensors"
    ).read_bytes()
    fresh = replicate(run, "--plan", "plan1.json", "--home", folder / "other")
    assert fresh["image_digest"] == second["image_digest"]
    assert fresh["reused_nbytes"] == 0


def test_the_version_before_the_previous_one_goes(folder: Path, home: Path, run: Run) -> None:
    for name in ("plan0.json", "plan1.json"):
        replicate(run, "--plan", name, "--commit")
    third = checkpoint(folder / "v2", "v2", 3.0)
    Path("plan2.json").write_bytes(plan(folder / "v2", third).canonical)
    replicate(run, "--plan", "plan2.json", "--commit")
    assert len(list((home / "versions").iterdir())) == 2
    # back again: it is whole, nothing is written
    replicate(run, "--plan", "plan1.json", "--commit")
    assert json.loads((home / "current_manifest.json").read_text())["version"] == "v1"


@pytest.mark.usefixtures("folder")
def test_a_version_that_went_bad_on_the_disk_is_brought_anew(home: Path, run: Run) -> None:
    replicate(run, "--plan", "plan0.json", "--commit")
    path = home / "current" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    replicate(run, "--plan", "plan1.json", "--verify", "--commit")
    assert load_file(home / "current" / "model.safetensors")["body"][-1] == 64 * 256 - 1


@pytest.mark.usefixtures("folder")
def test_without_a_gpu_it_stays_in_host_memory_and_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hotweights_storage import device

    monkeypatch.setattr(device, "_no_gpu", lambda: "the test says so")
    shown = replicate(run, "--plan", "plan0.json", "--device", "cuda", "--pinned")
    assert shown["device"] == "host memory (no GPU: the test says so)"


def test_a_source_that_changed_is_refused_and_nothing_happens(
    folder: Path, home: Path, run: Run
) -> None:
    replicate(run, "--plan", "plan0.json", "--commit")
    path = folder / "v 1" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    done = run("replicate", "--plan", "plan1.json", "--commit", "--metrics-port", 0)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "BLAKE3" in done.stderr
    assert json.loads((home / "current_manifest.json").read_text())["version"] == "v0"


@pytest.mark.usefixtures("folder")
def test_a_plan_outside_the_roots_is_refused_with_the_remedy(tmp_path: Path, run: Run) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    done = run("replicate", "--plan", "plan0.json", "--root", other, "--metrics-port", 0)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "--root" in done.stderr
    assert run("replicate", "--plan", "none.json").returncode == 1


@pytest.mark.usefixtures("folder")
def test_several_ranks_need_a_transport(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run("replicate", "--plan", "plan0.json", "--metrics-port", 0)
    assert (done.returncode, "--ucx or --mpi" in done.stderr) == (1, True)
    monkeypatch.setenv("RANK", "two")
    assert "RANK" in run("replicate", "--plan", "plan0.json").stderr


def test_a_full_disk_leaves_what_was_there(
    folder: Path, home: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    replicate(run, "--plan", "plan0.json", "--commit")
    write = depots._write_checkpoint

    def write_with_little_room(*arguments: Any) -> None:
        """The limit counts for memory files too, so it holds only while the disk is written."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(depots, "_write_checkpoint", write_with_little_room)
    done = run("replicate", "--plan", "plan1.json", "--commit", "--metrics-port", 0)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "make room" in done.stderr
    assert [path.name for path in (home / "versions").iterdir()] == [
        (home / "current").resolve().name
    ]
    assert (home / "current/model.safetensors").read_bytes() == (
        folder / "v 0/model.safetensors"
    ).read_bytes()


@pytest.mark.usefixtures("folder")
def test_too_little_room_is_said_before_anything_is_written(
    home: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(1, 1, 1))
    done = run("replicate", "--plan", "plan0.json", "--commit", "--metrics-port", 0)
    assert (done.returncode, "make room" in done.stderr) == (1, True)
    assert list((home / "versions").iterdir()) == []


def test_ctrl_c_in_the_middle_leaves_what_was_there(folder: Path, home: Path, run: Run) -> None:
    replicate(run, "--plan", "plan0.json", "--commit")
    program = (
        "import os, signal, sys\n"
        "from hotweights import cli\n"
        "from hotweights.replicate import version_store\n"
        "write = version_store._write_tensors\n"
        "def interrupted(*arguments):\n"
        "    write(*arguments)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "version_store._write_tensors = interrupted\n"
        "sys.argv = ['hotweights', 'replicate', '--plan', 'plan1.json', '--commit', "
        "'--metrics-port', '0']\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=MOST_SECONDS,
        check=False,
    )
    assert done.returncode == 130, done
    assert done.stderr.strip().count("\n") == 0
    assert [path.name for path in (home / "versions").iterdir()] == [
        (home / "current").resolve().name
    ]
    assert json.loads((home / "current_manifest.json").read_text())["version"] == "v0"


@pytest.mark.usefixtures("folder")
def test_ctrl_c_in_an_update_says_what_the_coordinator_was_told(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(replication, "_finish", pressed)
    with running() as coordinator, coordinator.client() as client:
        done = run(
            *("replicate", "--plan", "plan0.json", "--commit", "--metrics-port", 0),
            *("--coord-endpoint", coordinator.endpoint),
        )
        status = client.call("status").result
    assert (done.returncode, done.stderr.count("\n")) == (130, 1)
    assert "the coordinator was told that this worker leaves the update to v0" in done.stderr
    assert (status["state"], status["workers"]) == ("aborted", [])
    assert "Interrupted" in status["reason"]


@pytest.mark.usefixtures("folder")
def test_a_killed_commit_leaves_no_trace_after_the_next_one(home: Path, run: Run) -> None:
    (home / "versions" / ".new-1").mkdir(parents=True)
    (home / "versions" / ".new-1" / "model.safetensors").write_bytes(b"half")
    replicate(run, "--plan", "plan0.json", "--commit")
    assert [path.name for path in (home / "versions").iterdir()] == [
        (home / "current").resolve().name
    ]
    assert VersionStore(home).current() == (home / "current").resolve()


@pytest.mark.usefixtures("folder")
def test_metrics_can_be_read_while_it_runs() -> None:
    command = [
        sys.executable,
        "-m",
        "hotweights.cli",
        "replicate",
        "--plan",
        "plan0.json",
        "--metrics-port",
        "0",
    ]
    with subprocess.Popen(
        [*command, "--metrics-hold", "60", "--json"], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            port = json.loads(process.stdout.readline())["metrics_port"]
            with urllib.request.urlopen(
                f"http://127.0.0.1:{port}/metrics", timeout=MOST_SECONDS
            ) as answer:
                text = answer.read().decode()
        finally:
            process.send_signal(signal.SIGINT)
    assert 'hotweights_replicate_bytes_total{transport="file"}' in text
    assert 'hotweights_replicate_runs_total{result="done"} 1.0' in text


@pytest.mark.usefixtures("folder")
def test_a_taken_metrics_port_costs_only_the_metrics(run: Run) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run(
            "replicate", "--plan", "plan0.json", "--metrics-port", taken.getsockname()[1], "--json"
        )
    assert done.returncode == 0
    assert json.loads(done.stdout)["metrics_port"] == 0


@pytest.mark.usefixtures("folder")
def test_with_a_coordinator_it_takes_part_and_commits(run: Run, home: Path) -> None:
    with running() as coordinator, coordinator.client() as client:
        shown = replicate(
            run, "--plan", "plan0.json", "--commit", "--coord-endpoint", coordinator.endpoint
        )
        status = client.call("status").result
        assert (status["state"], status["current"]["version"]) == ("committed", "v0")
        assert status["workers"] == [], "it has left: the next attempt does not wait for it"
        assert shown["committed"] == "by the coordinator"
        assert not (home / "current").exists()


@pytest.mark.usefixtures("folder")
def test_a_no_of_the_coordinator_is_a_failure(run: Run) -> None:
    with running() as coordinator, coordinator.client() as client:
        client.call("submit_plan", binary=Path("plan1.json").read_bytes())
        client.call("begin", version="v1")
        arguments = ("replicate", "--plan", "plan0.json", "--commit", "--metrics-port", 0)
        done = run(*arguments, "--coord-endpoint", coordinator.endpoint)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert client.call("status").result["version"] == "v1"
        done = run(*arguments, "--coord-endpoint", "tcp://127.0.0.1:9")
        assert (done.returncode, "coord-serve" in done.stderr) == (1, True)


def test_a_failure_aborts_the_update_that_it_began(folder: Path, run: Run) -> None:
    (folder / "v 0").rename(folder / "gone")
    with running() as coordinator, coordinator.client() as client:
        done = run(
            *("replicate", "--plan", "plan0.json", "--commit", "--metrics-port", 0),
            *("--coord-endpoint", coordinator.endpoint),
        )
        assert done.returncode == 1
        status = client.call("status").result
        assert (status["state"], "SourceNotFound" in status["reason"]) == ("aborted", True)
        assert status["workers"] == []


@pytest.mark.usefixtures("folder", "home")
def test_a_transport_among_ranks_without_ranks_is_told(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    done = run("replicate", "--plan", "plan0.json", "--ucx", "--metrics-port", 0)
    assert done.returncode == 0
    assert "warning: --ucx has no effect with one rank; set WORLD_SIZE" in done.stderr


@pytest.mark.usefixtures("folder")
def test_bench_measures_several_rounds(run: Run) -> None:
    done = run("bench", "--plan", "plan0.json", "--repeat", 2, "--pinned", "--cold")
    assert done.returncode == 0
    assert done.stdout.count("round ") == 2
    assert "GB/s" in done.stdout
    shown = json.loads(run("bench", "--plan", "plan0.json", "--repeat", 2, "--json").stdout)
    assert len(shown["seconds"]) == 2


@pytest.mark.usefixtures("folder")
def test_the_bench_program_takes_the_plan_anywhere() -> None:
    program = Path(__file__).parents[3] / "bench" / "bench_replicate.py"
    for arguments in (["plan0.json", "--repeat", "1"], ["--repeat", "1", "plan0.json"]):
        done = subprocess.run(
            [sys.executable, str(program), *arguments],
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
            check=False,
        )
        assert (done.returncode, "GB/s" in done.stdout) == (0, True), done
