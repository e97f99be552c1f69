"""What can go wrong with an engine, and the last resort.

    RankError    a rank said no; nothing is broken by that alone
    CommitError  this commit did not happen
    EngineDead   there is no engine any more: `end_process`

The container's restart is the only repair that always works, because it ends in the boot barrier.
"""

from __future__ import annotations

import contextlib
import logging
import os

logger = logging.getLogger("vllm.hotweights.errors")


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
    import psutil  # every vLLM has it

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(1)
