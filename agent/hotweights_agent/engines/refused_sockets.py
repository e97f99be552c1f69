"""Sockets of processes that were refused, held unread for a while.

A process that is closed at once comes again at once, and each time it is accepted and refused anew;
one that is held takes a descriptor and nothing else. Whoever is sound closes its own end when it
reads that it is refused. Not more than so many are held: then the oldest goes, and who knocks
without end is back where it would be without this.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque


class RefusedSockets:
    """Those that are held, the longest first. Everything runs in one event loop."""

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._seconds = most, seconds
        self._held: deque[tuple[float, socket.socket]] = deque()  # until when, of the loop's clock
        self._timer: asyncio.TimerHandle | None = None

    def hold(self, sock: socket.socket) -> None:
        """Take a socket over, and close it in time."""
        loop = asyncio.get_running_loop()
        self._held.append((loop.time() + self._seconds, sock))
        if len(self._held) > self._most:
            self._held.popleft()[1].close()
        if self._timer is None:
            self._timer = loop.call_later(self._seconds, self._close_due)

    def _close_due(self) -> None:
        loop = asyncio.get_running_loop()
        while self._held and self._held[0][0] <= loop.time():
            self._held.popleft()[1].close()
        self._timer = loop.call_at(self._held[0][0], self._close_due) if self._held else None

    def close(self) -> None:
        """Close all of them."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._held:
            self._held.popleft()[1].close()
