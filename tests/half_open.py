"""A way to the API server that can go silent without ending: what a load balancer or a NAT leaves
behind when it forgets a connection. Both ends keep theirs open, and nothing comes any more.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import TracebackType
from typing import Self

from localcluster.controlplane import ControlPlane

_CHUNK_BYTES = 65536


class HalfOpen:
    """Passes on what two ends of a connection say, until it is `silenced`; new connections are
    passed on again. An asynchronous context manager, for the event loop that enters it.
    """

    def __init__(self, plane: ControlPlane, folder: Path) -> None:
        """``folder`` gets the kubeconfig that leads through it."""
        self._plane, self._folder = plane, folder
        self._pumps: set[asyncio.Task[None]] = set()
        self._accepting: set[asyncio.Task[None] | None] = set()
        self._ends: list[asyncio.StreamWriter] = []
        self.silenced_connections = 0

    @property
    def kubeconfig(self) -> Path:
        """The admin's, by this way."""
        port = self._server.sockets[0].getsockname()[1]
        path = self._folder / "half-open.kubeconfig"
        text = self._plane.kubeconfig.read_text()
        path.write_text(text.replace(self._plane.url, f"https://127.0.0.1:{port}"))
        return path

    def silence(self) -> None:
        """Nothing is passed on any more on the connections that there are; none is closed."""
        self.silenced_connections += len(self._pumps) // 2
        for pump in self._pumps:
            pump.cancel()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        tasks = [*filter(None, self._accepting), *self._pumps]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for end in self._ends:
            end.transport.abort()
        await asyncio.sleep(0)  # the transports are called back once more

    async def _accept(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        self._ends.append(back)  # kept, so that nobody closes them
        self._accepting.add(asyncio.current_task())
        endpoints = self._plane.endpoints
        try:
            server, there = await asyncio.open_connection(
                endpoints.address, endpoints.apiserver_port
            )
        finally:
            self._accepting.discard(asyncio.current_task())
        self._ends.append(there)
        for reader, writer in ((client, there), (server, back)):
            pump = asyncio.create_task(self._pump(reader, writer))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while said := await reader.read(_CHUNK_BYTES):
                writer.write(said)
                await writer.drain()
        except OSError:
            pass  # one end broke off: so does the other
        writer.close()
