"""Ends a group of processes when whoever started it is gone.

vLLM runs in a session of its own, so that all of its processes can be ended at once; a test run that
is killed ends none of them. PR_SET_PDEATHSIG (prctl(2)) reaches no grandchildren, and comes when the
thread ends that started the child, so a shell waits at a pipe instead: its other end is this
process's alone, and the kernel closes it whatever ends this process.
"""

from __future__ import annotations

import contextlib
import subprocess

SECONDS = 30.0  # for a shell that only has to end, on a busy machine


class Guard:
    """Of the process group ``group``, which is killed unless `dismiss` comes first."""

    def __init__(self, group: int) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r word || kill -s KILL -- "-$0"', str(group)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a group that has ended by itself
            start_new_session=True,  # else it would end with the group of this process
        )

    def dismiss(self) -> None:
        """The group has ended, and its number may become another's. Once."""
        with contextlib.suppress(BrokenPipeError):
            self._shell.communicate(b"dismissed\n", timeout=SECONDS)
