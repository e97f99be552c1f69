"""Where the kernel's files about this process' control groups are.

Every group above counts: a pod's limit holds for its containers too, and a slice's for its pods.
Both hierarchies are known, v2 and v1. What stands in the files is read by whoever asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def folders(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, bool]]:
    """The folder of each group on the way up, the own one first, and whether it is v2's; as far as
    this container's view goes, so not all of them need be there. ``root`` is for tests.
    """
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # v2's line is ``0::/path`` (cgroups(7))
            mount, unified = root / "sys/fs/cgroup", True
        elif controller in controllers.split(","):
            mount, unified = root / "sys/fs/cgroup" / controller, False
        else:
            continue
        relative = PurePosixPath(path.lstrip("/"))
        for group in (relative, *relative.parents):
            yield mount / group, unified


def words(file: Path) -> list[str]:
    """What stands in a file, by blanks; nothing where it cannot be read: it is not in this
    container's view, or the root group, which has none.
    """
    try:
        return file.read_text().split()
    except OSError:
        return []
