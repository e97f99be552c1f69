"""Where things are kept: one cache folder outside the tree, and in it a folder for each cluster.

Binaries, images and clusters live under `$HOTWEIGHTS_CACHE` (default `~/.cache/hotweights`), so
that a fresh clone starts quickly and `git clean` costs nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from localcluster.errors import ClusterError
from localcluster.progress import say

DEFAULT_NAME = "hotweights"
HACK = Path(__file__).resolve().parent.parent
"""The folder that holds this package and the pinned Go modules."""

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,28}[a-z0-9])?")
_LOCK_POLL_SECONDS = 0.2


def cache() -> Path:
    """The cache folder, created if need be."""
    configured = os.environ.get("HOTWEIGHTS_CACHE")
    folder = Path(configured).expanduser() if configured else Path.home() / ".cache" / "hotweights"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def clusters() -> Path:
    """The folder that holds one state folder for each cluster."""
    folder = cache() / "cluster"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def valid_name(name: str) -> str:
    """The name itself, refused where it could not be part of file, namespace and cgroup names."""
    if not _NAME.fullmatch(name):
        raise ClusterError(
            f"{name!r} is no name for a cluster: use at most 30 lower-case letters, digits and "
            "dashes, beginning with a letter and not ending with a dash."
        )
    return name


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file so that a reader sees the old text or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    temporary.replace(path)


def discard(folder: Path) -> None:
    """Delete a folder: out of sight at once, off the disk by a process of its own.

    A node's images are tens of thousands of files, and where the file system tells the disk about
    each deleted block, deleting them takes longer than bringing the cluster up. What a killed
    deletion leaves goes with the next one.
    """
    trash = cache() / "trash"
    trash.mkdir(exist_ok=True)
    try:
        folder.rename(trash / f"{folder.name}-{secrets.token_hex(8)}")
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.rmtree(folder)  # on another file system
    left = [str(path) for path in trash.iterdir()]
    subprocess.run(
        ["setsid", "--fork", "rm", "-rf", "--", *left],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )


@contextmanager
def locked(lock: Path, what: str, timeout_seconds: float) -> Iterator[None]:
    """Hold a lock file; the kernel releases it with the process, so a killed holder blocks
    nobody.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_seconds
    with lock.open("w") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    say(f"waiting for another process that is busy with {what}")
                    told = True
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"Another process has been busy with {what} for {timeout_seconds:.0f} s (it "
                    f"holds {lock}). `fuser {lock}` names it."
                )
            time.sleep(_LOCK_POLL_SECONDS)
        yield
