"""What the agent orders, gathered from frames on the link's thread, and done one after the other on
a thread of its own.

That thread works for seconds beside the one that serves, and gives way to it. It has to live on
whatever a model's code raises.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from hotweights.adapters.vllm import agent_connection
from hotweights.adapters.vllm.rank.throttle import giving_way
from hotweights_transports.handoff import frames

logger = logging.getLogger("vllm.hotweights.command_queue")


class CommandQueue:
    """``prepare`` gets the descriptors of table and slabs to look at; they are closed afterwards.
    Both answer over the connection that asked, and both run on the thread of this queue.
    """

    def __init__(
        self,
        prepare: Callable[[agent_connection.Connection, frames.Prepare, list[int]], None],
        release: Callable[[agent_connection.Connection, frames.Release], None],
    ) -> None:
        self._prepare, self._release = prepare, release
        self._partial: dict[int, tuple[frames.Prepare, list[int]]] = {}
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # the digest released last, with nothing ordered since: preparing just this one is in vain
        self.released = ""

    def start(self) -> None:
        """Begin to do what is ordered, on a thread that ends with the process."""
        threading.Thread(target=self._run, name="hotweights-prepare", daemon=True).start()

    def later(self, work: Callable[[], None]) -> None:
        """Do ``work`` after what was ordered so far, on the same thread. From any thread."""
        self._work.put(work)

    def handle(
        self, connection: agent_connection.Connection, frame: frames.Frame, fds: list[int]
    ) -> None:
        """One frame, on the link's thread; the descriptors are ours."""
        if isinstance(frame, frames.Prepare):
            self._partial[frame.id] = (frame, fds)
            self._gathered(connection, frame.id)
        elif isinstance(frame, frames.MoreSlabs) and frame.id in self._partial:
            self._partial[frame.id][1].extend(fds)
            self._gathered(connection, frame.id)
        else:
            agent_connection.close_all(fds)
            if isinstance(frame, frames.Release):
                # at once, on this thread: it stops a prepare of it that is under way
                self.released = frame.digest
                self.later(lambda: self._release(connection, frame))

    def refuse(
        self, connection: agent_connection.Connection, frame: frames.Frame, why: str
    ) -> None:
        """Of a frame whose descriptors were lost, on the link's thread: its order is never whole,
        and who gave it waits for an answer.
        """
        if isinstance(frame, frames.MoreSlabs) and frame.id in self._partial:
            frame, fds = self._partial.pop(frame.id)
            agent_connection.close_all(fds)
        if isinstance(frame, frames.Prepare):
            connection.send(
                frames.Rejected(id=frame.id, digest=frame.digest, reason="MapFailed", message=why)
            )

    def forget(self, connection: agent_connection.Connection) -> None:
        """The connection has gone: what it had begun to say is never said."""
        for _, fds in self._partial.values():
            agent_connection.close_all(fds)
        self._partial.clear()

    def _gathered(self, connection: agent_connection.Connection, request: int) -> None:
        frame, fds = self._partial[request]
        if len(fds) < 1 + frame.slabs:  # the table's, and one for each slab
            return  # more come in `frames.MoreSlabs`

        def work() -> None:
            try:
                self._prepare(connection, frame, fds)
            finally:
                agent_connection.close_all(fds)

        del self._partial[request]
        self.released = ""  # before the work is queued: what is ordered now is wanted
        self.later(work)

    def _run(self) -> None:
        while True:
            work = self._work.get()
            try:
                with giving_way():
                    work()
            # this thread has to live on; whatever it was, the model that serves is untouched
            except Exception:
                logger.exception("Unexpected error while preparing")
