"""The refusal before the first byte where memory is too little (`hotweights_common.memory` looks)."""

from __future__ import annotations

from pathlib import Path

from hotweights_common import memory
from hotweights_storage.errors import NoCapacity


def available_nbytes(root: Path = Path("/")) -> int:
    """The least of what the node and the control groups leave, in bytes; below 0 where a group is
    over its limit. Raises `NoCapacity` where the node does not say. ``root`` is for tests.
    """
    try:
        return memory.available_nbytes(root)
    except OSError as error:
        raise NoCapacity(str(error)) from error


def check_capacity(nbytes: int, reserve_nbytes: int = 0, root: Path = Path("/")) -> None:
    """Raise `NoCapacity` unless ``nbytes`` fit and leave ``reserve_nbytes``. It reads /proc and
    /sys/fs/cgroup, so it may be asked from any thread.
    """
    available = available_nbytes(root)
    if nbytes + reserve_nbytes > available:
        text = (
            f"needs {nbytes} bytes of memory, and {reserve_nbytes} are to stay free; "
            f"{max(available, 0)} are available"
        )
        raise NoCapacity(
            f"{text}: raise the agent's memory limit, or release a version on this node"
        )
