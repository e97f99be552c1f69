"""What the tour starts, each in a process group of its own and written down, so that all of it can
be ended: at the end, by Ctrl-C, or by a later `--end` after `--keep`.

A group is ended by its recorded number, and only where the recorded process still leads it or has
left members behind: numbers are used again. vLLM's EngineCore and workers are in their server's
group.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD = "processes.json"
"""In the tour's folder; it says too that the folder is a tour's."""
TERM_SECONDS = 20.0
"""How long a group may take to end by itself: vLLM waits for its requests."""
POLL_SECONDS = 0.1
SHORT = 70  # characters


class Failed(Exception):
    """A command ended as it should not have, or not in time; the message names its log."""


@dataclass(frozen=True, slots=True)
class Group:
    """One that was started."""

    name: str
    pid: int
    start_ticks: int
    """When its leader started, in clock ticks since the machine did (``proc_pid_stat(5)``)."""

    def members(self) -> list[int]:
        """Who of it is alive."""
        found = []
        for entry in Path("/proc").iterdir():
            stat = _stat(int(entry.name)) if entry.name.isdecimal() else None
            if stat is not None and stat.session == self.pid and stat.state not in "ZX":
                found.append(int(entry.name))
        leader = _stat(self.pid)
        # the number is another's by now, and so are its members
        if leader is not None and leader.start_ticks != self.start_ticks:
            return []
        return found


@dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    session: int
    start_ticks: int


class Processes:
    """All of one tour. For one thread."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """Commands run in ``folder``, with these variables alone and what is added to them."""
        self._folder = folder
        self.environment = dict(environment)
        self._groups: list[Group] = []
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._write()  # from here on the folder is known as a tour's

    def log(self, name: str) -> Path:
        """Where a command's words go."""
        return self._folder / f"{name}.log"

    def start(self, name: str, command: str) -> None:
        """Start a line for a shell, in the background."""
        with self.log(name).open("a") as log:
            process = subprocess.Popen(
                ["sh", "-c", command],
                cwd=self._folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        stat = _stat(process.pid)
        # one that has ended already has left its zombie: nobody but us waits for it
        self._groups.append(Group(name, process.pid, stat.start_ticks if stat else 0))
        self._running[name] = process
        self._write()

    def wait(self, name: str, seconds: float) -> str:
        """Until it has ended; what it said. Raises `Failed`."""
        process = self._running[name]
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"{name} has no end after {seconds:g} s: see {self.log(name)}") from None
        self._forget(name)
        if code:
            raise Failed(f"{name} failed: {self.last_words(name)} (all of it: {self.log(name)})")
        return self.log(name).read_text(errors="replace")

    def check(self) -> None:
        """Raises `Failed` where one that was to go on has ended."""
        for name, process in self._running.items():
            if process.poll() is not None:
                raise Failed(
                    f"{name} ended with {process.returncode}: {self.last_words(name)} (all of it: "
                    f"{self.log(name)})"
                )

    def last_words(self, name: str) -> str:
        """The line of its log that says most: the last with an error in it, else the last."""
        return telling_line(self.log(name).read_text(errors="replace"))

    def now(self, name: str) -> str:
        """What a vLLM does by its own last words, in one short line."""
        text = self.log(name).read_text(errors="replace")
        said = re.findall(r"^(?:\(.*?\) )?INFO [\d: -]+\[.*?\] (\w.*)$", text, re.MULTILINE)
        return str(said[-1])[:SHORT] if said else "importing"

    def members(self, name: str) -> list[int]:
        """The living processes of one that runs."""
        return [pid for group in self._groups if group.name == name for pid in group.members()]

    def end(self) -> None:
        """End all that runs, the last first."""
        end(reversed(self._groups))
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TERM_SECONDS)
        self._running.clear()
        self._groups.clear()
        self._write()

    def _forget(self, name: str) -> None:
        del self._running[name]
        self._groups = [group for group in self._groups if group.name != name]
        self._write()

    def _write(self) -> None:
        path = self._folder / RECORD
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps([asdict(group) for group in self._groups]) + "\n")
        beside.replace(path)


def recorded(folder: Path) -> list[Group]:
    """Those that an earlier tour of this folder left running."""
    try:
        written = json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        return []
    return [group for group in (Group(**entry) for entry in written) if group.members()]


def end(groups: Iterable[Group]) -> None:
    """End them one after the other, by SIGTERM, and what does not go by SIGKILL."""
    for group in groups:
        for number, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, TERM_SECONDS)):
            if not group.members():
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group.pid, number)
            deadline = time.monotonic() + seconds
            while group.members() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)


def telling_line(log: str) -> str:
    """The last line with an error in it, else the last one; what make adds to it says nothing."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and line[:4] != "make"]
    errors = [line for line in lines if "error" in line.lower()]
    return ["", *lines, *errors][-1]


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return _Stat(state=fields[0], session=int(fields[3]), start_ticks=int(fields[19]))
