"""Daemons on record: exactly ours are found and ended, whatever happened in between."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from localcluster.errors import ClusterError
from localcluster.host import launch, processes
from localcluster.host.processes import Daemons

SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    made = Daemons(tmp_path)
    yield made
    made.stop_all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("7 (sh) S " + " ".join(["0"] * 18) + " 4711 0", ("S", 4711), id="plain"),
        pytest.param(
            "7 (a) b (c) Z " + " ".join(["0"] * 18) + " 12 0",
            ("Z", 12),
            id="parentheses-in-the-name",
        ),
    ],
)
def test_stat_is_read_behind_the_name(text: str, expected: tuple[str, int]) -> None:
    assert launch.stat_fields(text) == expected


def test_the_launcher_waits_for_no_shell(daemons: Daemons) -> None:
    daemons.start("sleeper", SLEEP)
    record = daemons.record("sleeper")
    assert record is not None
    assert record.alive()
    assert record.argv == tuple(SLEEP)
    # leads its own session
    assert Path(f"/proc/{record.pid}/stat").read_text().split()[5] == str(record.pid)


def test_starting_twice_keeps_the_first(daemons: Daemons) -> None:
    daemons.start("sleeper", SLEEP)
    first = daemons.record("sleeper")
    daemons.start("sleeper", SLEEP)
    assert daemons.record("sleeper") == first


def test_stopping_ends_it_and_forgets_it(daemons: Daemons) -> None:
    daemons.start("sleeper", SLEEP)
    record = daemons.record("sleeper")
    assert record is not None
    daemons.stop("sleeper")
    assert not record.alive()
    assert daemons.names() == []


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"started_ticks": 1}, id="the-id-was-given-to-a-later-process"),
        pytest.param({"boot": "another"}, id="the-machine-was-rebooted"),
    ],
)
def test_a_recycled_process_id_is_left_alone(daemons: Daemons, change: dict[str, object]) -> None:
    daemons.start("sleeper", SLEEP)
    record = daemons.record("sleeper")
    assert record is not None
    other = dataclasses.replace(record, **change)  # type: ignore[arg-type]
    assert not other.alive()
    processes.end(other, grace_seconds=0)
    assert record.alive()


def test_a_zombie_is_dead(daemons: Daemons) -> None:
    daemons.start("brief", [sys.executable, "-I", "-S", "-c", ""])
    record = daemons.record("brief")
    assert record is not None
    os.waitid(os.P_PID, record.pid, os.WEXITED | os.WNOWAIT)
    assert not record.alive()
    daemons.stop("brief")


def test_one_that_ends_before_anybody_looks_was_launched_all_the_same(
    daemons: Daemons, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_exited = processes._has_exited

    def late(pid: int) -> bool:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return has_exited(pid)

    monkeypatch.setattr(processes, "_has_exited", late)
    daemons.start("brief", [sys.executable, "-I", "-S", "-c", ""])
    assert daemons.record("brief") is not None


def test_waiting_for_a_dead_daemon_ends_at_once_and_quotes_its_log(daemons: Daemons) -> None:
    daemons.start(
        "grumpy", [sys.executable, "-I", "-S", "-c", "import sys; sys.exit('no more disk')"]
    )
    with pytest.raises(ClusterError, match="no more disk"):
        daemons.wait_until(lambda: False, "never", needs=["grumpy"], timeout_seconds=30)


def test_waiting_has_a_deadline(daemons: Daemons) -> None:
    daemons.start("sleeper", SLEEP)
    with pytest.raises(ClusterError, match=r"not within 0 s.*sleeper\.log"):
        daemons.wait_until(lambda: False, "never", needs=["sleeper"], timeout_seconds=0.1)


def test_a_program_that_is_not_there_is_reported(daemons: Daemons) -> None:
    daemons.start("missing", ["/nowhere/program"])
    with pytest.raises(ClusterError, match="No such file"):
        daemons.wait_until(lambda: False, "never", needs=["missing"], timeout_seconds=30)


def test_what_ignores_the_polite_signal_is_killed(daemons: Daemons) -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', "
        "flush=True); time.sleep(60)"
    )
    daemons.start("stubborn", [sys.executable, "-I", "-S", "-c", stubborn])
    daemons.wait_until(
        lambda: "on" in daemons.log("stubborn").read_text(),
        "ignores",
        needs=["stubborn"],
        timeout_seconds=30,
    )
    daemons.stop("stubborn", grace_seconds=0.1)
    assert not daemons.alive("stubborn")


def test_a_daemon_whose_starter_died_does_not_start(tmp_path: Path) -> None:
    record = tmp_path / "orphan.json"
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", launch.__file__, "1", str(record), "--", "/bin/true"],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)],
    )
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 1
    assert record.exists()
