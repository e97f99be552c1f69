"""What Linux offers and other systems do not, each with what is done where it is missing.

Nodes run Linux. Publishing, planning, replicating and trying things out also work on a developer's
macOS, a little slower: memory is an unlinked file there, which nothing seals.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import tempfile

O_PATH: int = getattr(os, "O_PATH", os.O_RDONLY)
O_DIRECT: int = getattr(os, "O_DIRECT", 0)
MFD_NOEXEC_SEAL = 0x8  # linux/memfd.h; Python has no name for it yet
IS_LINUX = sys.platform == "linux"


def processors() -> int:
    """How many processors this process may use (sched_getaffinity(2)); quotas of control groups are
    not looked at.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
