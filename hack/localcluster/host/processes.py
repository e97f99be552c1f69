"""Daemons that outlive the command that started them, and how to find exactly those again.

A process id alone is a bad name: the kernel hands it out again. A record therefore holds the id,
the process's start time and the boot it belongs to; whoever does not match all three is not ours
and is left alone. Signals go through a pidfd, which cannot change its owner between the check and
the kill. Nothing is ever looked up by a program's name.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from localcluster.errors import ClusterError, with_log
from localcluster.host import launch

_LAUNCHED_WITHIN_SECONDS = 60.0
_POLL_SECONDS = 0.05
_GONE = frozenset("ZX")


@dataclass(frozen=True, slots=True)
class Record:
    """Who a daemon is."""

    name: str
    pid: int
    started_ticks: int
    boot: str
    argv: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Record:
        """Read what `launch` wrote."""
        values = json.loads(text)
        return cls(
            values["name"],
            values["pid"],
            values["started_ticks"],
            values["boot"],
            tuple(values["argv"]),
        )

    def alive(self, proc: Path = Path("/proc")) -> bool:
        """Whether this very process still runs; a zombie does not."""
        if (proc / "sys/kernel/random/boot_id").read_text().strip() != self.boot:
            return False
        try:
            state, started_ticks = launch.stat_fields((proc / str(self.pid) / "stat").read_text())
        except (FileNotFoundError, ProcessLookupError):
            return False
        return started_ticks == self.started_ticks and state not in _GONE


def this_process() -> Record:
    """The record of the calling process, for owners of temporary clusters."""
    _, started_ticks = launch.stat_fields(Path("/proc/self/stat").read_text())
    return Record("owner", os.getpid(), started_ticks, launch.BOOT_ID.read_text().strip())


class Daemons:
    """The daemons of one state folder: `run/NAME.json` says who they are, `logs/NAME.log` what they
    say.
    """

    def __init__(self, state: Path) -> None:
        self._records = state / "run"
        self._logs = state / "logs"

    def log(self, name: str) -> Path:
        """Where a daemon's output goes."""
        return self._logs / f"{name}.log"

    def names(self) -> list[str]:
        """Every daemon that was started and not stopped, dead or alive."""
        return sorted(path.stem for path in self._records.glob("*.json"))

    def record(self, name: str) -> Record | None:
        """The record of a daemon that was started and not stopped."""
        try:
            return Record.parse((self._records / f"{name}.json").read_text())
        except FileNotFoundError:
            return None

    def alive(self, name: str) -> bool:
        """Whether the daemon runs."""
        record = self.record(name)
        return record is not None and record.alive()

    def start(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        cgroups: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,  # added to this process's own
    ) -> None:
        """Start a daemon in a session of its own. Returns once it is on record, not once it is
        ready.
        """
        if self.alive(name):
            return
        self._records.mkdir(parents=True, exist_ok=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        record = self._records / f"{name}.json"
        record.unlink(missing_ok=True)
        launcher = [
            sys.executable,
            "-I",
            "-S",
            launch.__file__,
            str(os.getpid()),
            str(record),
            *map(str, cgroups),
        ]
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        pid = os.posix_spawn(
            sys.executable,
            [*launcher, "--", *map(str, argv)],
            {**os.environ, **(environment or {})},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(self.log(name)), append, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        deadline = time.monotonic() + _LAUNCHED_WITHIN_SECONDS
        while not record.exists():
            # one that is brief may have written it and ended since it was looked for
            if (_has_exited(pid) and not record.exists()) or time.monotonic() > deadline:
                _reaped(pid)
                raise with_log(f"{name} could not be launched.", self.log(name))
            time.sleep(_POLL_SECONDS / 10)

    def stop(self, name: str, *, grace_seconds: float = 10.0) -> None:
        """End a daemon: SIGTERM, and SIGKILL after the grace; with no grace, SIGKILL at once."""
        record = self.record(name)
        if record is not None:
            end(record, grace_seconds=grace_seconds)
            (self._records / f"{name}.json").unlink(missing_ok=True)

    def stop_all(self, *, grace_seconds: float = 0.0) -> None:
        """End every daemon on record."""
        for name in self.names():
            self.stop(name, grace_seconds=grace_seconds)

    def must_live(self, *names: str) -> None:
        """Raise, quoting its log, if one of these has died."""
        for name in names:
            if not self.alive(name):
                raise with_log(f"{name} has died.", self.log(name))

    def wait_until(
        self, ready: Callable[[], bool], what: str, *, needs: Sequence[str], timeout_seconds: float
    ) -> None:
        """Wait until `ready()`, no longer than the deadline, and not on daemons that have died."""
        deadline = time.monotonic() + timeout_seconds
        while not ready():
            self.must_live(*needs)
            if time.monotonic() > deadline:
                logs = ", ".join(str(self.log(name)) for name in needs)
                raise ClusterError(f"{what}: not within {timeout_seconds:.0f} s. Read {logs}.")
            time.sleep(_POLL_SECONDS)


def end(record: Record, *, grace_seconds: float) -> None:
    """End the recorded process, if it is still the one, and wait until it is gone."""
    with _pidfd(record) as descriptor:
        if descriptor is None:
            return
        if grace_seconds > 0:
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            if _exited(descriptor, grace_seconds):
                return
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        if not _exited(descriptor, _LAUNCHED_WITHIN_SECONDS):
            raise ClusterError(
                f"{record.name} (process {record.pid}) does not die of SIGKILL: it hangs in the "
                f"kernel. Read /proc/{record.pid}/stack and dmesg."
            )


@contextmanager
def _pidfd(record: Record) -> Iterator[int | None]:
    """A handle on the recorded process, or None if it is gone; reaps it afterwards where it is our
    child.
    """
    try:
        descriptor = os.pidfd_open(record.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        # Only now the check: from here on the handle cannot mean another process.
        yield descriptor if record.alive() else None
    finally:
        os.close(descriptor)
        if not record.alive():
            _reaped(record.pid)


def _exited(descriptor: int, timeout_seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_seconds * 1000))


def _has_exited(pid: int) -> bool:
    """Whether a child has ended; it is left to be collected."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def _reaped(pid: int) -> bool:
    """Collect the exit of a child, if it is ours and has ended."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return False
