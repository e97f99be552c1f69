"""Opens files beneath a folder, and never anything outside of it, whatever links somebody puts
there, and whenever.

The kernel does it with ``openat2(RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS)``; links that stay
beneath the folder are followed (the Hugging Face cache consists of them). Where that call is
missing or filtered, the resolved path is compared and then walked again from the folder's
descriptor, following no link at all, so that nothing can change in between.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from hotweights_storage import linux

_OPENAT2 = 437  # the same number on every architecture
_BENEATH_WITHOUT_MAGIC = 0x08 | 0x02  # linux/openat2.h; Linux 5.6 and later have the call
_RETRIES = 16  # EAGAIN: something was renamed meanwhile


class Escapes(OSError):
    """The path leads out of its root."""


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_libc = ctypes.CDLL(None, use_errno=True)


def open_beneath(root: Path, relative: str, flags: int) -> int:
    """A descriptor of ``root/relative``, which the caller closes; ``relative`` '' is the root
    itself. Raises `Escapes` if that is elsewhere, else the usual `OSError`.
    """
    root_fd = os.open(root, linux.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not linux.IS_LINUX:
            return walk_beneath(root, root_fd, relative, flags | os.O_CLOEXEC)
        try:
            return _openat2(root_fd, relative or ".", flags | os.O_CLOEXEC)
        except OSError as error:
            # an old kernel, or a seccomp filter: some answer EPERM
            if error.errno not in (errno.ENOSYS, errno.EPERM):
                raise
            return walk_beneath(root, root_fd, relative, flags | os.O_CLOEXEC)
    finally:
        os.close(root_fd)


def _openat2(root_fd: int, relative: str, flags: int) -> int:
    how = _OpenHow(flags, 0, _BENEATH_WITHOUT_MAGIC)
    path = os.fsencode(relative)
    for _ in range(_RETRIES):
        fd = int(_libc.syscall(_OPENAT2, root_fd, path, ctypes.byref(how), ctypes.sizeof(how)))
        if fd >= 0:
            return fd
        if ctypes.get_errno() != errno.EAGAIN:
            break
    code = ctypes.get_errno()
    kind = Escapes if code == errno.EXDEV else OSError
    raise kind(code, os.strerror(code), relative)


def walk_beneath(root: Path, root_fd: int, relative: str, flags: int) -> int:
    """The same without ``openat2``: ``root_fd`` is a descriptor of ``root``, from which every
    folder is opened in turn.
    """
    base = root.resolve(strict=True)
    # not Path.resolve: before Python 3.13 that answers a loop of links with a RuntimeError
    target = Path(os.path.realpath(base / relative, strict=True))
    if not target.is_relative_to(base):
        raise Escapes(errno.EXDEV, os.strerror(errno.EXDEV), relative)
    *folders, last = target.relative_to(base).parts or (".",)
    at = os.dup(root_fd)
    try:
        # the resolved path has no links, so one that is met now was put there since
        for folder in folders:
            below = os.open(
                folder, linux.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at
            )
            os.close(at)
            at = below
        return os.open(last, flags | os.O_NOFOLLOW, dir_fd=at)
    finally:
        os.close(at)
