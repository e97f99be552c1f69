"""One rank of a collective: the only program that imports mpi4py, and the only one that calls MPI.

It is a process of its own because MPI ends a whole job with any of its members; the node that
started it lives on. Node and rank share a ring of slots (a memfd) and a socket, both inherited. The
node posts ``(slot, nbytes)``; the rank broadcasts that slot from rank 0 to all, in the order
posted, and says when it is done. Rank 0's node fills a slot before it posts it, the others read it
afterwards. What the bytes are, whether they are right, and how long anybody waits is the nodes'
affair: when the socket closes, the rank ends, in whatever call it is.

It is run by its path, isolated, and imports nothing of Hotweights, so that starting it takes a
tenth of a second.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import signal
import socket
import struct
import threading
import time

FDS_VARIABLE = "HOTWEIGHTS_MPI_FDS"  # "<socket>,<ring>,<slots>,<bytes of a slot>"
POST = struct.Struct("!IQ")  # node to rank: slot, nbytes
FINISH = POST.pack(0xFFFFFFFF, 0)  # no slot has this number
READY, DONE, FAILED = b"R", b"D", b"F"  # rank to node, each followed by: rank and size; slot; text
PAIR = struct.Struct("!II")
SLOT = struct.Struct("!I")
MAX_MESSAGE_NBYTES = 2048  # more than READY and DONE have; a text of FAILED is cut

_EAGER_POLLS = 20
_SLEEP_SECONDS = 0.0001  # a piece of 4 MiB takes longer on anything slower than 40 GB/s


def main() -> None:
    control_fd, ring_fd, slots, slot_nbytes = (
        int(word) for word in os.environ.pop(FDS_VARIABLE).split(",")
    )
    control = socket.socket(fileno=control_fd)
    posts: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_die_with_the_node, args=(control, posts), daemon=True).start()
    try:
        _serve(control, posts, memoryview(mmap.mmap(ring_fd, slots * slot_nbytes)), slot_nbytes)
    except Exception as error:  # noqa: BLE001  # the process ends with it, and its node must hear why
        control.send(FAILED + f"{type(error).__name__}: {error}".encode()[: MAX_MESSAGE_NBYTES - 1])
        _die()
    os._exit(0)


def _die_with_the_node(control: socket.socket, posts: queue.SimpleQueue[bytes]) -> None:
    """Whatever the main thread is waiting for: without its node there is nothing to wait for."""
    try:
        while message := control.recv(POST.size):
            posts.put(message)
    except OSError:
        pass
    _die()


def _serve(
    control: socket.socket, posts: queue.SimpleQueue[bytes], ring: memoryview, slot_nbytes: int
) -> None:
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    MPI.Init_thread(MPI.THREAD_FUNNELED)  # there is another thread, which never calls MPI
    _forget_names()
    world = MPI.COMM_WORLD
    control.send(READY + PAIR.pack(world.rank, world.size))
    announced = bytearray(8)
    while (message := posts.get()) != FINISH:
        slot, nbytes = POST.unpack(message)
        if world.rank == 0:
            announced[:] = nbytes.to_bytes(8, "big")
        # the size first: ranks that expect different ones would wait for each other for ever
        _wait_quietly(world.Ibcast([announced, MPI.BYTE], root=0))
        if int.from_bytes(announced, "big") != nbytes:
            raise ValueError(
                f"rank 0 sends {int.from_bytes(announced, 'big')} bytes, {nbytes} are expected here"
            )
        with ring[slot * slot_nbytes :][:nbytes] as view:
            _wait_quietly(world.Ibcast([view, nbytes, MPI.BYTE], root=0))
        control.send(DONE + SLOT.pack(slot))
    MPI.Finalize()


def _die() -> None:
    """By a signal: at an exit code, even one that is not 0, mpiexec leaves the other ranks
    waiting.
    """
    _forget_names()
    os.kill(os.getpid(), signal.SIGKILL)


def _forget_names() -> None:
    """MPICH maps a file in /dev/shm and removes its name when it is finalized: never, if the rank
    is killed. With one rank per job on a node nobody else has to open it.
    """
    with open("/proc/self/maps") as maps:  # noqa: PTH123  # quicker to import nothing
        names = {line.split()[-1] for line in maps if "/dev/shm/mpich_shm_" in line}
    for name in names:
        with contextlib.suppress(OSError):
            os.unlink(name)  # noqa: PTH108


def _wait_quietly(request: object) -> None:
    """MPI waits by spinning, which would take a core from every node for as long as the slowest one
    needs. A piece of a bucket lasts longer than the sleep on any network, so the pipeline does not
    run dry.
    """
    polls = 0
    while not request.Test():  # type: ignore[attr-defined]
        polls += 1
        if polls < _EAGER_POLLS:
            os.sched_yield()
        else:
            time.sleep(_SLEEP_SECONDS)


if __name__ == "__main__":
    main()
