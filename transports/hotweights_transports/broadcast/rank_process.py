"""A node's end of one rank: the ring that they share, the posts to it, and its death.

The proxy is started with an argument list that `launch_line` checked; the rank that it starts
inherits the ring and one end of a socket pair, so nobody else can be taken for it. Slots are
broadcast in the order in which they are posted. Whatever becomes of the rank, the node hears it
here as `MpiFailed`, within the time it is ready to wait.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Final, Self

from hotweights_transports.broadcast import mpi_program
from hotweights_transports.broadcast.hydra import END_SECONDS, START_SECONDS, MpiFailed, environment

LEFTOVERS: Final = ("dev/shm/mpich_shm_*", "tmp/hydra_hwloc_xmlfile_*")
LEFTOVER_SECONDS: Final = 5 * START_SECONDS  # no rank that is still beginning is as old


def sweep() -> None:
    """Remove what ranks of ours left that were killed while MPI began: a megabyte each in
    ``/dev/shm``, which has 64 in a container, and the map of the host that every mpiexec writes.
    Files of others, of living ranks and young ones stay.
    """
    old = [
        path for pattern in LEFTOVERS for path in Path("/").glob(pattern) if _is_old_and_ours(path)
    ]
    mapped = set() if not old else _mapped()
    for path in old:
        if str(path) not in mapped:
            path.unlink(missing_ok=True)


def _is_old_and_ours(path: Path) -> bool:
    try:
        found = path.stat()
    except OSError:  # somebody else was quicker
        return False
    return found.st_uid == os.getuid() and found.st_mtime < time.time() - LEFTOVER_SECONDS


def _mapped() -> set[str]:
    """Paths of the files that some process maps: their owner lives, however old they are."""
    names: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        # it ended, or is another user's, who cannot have mapped what is ours alone
        with contextlib.suppress(OSError):
            names.update(line.rpartition(" ")[2] for line in maps.read_text().splitlines())
    return names


class RankProcess:
    """One rank and its ring. One thread posts and another may wait for completions; `hang_up` is
    for any thread. After `MpiFailed` only `hang_up` and `close` may be called.
    """

    def __init__(self, arguments: list[str], slots: int, slot_nbytes: int) -> None:
        sweep()
        page = mmap.PAGESIZE
        self.slots = slots
        # whole pages, and at least one: nothing cannot be mapped
        self.slot_nbytes = -(-max(1, slot_nbytes) // page) * page
        self.rank = -1
        self.size = 0
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fd = os.memfd_create("hotweights-mpi", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, self.slots * self.slot_nbytes)
            self._ring = mmap.mmap(fd, self.slots * self.slot_nbytes)
            inherited = f"{theirs.fileno()},{fd},{self.slots},{self.slot_nbytes}"
            self._proxy = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), fd),
                env=environment() | {mpi_program.FDS_VARIABLE: inherited},
            )
        except OSError as error:
            self._control.close()
            raise MpiFailed(f"{arguments[0]}: {error.strerror}") from error
        finally:
            theirs.close()
            os.close(fd)

    def view(self, slot: int) -> memoryview:
        """A slot's memory: the node's until it is posted, and again once it is completed."""
        return memoryview(self._ring)[slot * self.slot_nbytes :][: self.slot_nbytes]

    def wait_ready(self, seconds: float) -> None:
        """Until the rank is in the job with all others. Raises `MpiFailed`."""
        payload = self._hear(mpi_program.READY, seconds)
        self.rank, self.size = mpi_program.PAIR.unpack(payload)

    def post(self, slot: int, nbytes: int) -> None:
        """Broadcast the slot next, ``nbytes`` of it. At most ``slots`` may be posted and not
        completed. Raises `MpiFailed`.
        """
        try:
            self._control.send(mpi_program.POST.pack(slot, nbytes))
        except OSError as error:
            raise MpiFailed(
                f"the rank is gone: {(error.strerror or str(error)).lower()}"
            ) from error

    def completed(self, seconds: float) -> int:
        """The slot whose broadcast has ended on this node, in the order posted. Raises `MpiFailed`
        after so many seconds without one.
        """
        return int(mpi_program.SLOT.unpack(self._hear(mpi_program.DONE, seconds))[0])

    def finish(self, seconds: float) -> None:
        """All is done on this node: leave the job together with the others, or alone when they take
        too long.
        """
        with contextlib.suppress(MpiFailed, OSError):
            self._control.send(mpi_program.FINISH)
            self._hear(b"", seconds)  # no message is of this kind: it ends when the rank does
        self.close()

    def hang_up(self) -> None:
        """End the rank; wakes whoever waits for it. From any thread."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the rank and its proxy, if they have not ended."""
        # the rank ends by itself when it is hung up on; then the proxy does; signals are for
        # those that hang
        self.hang_up()
        self._control.close()
        for end in (None, self._proxy.terminate, self._proxy.kill):
            if end is not None:
                end()
            try:
                self._proxy.wait(END_SECONDS)
                break
            except subprocess.TimeoutExpired:
                continue
        # somebody still reads a slot: it is unmapped with the last view
        with contextlib.suppress(BufferError):
            self._ring.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hear(self, kind: bytes, seconds: float) -> bytes:
        deadline = time.monotonic() + seconds
        # 0 would not mean "at once" but a socket that does not block
        self._control.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            message = self._control.recv(mpi_program.MAX_MESSAGE_NBYTES)
        except TimeoutError:
            raise MpiFailed(f"the collective made no progress for {seconds:g} s") from None
        except OSError as error:
            raise MpiFailed(
                f"the rank is gone: {(error.strerror or str(error)).lower()}"
            ) from error
        # the first byte is the kind; a message of no bytes is the socket's end
        if message[:1] == mpi_program.FAILED:
            raise MpiFailed(f"the rank failed: {message[1:].decode(errors='replace')}")
        if not message:
            raise MpiFailed("the job ended early: a member was lost")
        if message[:1] != kind:
            raise MpiFailed(f"the rank said {message[:1]!a} instead of {kind!a}")
        return message[1:]
