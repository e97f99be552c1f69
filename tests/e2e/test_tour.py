"""What `make tour` says of a machine that lacks something, of a step that fails and of evidence that
is not there, and that it leaves no process behind. The tour itself is in e2e/tour/test_tour.py.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.harness import docs
from e2e.tour import install, processes
from e2e.tour.__main__ import what_next
from e2e.tour.account import Clients, Evidence, Switch, metric
from e2e.tour.machine import GB, Machine, Ports, lacks, observe
from e2e.tour.processes import Failed, Processes
from tests.ports import free_ports
from tests.product import ROOT

ENOUGH = Machine(
    system="Linux x86_64",
    has_avx2=True,
    memory_nbytes=16 * GB,
    cache=Path("/home/a/.cache/hotweights"),
    cache_nbytes=100 * GB,
    is_installed=False,
    taken=(),
    folder=Path("/home/a/hotweights/build/tour"),
)


def test_a_machine_that_has_all_lacks_nothing() -> None:
    assert lacks(ENOUGH, Ports()) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"system": "Darwin arm64"}, "this is Darwin arm64, and the tour's vLLM for CPUs"),
        ({"has_avx2": False}, "this processor has no AVX2"),
        ({"memory_nbytes": 3 * GB}, "3.0 GB of memory are available, and the tour needs"),
        ({"cache_nbytes": 2 * GB}, "2.0 GB are free for /home/a/.cache/hotweights, and vLLM needs"),
        ({"taken": (8000,)}, "port 8000, which is for vLLM, is in use: end what listens there"),
        ({"taken": (5556,)}, "port 5556, which is for the coordinator's events, is in use"),
        ({"folder": Path("/" + "a" * 100)}, "a socket's path may have 107: name a shorter folder"),
    ],
)
def test_what_is_missing_is_one_sentence_with_its_remedy(
    changes: dict[str, object], says: str
) -> None:
    (problem,) = lacks(dataclasses.replace(ENOUGH, **changes), Ports())  # type: ignore[arg-type]
    assert says in problem
    assert ": " in problem
    assert "\n" not in problem


def test_room_for_vllm_is_not_asked_for_where_it_is_there() -> None:
    assert lacks(dataclasses.replace(ENOUGH, cache_nbytes=GB, is_installed=True), Ports()) == []


def test_this_machine_is_looked_at(tmp_path: Path) -> None:
    first, *_ = free_ports(5)
    ports = Ports.starting_at(first)
    with socket.create_server(("127.0.0.1", ports.worker_metrics)):
        found = observe(ports, tmp_path)
    assert found.taken == (ports.worker_metrics,)
    assert found.memory_nbytes > 0
    assert found.cache_nbytes > 0
    assert found.folder == tmp_path


def test_a_slow_installation_says_how_far_it_is() -> None:
    log = (
        "Resolved 167 packages in 2.23s\nDownloading torch (502.2MiB)\nDownloading triton (1MiB)\n"
    )
    assert install.progress_of("") == "the packages of .venv"
    assert install.progress_of("[localvllm] building") == "asking the package index"
    assert install.progress_of(log) == "0 of 2 large packages fetched"
    log += " Downloaded triton\n"
    assert install.progress_of(log) == "1 of 2 large packages fetched"
    log += " Downloaded torch\n"
    assert install.progress_of(log) == "unpacking"
    assert install.progress_of(log + "checking that it imports") == "importing vLLM once"


@pytest.mark.parametrize(
    "log",
    [
        "error: Failed to fetch: `http://index/simple/x/`\n  Caused by: dns error: failed to lookup",
        "WARNING: Retrying after connection broken by 'NewConnectionError': /simple/uv/",
        "ERROR: No matching distribution found for uv==0.13.9",
    ],
)
def test_without_a_network_the_remedy_is_said(log: str) -> None:
    assert "see whether this machine has a network" in install.explained("it failed", log)
    assert install.explained("it failed", "error: no space left on device") == "it failed"


COLD = [[1, 2, 3], [4, 5]]
BEFORE = [[9, 9, 9, 9], [8, 8, 8, 8]]
SHOWN = Evidence(
    before=BEFORE,
    cold=COLD,
    forth=Switch("v1", 1.94, 1, 0.0592, [[1, 2, 3, 7], [4, 5, 7, 7]]),
    back=Switch("v0", 1.2, 1, 0.04, BEFORE),
    clients=Clients(120, (), 0.41, 0.12),
    processes_before=frozenset({10, 11}),
    processes_after=frozenset({10, 11}),
    staged_nbytes=10_500_000,
)


def test_the_account_is_told_as_a_table() -> None:
    assert SHOWN.problems() == []
    assert SHOWN.told().splitlines() == [
        "SWITCH   PAUSE   COMMAND TO SERVED   ANSWERS (5 tokens)",
        "to v1    59 ms   1.9 s               those of a cold vLLM on v1",
        "to v0    40 ms   1.2 s               those from before",
        "",
        "clients    120 requests, 0 failed; the slowest took 0.41 s, no stream stood still longer "
        "than 0.12 s",
        "processes  2 of vLLM's 2 processes are the same as before",
        "memory     the worker holds 10.5 MB of versions, shared with the engine",
    ]


def test_the_readme_shows_what_it_prints() -> None:
    """Line by line, but for figures."""
    (block,) = (block for block in docs.blocks("README.md") if block.text.startswith("$ make tour"))
    shown = re.sub(r"[\d.]+", "N", " ".join(block.text.split()))
    told = re.sub(r"[\d.]+", "N", " ".join(SHOWN.told().split()))
    assert told in shown


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"forth": dataclasses.replace(SHOWN.forth, answers=BEFORE)}, "not answer as a cold start"),
        ({"back": dataclasses.replace(SHOWN.back, answers=COLD)}, "does not answer as before"),
        ({"back": dataclasses.replace(SHOWN.back, pauses=0)}, "counted 0 commits for v0, not one"),
        ({"clients": Clients(9, ("a: timed out",), 1.0, 1.0)}, "1 of 9 requests failed; the first"),
        ({"clients": Clients(0, (), 0.0, 0.0)}, "no client asked anything"),
        ({"processes_after": frozenset({10, 12})}, "vLLM's processes are not those"),
        ({"cold": [[], []]}, "nothing was compared"),
    ],
)
def test_each_promise_that_was_not_kept_is_named(changes: dict[str, object], says: str) -> None:
    (problem,) = dataclasses.replace(SHOWN, **changes).problems()  # type: ignore[arg-type]
    assert says in problem


def test_versions_that_answer_alike_prove_nothing() -> None:
    alike = dataclasses.replace(SHOWN, before=SHOWN.forth.answers)
    assert "both versions answer alike, so the answers prove nothing" in alike.problems()


def test_answers_that_differ_are_not_called_the_same() -> None:
    wrong = dataclasses.replace(SHOWN, forth=dataclasses.replace(SHOWN.forth, answers=BEFORE))
    assert "NOT those of a cold vLLM on v1" in wrong.told()


def test_metrics_are_read_by_name_and_label() -> None:
    text = (
        '# TYPE a gauge\na{kind="memory",b="x"} 5.0\na{kind="free",b="x"} 2.0\naa 7\nc_sum 1e-3\n'
    )
    assert metric(text, "a", {"kind": "free"}) == 2.0
    assert metric(text, "a") == 7.0
    assert metric(text, "c_sum") == 0.001
    assert metric(text, "absent") == 0.0


def test_what_was_kept_is_shown_with_its_end() -> None:
    text = what_next(Path("/t"), Ports.starting_at(17000), kept=True)
    assert "curl http://127.0.0.1:17004/v1/completions" in text
    assert "make tour ARGS=--end" in text
    assert "make demo" in what_next(Path("/t"), Ports(), kept=False)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Processes]:
    found = Processes(tmp_path, os.environ)
    yield found
    found.end()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "not within 30 s"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Not so a zombie, which whoever adopted it may reap later."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_all_of_a_group_is_ended_those_too_that_hear_no_sigterm(
    started: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "TERM_SECONDS", 0.2)
    started.start("stubborn", "trap '' TERM; sleep 100 & sleep 100")
    until(lambda: len(started.members("stubborn")) == 3)
    members = started.members("stubborn")
    started.end()
    assert not any(map(is_alive, members))


def test_what_was_left_running_is_found_by_the_record_and_ended(
    started: Processes, tmp_path: Path
) -> None:
    started.start("left", "sleep 100")
    (left,) = processes.recorded(tmp_path)
    assert left.name == "left"
    processes.end([left])
    assert processes.recorded(tmp_path) == []


def test_a_number_that_is_anothers_by_now_is_left_alone() -> None:
    with subprocess.Popen(["sleep", "100"], start_new_session=True) as other:
        assert processes.Group("ours", other.pid, start_ticks=1).members() == []
        processes.end([processes.Group("ours", other.pid, start_ticks=1)])
        assert other.poll() is None
        other.kill()


def test_a_command_that_fails_is_told_by_the_line_that_says_most(started: Processes) -> None:
    lines = ("error: no such model", "bye", "make[1]: *** [Makefile:3: x] Error 3")
    started.start("broken", "; ".join(f"echo '{line}'" for line in lines) + "; exit 3")
    with pytest.raises(Failed, match=r"^broken failed: error: no such model \(all of it: /"):
        started.wait("broken", 30)


def test_what_ends_by_itself_is_noticed(started: Processes) -> None:
    started.start("short", "exit 3")
    until(lambda: started.members("short") == [])
    with pytest.raises(Failed, match=r"^short ended with 3"):
        started.check()


def tour(folder: Path, *arguments: str, python: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "e2e.tour", "--folder", str(folder), *arguments],
        cwd=ROOT,
        env={**os.environ, **({"HOTWEIGHTS_VLLM_PYTHON": python} if python else {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_folder_that_is_none_of_its_own_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with tour(tmp_path) as process:
        _, said = process.communicate(timeout=50)
    assert process.returncode == 1
    assert (
        said
        == f"tour: {tmp_path} holds something else than a tour: name another folder with --folder\n"
    )
    assert (tmp_path / "thesis.txt").exists()


def test_ctrl_c_ends_everything_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\necho "$$" > "$0.pid"\nsleep 100\n')
    (tmp_path / "python").chmod(0o755)
    first, *_ = free_ports(5)
    with tour(
        tmp_path / "t", "--first-port", str(first), python=str(tmp_path / "python")
    ) as process:
        pid = tmp_path / "python.pid"
        until(lambda: pid.exists() and pid.read_text() != "")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=50)
    assert process.returncode == 130
    assert said == "tour: interrupted; all that it had started is ended\n"
    assert not is_alive(int(pid.read_text()))
