"""The way from one coordinator to Redis, which can be cut, and which can keep what travels on it
for as long as one likes.

A network that is slow enough brings a leader's writes when another leads already; nothing else
shows that Redis refuses them.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress


class Road:
    """A TCP proxy to ``to_port`` of this host."""

    def __init__(self, to_port: int) -> None:
        self.port = 0
        self._to_port = to_port
        self._clear = asyncio.Event()
        self._clear.set()
        self._server: asyncio.Server | None = None
        self._travellers: set[asyncio.Task[None]] = set()
        self._ends: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        """Listen at a port of its own."""
        self._server = await asyncio.start_server(self._come, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def hold(self) -> None:
        """Keep everything that is on its way, and whatever is sent from now on."""
        self._clear.clear()

    def release(self) -> None:
        """Deliver what was kept, even from those who have hung up meanwhile."""
        self._clear.set()

    def cut(self) -> None:
        """End every connection, whatever is on its way."""
        for end in list(self._ends):
            end.transport.abort()

    async def close(self) -> None:
        """Nothing passes any more."""
        if self._server is not None:
            self._server.close()
        for traveller in self._travellers:
            traveller.cancel()
        await asyncio.gather(*self._travellers, return_exceptions=True)
        self.cut()

    async def _come(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
        except OSError:
            writer.transport.abort()
            return
        self._ends |= {writer, there_writer}
        both = [
            asyncio.ensure_future(self._carry(reader, there_writer)),
            asyncio.ensure_future(self._carry(there_reader, writer)),
        ]
        self._travellers.update(both)
        await asyncio.gather(*both, return_exceptions=True)
        self._travellers.difference_update(both)
        self._ends -= {writer, there_writer}
        for end in (writer, there_writer):
            end.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while content := await reader.read(1 << 16):
                await self._clear.wait()
                writer.write(content)
                await writer.drain()
            await self._clear.wait()
        writer.close()
