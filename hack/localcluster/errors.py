"""What goes wrong, said so that the reader knows what to do next.

One exception type is enough: nobody who starts a cluster can do more about a failure than read the
message. So the message carries the last lines of the log that explains it, and the next step.
"""

from __future__ import annotations

from pathlib import Path

_TAIL_NLINES = 20


class ClusterError(Exception):
    """A cluster, a build or an image could not be brought up; the message says what to do next."""


def tail(log: Path, nlines: int = _TAIL_NLINES) -> str:
    """The last lines of a log, indented, or a line saying that there is none."""
    try:
        lines = log.read_text(errors="replace").splitlines()[-nlines:]
    except FileNotFoundError:
        return f"    (there is no {log})"
    return "\n".join(f"    {line}" for line in lines) or f"    ({log} is empty)"


def with_log(message: str, log: Path) -> ClusterError:
    """An error that quotes the end of the log in which its cause stands."""
    return ClusterError(f"{message}\nThe last lines of {log}:\n{tail(log)}")
