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
    """A rank said no, for a reason of the wire's; the message names the rank."""


class EngineDead(Exception):
    """vLLM's engine process has ended (its ``EngineDeadError``); nothing can be repaired here."""


def end_process(reason: str) -> None:
    """End this server and everything it started: the container restarts, into the boot barrier.

    By itself a vLLM whose engine died exits with 0, which a restart policy may take for success.
    """
    logger.critical("Ending this process: %s", reason)
    logging.shutdown()  # ``_exit`` flushes nothing
    import psutil  # every vLLM has it

    # children first: without this process they would be nobody's, and hold GPU and port
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(1)  # not sys.exit: this may be any thread, or an ``atexit`` function
