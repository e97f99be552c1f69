"""Jobs of the manual launcher: every proxy started by another process, as on as many hosts, and no
end without a cause.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hotweights_transports.broadcast import hydra
from hotweights_transports.broadcast.hydra import (
    Mpiexec,
    MpiFailed,
    MpiUnavailable,
    availability,
    find,
)
from hotweights_transports.broadcast.launch_line import command, parse_launch
from hotweights_transports.broadcast.rank_process import LEFTOVER_SECONDS, RankProcess, sweep

PROGRAM = Path(__file__).with_name("node.py")
SECONDS = 70.0

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def members() -> Iterator[list[RankProcess]]:
    """Two nodes in one process, ready."""
    with ExitStack() as stack:
        head = Mpiexec(2, "127.0.0.1")
        stack.callback(head.close)
        lines = [
            command(parse_launch(line), find().proxy, frozenset({"127.0.0.1"}))
            for line in head.launches
        ]
        found = [stack.enter_context(RankProcess(line, 2, 1 << 16)) for line in lines]
        for member in found:
            member.wait_ready(60)
        yield found


@pytest.mark.parametrize("size", [2, 3])
def test_every_node_starts_its_own_proxy(size: int) -> None:
    head = Mpiexec(size, "127.0.0.1")
    try:
        nodes = [
            subprocess.Popen(
                [sys.executable, str(PROGRAM), line, "2", "100000", "5"],
                stdout=subprocess.PIPE,
                text=True,
            )
            for line in head.launches
        ]
        said = [node.communicate(timeout=SECONDS)[0] for node in nodes]
    finally:
        head.close()
    assert said == [f"ready\n{rank} {rank} {size} 0 1 2 3 4\n" for rank in range(size)]


def test_slots_come_back_in_order(members: list[RankProcess]) -> None:
    for member in members:
        member.post(0, 10)
        member.post(1, 1 << 16)
    assert [[member.completed(SECONDS), member.completed(SECONDS)] for member in members] == [
        [0, 1],
        [0, 1],
    ]


def test_a_dead_rank_is_heard_of_everywhere(members: list[RankProcess]) -> None:
    for member in members:
        member.post(0, 10)
        member.completed(SECONDS)
    members[1].hang_up()
    with pytest.raises(MpiFailed, match="a member was lost"):
        members[0].completed(SECONDS)


def test_a_standstill_is_not_waited_for(members: list[RankProcess]) -> None:
    members[1].post(0, 10)
    with pytest.raises(MpiFailed, match=r"no progress for 0\.3 s"):
        members[1].completed(0.3)


def test_other_bytes_than_agreed_are_named(members: list[RankProcess]) -> None:
    members[0].post(0, 10)
    members[1].post(0, 11)
    with pytest.raises(MpiFailed, match="rank 0 sends 10 bytes, 11 are expected"):
        members[1].completed(SECONDS)


def test_a_job_whose_nodes_do_not_come_is_ended() -> None:
    head = Mpiexec(2, "127.0.0.1")
    began = time.monotonic()
    head.close(0.1)
    assert time.monotonic() - began < 30
    assert head._process.returncode is not None


def test_a_rank_does_not_outlive_its_node() -> None:
    head = Mpiexec(1, "127.0.0.1")
    try:
        line = head.launches[0]
        node = subprocess.Popen(
            [sys.executable, str(PROGRAM), line, "1", "1000000", "1000000"], stdout=subprocess.PIPE
        )
        with node:
            assert (node.stdout or sys.stdin).readline() == b"ready\n"
            node.send_signal(signal.SIGKILL)
        head._process.wait(SECONDS)  # ends only when the rank has
    finally:
        head.close()


def test_nothing_native_is_loaded_without_a_rank() -> None:
    text = (
        "import hotweights.replicate.mpi, sys; assert not [name for name in sys.modules if "
        "name.startswith('mpi4py')]"
    )
    subprocess.run([sys.executable, "-c", text], check=True, timeout=SECONDS)


def test_ranks_see_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTWEIGHTS_PEER_TOKEN", "secret")
    monkeypatch.setenv("PMI_RANK", "7")
    monkeypatch.setenv("UCX_NET_DEVICES", "eth0")
    found = hydra.environment()
    assert found["UCX_NET_DEVICES"] == "eth0"
    assert not {"HOTWEIGHTS_PEER_TOKEN", "PMI_RANK"} & found.keys()


def test_it_says_why_it_does_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert availability().works
    assert "mpiexec" in availability().because
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not availability().works
    with pytest.raises(MpiUnavailable, match=r"pip install -e '\.\[mpi\]'"):
        find()
    (tmp_path / "mpiexec").write_text("#!/bin/sh\n")
    os.chmod(tmp_path / "mpiexec", 0o755)  # noqa: PTH101
    with pytest.raises(MpiUnavailable, match="hydra_pmi_proxy is missing"):
        find()


def test_what_a_killed_start_left_is_swept_away_and_what_is_in_use_stays() -> None:
    folder = Path("/dev/shm")
    left, used, young = (
        folder / f"mpich_shm_test{os.getpid()}{end}" for end in ("left", "used", "young")
    )
    old = time.time() - 2 * LEFTOVER_SECONDS
    try:
        for path in (left, used, young):
            path.write_bytes(bytes(4096))
        with used.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
            # only now: ranks of tests that run beside this one sweep too
            for path in (left, used):
                os.utime(path, (old, old))
            sweep()
            assert [path.exists() for path in (left, used, young)] == [False, True, True]
    finally:
        for path in (left, used, young):
            path.unlink(missing_ok=True)
