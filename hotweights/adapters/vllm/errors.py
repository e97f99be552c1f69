"""What can go wrong with an engine, and the last resort.

    RankError    a rank said no; nothing is broken by that alone
    CommitError  this commit did not happen
    EngineDead   there is no engine any more: `end_process`

The container's restart is the only repair that always works, because it ends in the boot barrier.
"""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

logger = logging.getLogger("vllm.hotweights.faults")


class CommitError(Exception):
    """``reason`` is one of the wire's."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class RankError(CommitError):
    """A rank said no."""


class EngineDead(Exception):
    """vLLM's engine process has ended."""


def end_process(reason: str) -> None:
    """End this server and everything it started: the container restarts, into the boot barrier.

    By itself a vLLM whose engine died exits with 0, which a restart policy may take for success.
    """
    logger.critical("Ending this process: %s", reason)
    logging.shutdown()
    for pid in _descendants(os.getpid()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    os._exit(1)


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [
            int(child) for task in tasks for child in (task / "children").read_text().split()
        ]
    except OSError:
        return found
    for child in children:
        found += [*_descendants(child), child]
    return found
