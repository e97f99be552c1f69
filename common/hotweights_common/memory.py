"""How much memory this process may still take.

The node's MemAvailable and every memory limit of the control groups above this process count, v2
and v1; what a group holds in inactive page cache counts as free, because the kernel gives it up
first. It is an answer about now: nothing is reserved. The standard library alone: it goes into
vLLM's processes with the plugin.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hotweights_common import cgroups

# cgroup v1 shows a group without a limit as the largest number of pages: close to 2**63 bytes
_V1_WITHOUT_LIMIT = 1 << 60


class _Names(NamedTuple):
    limit: str
    usage: str
    inactive: str  # a line of memory.stat


_V2 = _Names("memory.max", "memory.current", "inactive_file")
_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_nbytes(root: Path = Path("/")) -> int:
    """The least of what the node and the control groups leave, in bytes; below 0 where a group is
    over its limit. Raises OSError where the node does not say. ``root`` is for tests.
    """
    return min([_node(root / "proc/meminfo"), *_groups(root)])


def _node(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{meminfo} does not say MemAvailable; a kernel since 3.14 does")


def _groups(root: Path) -> Iterator[int]:
    """What each limited group on the way up leaves."""
    for folder, unified in cgroups.folders("memory", root):
        names = _V2 if unified else _V1
        most, used = _number(folder / names.limit), _number(folder / names.usage)
        if most is not None and used is not None and most < _V1_WITHOUT_LIMIT:
            yield most - used + _inactive(folder / "memory.stat", names.inactive)


def _number(path: Path) -> int | None:
    text = "".join(cgroups.words(path))
    return int(text) if text.isdecimal() else None  # "max"


def _inactive(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)
