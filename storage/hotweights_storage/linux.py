"""What Linux offers and other systems do not, each with what is done where it is missing.

Nodes run Linux. Publishing, planning, replicating and trying things out also work on a developer's
macOS, a little slower: memory is an unlinked file there, which nothing seals.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hotweights_common import cgroups

O_PATH: int = getattr(os, "O_PATH", os.O_RDONLY)
O_DIRECT: int = getattr(os, "O_DIRECT", 0)
MFD_NOEXEC_SEAL = 0x8  # linux/memfd.h; Python has no name for it yet
MAX_DESCRIPTORS = 1 << 20  # enough for 500 TiB in slabs; as much as most systems allow
IS_LINUX = sys.platform == "linux"


def processors(root: Path = Path("/")) -> int:
    """How many processors this process may keep busy: as many as it may run on
    (sched_getaffinity(2)), and no more than the quotas of its control groups come to (cpu.max of
    v2, cpu.cfs_quota_us of v1); at least one.
    """
    if not IS_LINUX:
        return os.cpu_count() or 1
    return max(1, min([len(os.sched_getaffinity(0)), *_quotas(root)]))


def _quotas(root: Path) -> Iterator[int]:
    for folder, unified in cgroups.folders("cpu", root):
        if unified:
            quota = cgroups.words(folder / "cpu.max")  # "max 100000" where there is none
        else:
            quota = [
                *cgroups.words(folder / "cpu.cfs_quota_us"),  # -1 where there is none
                *cgroups.words(folder / "cpu.cfs_period_us"),
            ]
        if len(quota) == 2 and quota[0].isdecimal():
            yield -(-int(quota[0]) // int(quota[1]))


def raise_descriptor_limit() -> int:
    """Let this process open as many files as its hard limit allows, and say how many: a slab is
    two while it arrives and one afterwards, and 520 GiB of them pass the usual soft limit of 1024,
    which is for programs that use select(2) (https://0pointer.net/blog/file-descriptor-limits.html).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # children inherit it, and some close every descriptor that might be
    most = min(hard, MAX_DESCRIPTORS) if hard != resource.RLIM_INFINITY else MAX_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # macOS takes less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def forget_pages(fd: int) -> None:
    """Let go of a file's pages in the cache, as far as the system knows how (posix_fadvise(2));
    what is not written yet stays.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous_memory(name: str, nbytes: int) -> tuple[int, int]:
    """Descriptors of new memory: one that writes, and one that only reads (memfd_create(2)). The
    caller closes both. Raises `OSError`.
    """
    if hasattr(os, "memfd_create"):
        path, writer = "", _memfd(name)
    else:
        writer, path = tempfile.mkstemp(prefix=f"{name}-")
    try:
        os.ftruncate(writer, nbytes)
        # opened anew: a copy of the descriptor would write too
        return writer, os.open(path or f"/proc/self/fd/{writer}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        os.close(writer)
        raise
    finally:
        if path:
            os.unlink(path)  # noqa: PTH108


def _memfd(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | MFD_NOEXEC_SEAL)
    except OSError as error:
        # kernels before 6.3 do not know the flag; those that do may insist on it
        # (vm.memfd_noexec=2, https://docs.kernel.org/userspace-api/mfd_noexec.html)
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)


def seal(writer: int) -> None:
    """Forbid every change of that memory, for ever, where the system can (F_ADD_SEALS, fcntl(2)).
    Raises `OSError`: EBUSY while somebody maps it writable or its pages are pinned.
    """
    if hasattr(fcntl, "F_ADD_SEALS"):
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(writer, fcntl.F_ADD_SEALS, seals)


def is_sealed(fd: int) -> bool:
    """Whether that memory can never change again, as far as the system can say. Raises `OSError`
    for what is no such memory.
    """
    if not hasattr(fcntl, "F_GET_SEALS"):
        return False
    wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & wanted == wanted
