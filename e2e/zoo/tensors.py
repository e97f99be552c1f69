"""One architecture without an engine: a model is switched there and back, by each way, and must
then hold in every tensor what a cold load of that version holds.

It takes a second or two, where `play` takes minutes, and sees what no token shows. It does not run
the model.
"""

from __future__ import annotations

import os
import re
import time

from e2e.engine import images
from e2e.zoo import checkpoints
from e2e.zoo.architectures import Architecture
from e2e.zoo.forks import Forks, Unanswered
from e2e.zoo.row import STEPS, Row, Switch
from localcluster import ClusterError
from localvllm.build import BuildError

A_PART = re.compile(r"differs from what serves in (\d+) of (\d+) parts")


def compare(architecture: Architecture, forks: Forks) -> Row:
    """``forks`` runs `inside.tensors`. What goes wrong is in the row."""
    row, began = Row(architecture.name, architecture.kind), time.monotonic()
    logged = forks.log.stat().st_size if forks.log.exists() else 0
    try:
        _compare(architecture, forks, row)
    except (BuildError, Unanswered) as error:
        row.not_run = str(error)
    except (ClusterError, OSError) as error:
        row.failed = f"{type(error).__name__}: {error}"
    if forks.log.exists():
        row.part = smallest_part(forks.log.read_bytes()[logged:].decode(errors="replace"))
    row.seconds = round(time.monotonic() - began, 1)
    return row


def _compare(architecture: Architecture, forks: Forks, row: Row) -> None:
    models = checkpoints.versions(architecture)
    built = {name: images.build(images.read(path), version=name) for name, path in models.items()}
    try:
        handed = {
            name: {"digest": image.digest, "fds": [_path(fd) for fd in image.fds]}
            for name, image in built.items()
        }
        folders = {name: str(path) for name, path in models.items()}
        answer = forks.ask({"models": folders, "images": handed, "steps": STEPS})
    finally:
        for image in built.values():
            image.close()
    if not answer["apart"]:
        raise Unanswered("both versions hold the same: whatever was copied, it would pass")
    row.switches = [Switch(**switch) for switch in answer["switches"]]


def smallest_part(log: str) -> str:
    """What a rank's log says of the version of which it did the least; empty: it did all of each.
    Two versions may share a part of the model too, which their constructor made equal.
    """
    found = [(int(few), int(every)) for few, every in A_PART.findall(log)]
    return "{} of {}".format(*min(found)) if found else ""


def _path(fd: int) -> str:
    """By which another process opens what this one has open."""
    return f"/proc/{os.getpid()}/fd/{fd}"
