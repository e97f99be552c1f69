"""Is there room for a second copy of the weights? Looked at before its first byte is taken: on a CPU
the kernel ends the serving process instead of refusing memory, and on a GPU serving itself may need
what is left a second later.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from hotweights_common import memory

# of the copy: finishing a layer packs it before the unpacked weights go
OVERHEAD = 0.1
RESERVE_NBYTES = 256 << 20  # for what serving allocates while a version is prepared
_MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
MAPPINGS_SHARE = 0.5
"""Of the mappings that the kernel allows a process, so many may be in use with a version's: the
rest is for the threads and allocations of the engine, which would fail at the limit.
"""


class NoRoom(Exception):
    """The message says what is needed, what there is, and the remedy."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a rank may take beside what serves, in bytes."""

    device_nbytes: int
    host_nbytes: int | None
    """Of the host, where the device has memory of its own; None: it is the same memory."""
    where: str
    """Where the first is, as a message says it."""
    remedy: str

    @staticmethod
    def with_overhead(nbytes: int) -> int:
        """What finishing so much takes."""
        return int(nbytes * (1 + OVERHEAD)) + RESERVE_NBYTES

    def check(self, nbytes: int) -> None:
        """Raise `NoRoom` unless so much can be finished on the device."""
        needed = self.with_overhead(nbytes)
        if needed > self.device_nbytes:
            raise NoRoom(
                f"a second copy of the weights needs {gib(needed)} and "
                f"{gib(max(self.device_nbytes, 0))} are free {self.where}: {self.remedy}; what is "
                "served stays"
            )


def measure(device: torch.device) -> Room:
    """As it is now."""
    host = memory.available_nbytes()
    if device.type == "cpu":
        where = "within this container's memory limit"
        return Room(host, None, where, "raise the limit by the size of the weights")
    remedy = "lower --gpu-memory-utilization by the share of the weights"
    return Room(_free_on(device), host, f"on {device}", remedy)


def check_mappings(count: int) -> None:
    """Raise `NoRoom` unless this process may map so many ranges more."""
    try:
        limit = int(_MAX_MAP_COUNT.read_text())
        with Path("/proc/self/maps").open("rb") as maps:
            used = sum(1 for _ in maps)
    except (OSError, ValueError):
        return  # a sandbox that shows neither keeps its own count
    if used + count > limit * MAPPINGS_SHARE:
        raise NoRoom(
            f"the version lies in {count} pieces, this process has {used} mappings, and of the "
            f"{limit} that vm.max_map_count allows half stay free for serving: raise it on the "
            f"node (sysctl -w vm.max_map_count={4 * max(limit, used + count)})"
        )


def _free_on(device: torch.device) -> int:
    """What the driver has, and what torch keeps for itself without using it."""
    backend = torch.get_device_module(device)
    free, _ = backend.mem_get_info(device)
    return int(free + backend.memory_reserved(device) - backend.memory_allocated(device))


def gib(nbytes: int) -> str:
    """As messages say it."""
    return f"{nbytes / 2**30:.2f} GiB"
