"""Ranks that replicate one plan over MPI: real processes, real mpiexec, byte-equal images, whoever
dies in the middle.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hotweights.replicate.world import World
from hotweights_planner.errors import Refused
from hotweights_planner.plan import Plan, build
from hotweights_storage.resolve import publish
from hotweights_storage.sources.file import open_folder
from hotweights_transports.broadcast import GroupLeader, GroupMember, GroupTimeouts, Terms
from hotweights_transports.broadcast.hydra import find
from tests.ports import free_ports

PROGRAM = Path(__file__).with_name("mpi_rank.py")
DEMO = Path(__file__).parents[3] / "scripts/run_mpi_broadcast_demo.sh"
TENSORS = 6
TENSOR_NBYTES = 3_000_000
SECONDS = 200.0

pytestmark = pytest.mark.timeout(420)  # up to nine processes that import everything


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder with blanks"
    folder.mkdir()
    random = np.random.default_rng(1)
    tensors = {
        f"layer.{number}": random.integers(0, 255, TENSOR_NBYTES, np.uint8)
        for number in range(TENSORS)
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def plan(folder: Path) -> Plan:
    with open_folder(folder) as source:
        # every chunk in two parts
        return build(publish(source, "model", "v1"), None, source.uri, 2_000_000)


@pytest.fixture
def plan_file(plan: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "the plan.json"
    path.write_bytes(plan.text())
    return path


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Until it is there, the last bytes of sources are not read."""
    return tmp_path / "gate"


@pytest.fixture
def port() -> int:
    return free_ports()[0]


class Rank:
    """One process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def hear(self, words: str) -> None:
        """Until it says so."""
        for line in self.process.stdout or ():
            if line.startswith(words):
                return
        raise AssertionError(f"it ended without {words!r}")

    def result(self) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=SECONDS)
        return dict(json.loads(out.splitlines()[-1]))


Start = Callable[..., list[Rank]]


@pytest.fixture
def start(port: int, plan_file: Path) -> Iterator[Start]:
    ranks: list[Rank] = []

    def start(
        size: int, *arguments: str, only: tuple[int, ...] = (), plan: Path = plan_file, **more: str
    ) -> list[Rank]:
        world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in only or range(size):
            process = subprocess.Popen(
                [sys.executable, str(PROGRAM), str(plan), *arguments],
                stdout=subprocess.PIPE,
                text=True,
                env=dict(os.environ) | world | more | {"RANK": str(rank)},
            )
            ranks.append(Rank(process))
        return ranks

    before = shared_memory()
    adopt_orphans(True)
    yield start
    for rank in ranks:
        rank.process.kill()
        rank.process.communicate(timeout=SECONDS)
    deadline = time.monotonic() + 60
    while any(left := (orphans(), shared_memory() - before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    adopt_orphans(False)
    assert left == ([], set())


def assert_equal_images(results: list[dict[str, Any]]) -> None:
    digests = {result["digest"] for result in results}
    assert len(digests) == 1, digests


def adopt_orphans(yes: bool) -> None:
    """Whatever descendant loses its parent becomes our child, so that it can be found."""
    pr_set_child_subreaper = 36
    assert ctypes.CDLL(None).prctl(pr_set_child_subreaper, int(yes), 0, 0, 0) == 0


def orphans() -> list[str]:
    """What MPICH started and still runs."""
    found = []
    for pid in children_of(os.getpid()):
        words = words_of(pid)
        if words == [b""]:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)  # a zombie: adopted, so ours to bury
        elif any(
            word.endswith((b"/mpiexec", b"/hydra_pmi_proxy", b"/broadcast/mpi_program.py"))
            for word in words
        ):
            found.append(f"{pid} {words!r}")
    return found


def shared_memory() -> set[str]:
    """What nobody has mapped any more: other tests run beside this one."""
    found = {
        path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(("mpich", "ucx"))
    }
    for maps in Path("/proc").glob("[0-9]*/maps") if found else ():
        with suppress(OSError):  # it ended meanwhile
            found -= set(re.findall(r"/dev/shm/(\S+)$", maps.read_text(), re.MULTILINE))
    return found


def words_of(pid: int) -> list[bytes]:
    """Its command line; that of a zombie, or of one that was buried meanwhile, is empty."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return [b""]


def children_of(pid: int) -> list[int]:
    """All descendants."""
    found: list[int] = []
    with suppress(OSError):  # it ended meanwhile
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += [int(text) for text in (thread / "children").read_text().split()]
    return found + [grandchild for child in found for grandchild in children_of(child)]


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_has_every_byte(start: Start, plan: Plan, size: int) -> None:
    results = [rank.result() for rank in start(size, "", "hide the source")]
    assert_equal_images(results)
    assert {result["broadcast"] for result in results} == {"whole"}
    assert [result["nbytes"] for result in results] == [plan.manifest.nbytes] * size


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_rank_that_dies_leaves_the_others_to_pull(start: Start, gate: Path, victim: int) -> None:
    ranks = start(3, str(gate))
    ranks[2].hear("came")
    ranks[victim].process.send_signal(signal.SIGKILL)
    gate.touch()
    results = [rank.result() for number, rank in enumerate(ranks) if number != victim]
    assert_equal_images(results)
    assert all(result["broadcast"].startswith("lost: ") for result in results)


def test_the_job_dies_and_the_nodes_live(start: Start, gate: Path) -> None:
    ranks = start(2, str(gate), "hide the source")
    ranks[1].hear("came")
    [mpi_rank] = [
        int(pid)
        for pid in children_of(ranks[1].process.pid)
        if any(word.endswith(b"/mpi_program.py") for word in words_of(pid))
    ]
    os.kill(mpi_rank, signal.SIGKILL)
    gate.touch()
    results = [rank.result() for rank in ranks]
    assert_equal_images(results)
    assert results[1]["pulled_bytes"] > 0


def test_a_stalled_rank_does_not_hold_up_the_others(start: Start, gate: Path) -> None:
    ranks = start(3, str(gate), STALL_SECONDS="2")
    ranks[2].hear("came")
    os.kill(ranks[1].process.pid, signal.SIGSTOP)
    gate.touch()
    try:
        results = [ranks[0].result(), ranks[2].result()]
    finally:
        os.kill(ranks[1].process.pid, signal.SIGCONT)
    assert_equal_images(results)


def test_a_rank_that_never_comes(start: Start) -> None:
    start(3, only=(1,), STALL_SECONDS="3")[0].hear("here")  # rank 0 waits only so long
    ranks = start(3, only=(0,), JOIN_SECONDS="6", STALL_SECONDS="3")
    results = [rank.result() for rank in reversed(ranks)]
    assert_equal_images(results)
    assert results[0]["broadcast"] == "lost: rank 2 did not come within 6 s"


def test_no_head(start: Start) -> None:
    [rank] = start(2, only=(1,), JOIN_SECONDS="1")
    result = rank.result()
    assert result["error"] == "PeerUnreachable"
    assert "no head within 1 s" in result["message"]
    assert rank.process.returncode == 1


def test_a_head_that_does_not_answer_yet_is_asked_again(port: int) -> None:
    """It listens, and has no processor for who comes."""
    terms, patience = Terms(2, "a plan", 2, 4096), GroupTimeouts(SECONDS, message_seconds=0.2)
    with ThreadPoolExecutor(1) as pool:
        with socket.create_server(("127.0.0.1", port)) as listener:
            joining = pool.submit(GroupMember, 1, "127.0.0.1", port, terms, 1, patience)
            with listener.accept()[0] as first:
                while first.recv(4096):
                    pass  # until it is hung up
        head = GroupLeader("127.0.0.1", port, terms, 1, patience)
        joining.result(SECONDS).close()
    head.close()


def test_a_corrupt_source_is_refused_by_name(start: Start, folder: Path, plan: Plan) -> None:
    tensor = plan.manifest.tensors[3]
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(tensor.offset + 1_000_000)
        file.write(b"\0\0\0\0\0\0\0\0\0\0\0\0")
    for result in [rank.result() for rank in start(2, "", "hide the source", STALL_SECONDS="3")]:
        assert "layer.3" in result["message"], result


def test_the_wrong_secret_and_another_plan(start: Start, plan: Plan, tmp_path: Path) -> None:
    start(2, only=(0,), JOIN_SECONDS="300", HOTWEIGHTS_PEER_TOKEN="the secret")
    stranger = start(2, only=(1,), HOTWEIGHTS_PEER_TOKEN="a guess")[-1]
    assert stranger.result()["error"] == "PeerRefused"
    other = tmp_path / "other.json"
    other.write_bytes(build(plan.manifest, None, plan.source, 3_000_000).text())
    other_plan = start(2, only=(1,), plan=other, HOTWEIGHTS_PEER_TOKEN="the secret")[-1]
    assert "another about" in other_plan.result()["message"]
    ranks = start(2, only=(1,), HOTWEIGHTS_PEER_TOKEN="the secret")
    assert_equal_images([ranks[0].result(), ranks[-1].result()])


def test_under_mpiexec(start: Start, port: int, plan_file: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")
    }
    done = subprocess.run(
        [find().mpiexec, "-n", "2", sys.executable, str(PROGRAM), str(plan_file)],
        env=environment | {"MASTER_PORT": str(port)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    # lines may run together
    results = [json.loads("{" + text) for text in re.findall(r"\{([^{}]*\})", done.stdout)]
    assert len(results) == 2
    assert_equal_images(results)
    assert results[0]["broadcast"] == "whole"


def test_what_mpiexec_says() -> None:
    told = {"PMI_SIZE": "3", "PMI_RANK": "2"}
    assert World.read(told, mpiexec=True) == World(3, 2)
    assert World.read(told) == World()
    assert World.read(told | {"WORLD_SIZE": "2", "RANK": "1"}, mpiexec=True) == World(2, 1)
    with pytest.raises(Refused, match="PMI_RANK"):
        World.read({"PMI_SIZE": "3", "PMI_RANK": "3"}, mpiexec=True)


def demo(plan_file: Path, port: int, path: str) -> subprocess.CompletedProcess[str]:
    names = {
        "PATH": f"{path}:/usr/bin:/bin",
        "MASTER_PORT": str(port),
        "HOME": str(plan_file.parent),
    }
    return subprocess.run(
        [str(DEMO), plan_file.name],
        cwd=plan_file.parent,
        env=names,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def test_the_demo(port: int, plan_file: Path, folder: Path) -> None:
    done = demo(plan_file, port, str(Path(sys.executable).parent))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("broadcast: whole") == 2
    assert re.search(
        r"^images equal: True \(2 ranks, each verified; \d+\.\d+ GB/s at the slowest\)$",
        done.stdout,
        re.M,
    )


def test_the_demo_without_mpi(port: int, plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "hotweights").symlink_to(Path(sys.executable).parent / "hotweights")
    done = demo(plan_file, port, str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "error: there is no MPICH; pip install -e '.[mpi]'\n"
