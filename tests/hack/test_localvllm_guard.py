"""What is started in a session of its own ends with who started it, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from localvllm.guard import Guard

STARTER = """
import os, subprocess, sys, time
from localvllm.guard import Guard

# a leader and a child of it, as a vLLM with its engine
command = "sleep 600 & echo $!; wait"
leader = subprocess.Popen(["/bin/sh", "-c", command], start_new_session=True)
guard = Guard(leader.pid)
print(leader.pid, flush=True)
time.sleep(600)
"""


def ended(pid: int) -> bool:
    """Gone, or a zombie that nobody has asked after."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_starter_that_is_killed_leaves_nothing() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        pids = [int(starter.stdout.readline()) for _ in range(2)]
        assert not any(map(ended, pids))
        starter.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 50.0
    while not all(map(ended, pids)):
        assert time.monotonic() < deadline, f"{pids} live on"
        time.sleep(0.01)


def test_a_group_that_has_ended_is_let_go() -> None:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as sleeper:
        guard = Guard(sleeper.pid)
        guard.dismiss()
        assert sleeper.poll() is None, "the guard has ended, and the group has not"
        os.killpg(sleeper.pid, signal.SIGKILL)
