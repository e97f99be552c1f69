"""A block of memory that weights lie in: a memfd that the agent fills, seals and hands to engines.

Bytes are put in with ``pwrite``: the kernel then takes fresh pages without zeroing them first and
without a fault per page, which is what costs most on a CPU host; and nothing of it is mapped here,
so that sealing never waits for anybody. Sealing forbids every change for ever. Engines and peers
only ever get a second, read-only descriptor, which exists from the start, so that verified chunks
can be sent while others still arrive (and which kernels before 6.7 need, to map a sealed memfd
shared).

Versions share slabs, so a slab counts its users and is freed with the last. It knows nothing of
chunks.
"""

from __future__ import annotations

import errno
import os
import threading
import time

from hotweights_planner.layout import page_rounded
from hotweights_storage import linux
from hotweights_storage.errors import TransferError

STAT_BLOCK_NBYTES = 512  # of stat(2)'s st_blocks, whatever the file system's own blocks are
# The kernel waits 75 ms for pages that somebody holds (memfd_wait_for_pins, mm/memfd.c), and a
# reader that lost its processor in the middle of a page holds it until it runs again.
SEAL_SECONDS = 10.0
_SEAL_AGAIN_SECONDS = 0.01


class Slab:
    """``nbytes`` of shared memory. Born with one user; every `retain` is answered by one
    `release`. Any thread may call anything, but nothing after the last `release`. The constructor
    raises `OSError`.
    """

    def __init__(self, nbytes: int, name: str = "hotweights-slab") -> None:
        self.nbytes = nbytes
        self.stored_nbytes = 0
        """Memory that it takes, in bytes: whole pages of what was written; the rest is a hole."""
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._users = 1
        self._writer, self._reader = linux.anonymous_memory(name, nbytes)

    @classmethod
    def adopt(cls, reader: int) -> Slab:
        """A slab that somebody else made and sealed, by its read-only descriptor, which is the
        slab's from now on. Raises `OSError`; `TransferError` (and closes it) when it is not sealed.
        """
        if not linux.is_sealed(reader):
            os.close(reader)
            raise TransferError("what was kept is not sealed: nobody knows what is in it")
        slab = cls.__new__(cls)
        found = os.fstat(reader)
        slab.nbytes, slab.stored_nbytes = found.st_size, found.st_blocks * STAT_BLOCK_NBYTES
        slab._lock, slab._writing = threading.Lock(), threading.Lock()
        slab._users, slab._writer, slab._reader = 1, -1, reader
        return slab

    @property
    def fd(self) -> int:
        """A read-only descriptor, valid until the last `release`."""
        return self._reader

    @property
    def sealed(self) -> bool:
        """Whether it can never change again."""
        return self._writer < 0

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Put ``data`` at ``offset`` (bytes), once. Several threads may, in different places. Raises
        `OSError` when there is no memory, and once it is sealed.
        """
        view = memoryview(data).cast("B")
        taken = page_rounded(len(view))
        with self._writing:  # the kernel lets in one at a time, and has the others spin
            while view:
                written = os.pwrite(self._writer, view, offset)
                offset, view = offset + written, view[written:]
            self.stored_nbytes += taken

    def read(self, offset: int, nbytes: int) -> bytes:
        """A copy of what is there: fewer bytes where the slab ends before."""
        return os.pread(self._reader, nbytes, offset)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with what is at ``offset``. Raises `TransferError` where the slab ends
        before.
        """
        while view:
            done = os.preadv(self._reader, [view], offset)
            if not done:
                raise TransferError(f"a slab of {self.nbytes} bytes ends before {offset}")
            offset, view = offset + done, view[done:]

    def seal(self) -> None:
        """Forbid every change, for ever. Doing it twice changes nothing. Waits up to `SEAL_SECONDS`
        for others that are reading a page just now; then it raises `OSError` as `linux.seal` does,
        and may be tried again.
        """
        end = time.monotonic() + SEAL_SECONDS
        while not self._try_seal(last=time.monotonic() > end):
            time.sleep(_SEAL_AGAIN_SECONDS)

    def _try_seal(self, *, last: bool) -> bool:
        """Whether it is sealed now, or was freed before. The last try raises what it comes to."""
        with self._lock:
            if self._writer < 0:
                return True
            try:
                linux.seal(self._writer)
            except OSError as error:
                if last or error.errno != errno.EBUSY:
                    raise
                return False
            os.close(self._writer)
            self._writer = -1
            return True

    def retain(self) -> Slab:
        """One user more. Raises `TransferError` when the last one has released it."""
        with self._lock:
            if self._users == 0:
                raise TransferError(
                    "the slab is already freed; retain it while somebody else still does"
                )
            self._users += 1
            return self

    def release(self) -> None:
        """One user less; the last one frees it (engines that mapped it keep the memory until they
        unmap it).
        """
        with self._lock:
            self._users -= 1
            if self._users:
                return
            for fd in {self._writer, self._reader} - {-1}:  # -1: sealed, and closed with it
                os.close(fd)
            self._writer = self._reader = -1


def sealed_memfd(content: bytes, name: str = "hotweights-table") -> Slab:
    """A small sealed slab with ``content``: the table beside the weights."""
    slab = Slab(len(content), name)
    slab.write(0, content)
    slab.seal()
    return slab
