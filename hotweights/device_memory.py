"""How much memory the smallest device leaves, for buckets that fit everywhere.

With NVIDIA GPUs it is the GPU with the least free memory, as the driver's own tool reports it (no
library, no context on the GPU); else what the host leaves this process. It is an answer about now:
nothing is reserved.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import NamedTuple

from hotweights_storage.capacity import available_nbytes

# one number a line, in MiB; see nvidia-smi --help-query-gpu
QUERY = ("--query-gpu=memory.free", "--format=csv,noheader,nounits")
TIMEOUT_SECONDS = 10.0  # a driver that hangs must not hang a command
MIN_BUCKET_NBYTES = 1 << 20  # the smallest that ``plan --bucket-mb`` can name
MAX_BUCKET_NBYTES = 1 << 30


class Free(NamedTuple):
    """Free memory in bytes, and of what, in words."""

    nbytes: int
    device: str


def free_memory() -> Free:
    """What is free on the GPU that has least, or on the host where no GPU answers."""
    gpus = _gpus()
    if gpus:
        return Free(min(gpus), f"the smallest of {len(gpus)} GPUs" if len(gpus) > 1 else "the GPU")
    return Free(available_nbytes(), "the host (no GPU answers)")


def suggested_bucket_nbytes(alpha: float, free: Free) -> int:
    """``alpha`` of the free memory in bytes, rounded down to whole MiB, between 1 MiB and 1 GiB."""
    return max(MIN_BUCKET_NBYTES, min(int(alpha * free.nbytes) >> 20 << 20, MAX_BUCKET_NBYTES))


def _gpus() -> list[int]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        done = subprocess.run(
            [tool, *QUERY], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    return [int(line) << 20 for line in done.stdout.split("\n") if line.strip().isdecimal()]
