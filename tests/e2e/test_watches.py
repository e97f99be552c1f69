"""What follows the API server says so when it could not: a watch that ended looks like silence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from e2e.harness.kubectl import CommandFailed, Kubectl, eventually
from e2e.harness.shown import READY, Shown, watch_shown
from e2e.harness.tape import Tape, record

POD = json.dumps(
    {"type": "ADDED", "object": {"metadata": {"name": "llm-0", "resourceVersion": "1"}}}
)


def says(folder: Path, script: str) -> Kubectl:
    program = folder / "kubectl"
    program.write_text(f"#!/bin/bash\necho $$ > {folder}/pid\n{script}\n")
    program.chmod(0o755)
    return Kubectl(program, folder / "config")


@contextmanager
def shown(folder: Path, then: str) -> Iterator[Shown]:
    with watch_shown(says(folder, f"echo 'llm-0 False'; {then}"), "app=llm", READY) as found:
        yield found


@contextmanager
def tape(folder: Path, then: str) -> Iterator[Tape]:
    with record(says(folder, f"echo '{POD}'; {then}"), {"pod": "/pods"}) as found:
        yield found


def test_what_was_said_is_kept(tmp_path: Path) -> None:
    with shown(tmp_path, "exec sleep 60") as found:
        pass
    assert (found.lacked, found.most_lacking) == ({"llm-0"}, 1)
    with tape(tmp_path, "exec sleep 60") as heard:
        pass
    assert [said.name for said in heard.said] == ["llm-0"]


def waits(folder: Path) -> str:
    """What it does after its first word: it ends when it is told to."""
    return f"while [ ! -e {folder}/over ]; do sleep 0.01; done; exit 3"


def end(folder: Path) -> None:
    """Tell it, and wait until it has ended."""
    process = Path("/proc", (folder / "pid").read_text().strip(), "stat")
    (folder / "over").touch()
    eventually("it has ended", lambda: process.read_text().split()[2] == "Z", 30, 0.02)


def test_pods_whose_watch_has_ended_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="ended with 3"), shown(tmp_path, waits(tmp_path)):
        end(tmp_path)


def heard_to_the_end(heard: Tape, folder: Path) -> None:
    (folder / "over").touch()
    with pytest.raises(CommandFailed):
        heard.until("what never comes", lambda _: False, 30)


def test_a_tape_whose_watch_has_ended_is_an_error_to_whoever_asks_and_at_the_end(
    tmp_path: Path,
) -> None:
    with (
        pytest.raises(CommandFailed, match="the watch of pod ended with 3"),
        tape(tmp_path, waits(tmp_path)) as heard,
    ):
        heard_to_the_end(heard, tmp_path)
