"""Running other programs to their end: an argument list, a deadline, and an error that quotes them.

Nothing here goes through a shell. Programs that stay (etcd, kubelets) are `processes`' business.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from localcluster.errors import ClusterError

_ERROR_NLINES = 20


def run(
    argv: Sequence[str | Path],
    *,
    timeout_seconds: float = 30,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,  # added to this process's own
    file: IO[bytes] | None = None,  # its stdin; by default empty
    hint: str = "",  # what to do when it fails, put at the end of the message
) -> str:
    """Run a program, give back its stdout, raise with its last words if it fails or overstays."""
    words = [str(word) for word in argv]
    shown = shlex.join(words)
    try:
        done = subprocess.run(
            words,
            input=None if file else b"",
            stdin=file,
            capture_output=True,
            timeout=timeout_seconds,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            check=False,
        )
    except FileNotFoundError as error:
        raise ClusterError(
            f"{words[0]} is not installed. {hint or 'Try: python -m localcluster preflight'}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(
            f"`{shown}` did not end within {timeout_seconds:.0f} s. {hint}".rstrip()
        ) from error
    if done.returncode != 0:
        output = (done.stdout + done.stderr).decode(errors="replace")
        said = "\n".join(f"    {line}" for line in output.splitlines()[-_ERROR_NLINES:])
        raise ClusterError(
            f"`{shown}` failed with status {done.returncode}:\n{said}\n{hint}".rstrip()
        )
    return done.stdout.decode(errors="replace")


def succeeds(argv: Sequence[str | Path], *, timeout_seconds: float = 30) -> bool:
    """Whether a program ends with status 0; for questions and for removing what may be gone
    already.
    """
    try:
        run(argv, timeout_seconds=timeout_seconds)
    except ClusterError:
        return False
    return True
