"""One engine of this process and the plugin's `Server` beside it: joined before its first request,
gone with the engine.

An `AsyncLLM` is joined on its own event loop. A synchronous engine's server lives on the binder's
loop, and the gate keeps it and the caller's thread apart. Neither keeps the engine alive. Requests
wait for nothing but the one probe at the start, by which a repair is judged later.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError

from hotweights.adapters.inprocess.gate import Gate, Guarded
from hotweights.adapters.inprocess.replicas import SyncEngineClient, end_async
from hotweights.adapters.vllm import agent_connection
from hotweights.adapters.vllm.engine_client import EngineClient
from hotweights.adapters.vllm.server import Server
from hotweights.adapters.vllm.settings import Settings
from hotweights_common.reasons import Reason
from hotweights_transports.handoff import frames

logger = logging.getLogger("vllm.hotweights.binding")
JOIN_SECONDS = 120.0  # for the first probe, and before it for the caller's call to end
GATE_SECONDS = 30.0  # a step that takes longer is answered with Busy, and the commit asked again
AGAIN_SECONDS = 0.02  # for the caller to come and fetch a batch that is under way
Noted = Callable[[frames.Frame], None]


class _Server(Server):
    """As the API server's, and it tells how commits end."""

    def __init__(
        self,
        engine_client: EngineClient,
        settings: Settings,
        end: Callable[[str], None],
        noted: Noted,
    ) -> None:
        super().__init__(engine_client, settings, end)
        self._noted = noted

    async def _answer(self, frame: frames.Commit) -> frames.Frame:
        answer = await super()._answer(frame)
        self._noted(answer)
        return answer


class _GatedServer(_Server):
    """A commit, and the repair of one that broke, happen between two calls of the caller's."""

    def __init__(
        self, engine_client: SyncEngineClient, settings: Settings, gate: Gate, noted: Noted
    ) -> None:
        super().__init__(engine_client, settings, self._give_up, noted)
        self._sync_replica = engine_client
        self._gate = gate

    async def join(self) -> None:
        await self._close_gate(JOIN_SECONDS)
        try:
            await super().join()
        finally:
            self._gate.open()

    async def _commit(self, connection: agent_connection.Connection, frame: frames.Commit) -> None:
        try:
            await self._close_gate(GATE_SECONDS)
        except TimeoutError as error:
            connection.send(
                frames.CommitFailed(
                    frame.id, frame.digest, frame.commit_token, Reason.BUSY, str(error)
                )
            )
            return
        try:
            await super()._commit(connection, frame)
        finally:
            self._gate.open()

    async def _close_gate(self, seconds: float) -> None:
        """Between two calls, and with no batch under way. Raises `TimeoutError`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while (left := until - loop.time()) > 0:
            # in a thread: it waits, and this loop has other engines
            if not await asyncio.to_thread(self._gate.close, left):
                break
            if not self._sync_replica.in_flight():
                return
            self._gate.open()  # only the caller's next call ends the batch
            await asyncio.sleep(AGAIN_SECONDS)
        raise TimeoutError(f"the engine was inside one step for {seconds:.0f} s")

    def _give_up(self, reason: str) -> None:
        logger.critical("This engine is given up: %s", reason)
        self._gate.fail(EngineDeadError())


class _Client(Guarded):
    """A synchronous engine's client: when it is shut down, the engine is gone."""

    def __init__(self, client: Any, gate: Gate, gone: Callable[[], None]) -> None:
        super().__init__(client, gate)
        object.__setattr__(self, "_gone", gone)

    def shutdown(self, *args: Any, **kwargs: Any) -> Any:
        """As the client's; first the binding is ended, because afterwards nobody answers it."""
        self._gone()
        return self.__getattr__("shutdown")(*args, **kwargs)


class SyncBinding:
    """A `LLMEngine`, and what drives it from another thread."""

    def __init__(
        self, engine: Any, settings: Settings, noted: Noted, gone: Callable[[], None]
    ) -> None:
        """In the thread that constructed the engine, before its first request: from here on every
        call of the caller's passes the gate.
        """
        client, gate, config = engine.engine_core, Gate(), engine.vllm_config
        engine.engine_core = _Client(client, gate, gone)
        engine_client = SyncEngineClient(weakref.proxy(client), config)
        self._make: Callable[[], Server] = lambda: _GatedServer(
            engine_client, settings, gate, noted
        )
        self._server: Server | None = None

    async def join(self) -> None:
        """Join, on the binder's loop, between two calls of the caller's. Raises TimeoutError where
        no such moment comes, and `EngineDead`.
        """
        self._server = self._make()
        await self._server.join()

    def leave(self) -> None:
        """End the connection: the engine is gone. From any thread."""
        if self._server is not None:
            self._server.leave()


class AsyncBinding:
    """An `AsyncLLM`, on its own event loop."""

    def __init__(
        self, engine: Any, settings: Settings, noted: Noted, gone: Callable[[], None]
    ) -> None:
        """``gone`` is called when it is shut down, or cannot be joined: nobody is to wait for
        it.
        """
        self.gone = gone
        proxy = weakref.proxy(engine)
        end: Callable[[str], None] = lambda reason: end_async(proxy, reason)  # noqa: E731
        self._make: Callable[[], Server] = lambda: _Server(
            EngineClient(proxy), settings, end, noted
        )
        self._server: Server | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to join, if this thread's loop runs."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # constructed outside of a loop: the first request joins
        if self._task is None:
            self._task = loop.create_task(self._join())

    async def joined(self) -> None:
        """Wait until it has joined; a request goes on if it could not."""
        self.start()
        if self._task is not None and not self._task.done():
            # shielded: a request that is cancelled must not take the joining with it
            await asyncio.shield(self._task)

    def leave(self) -> None:
        """End the connection: the engine is gone. From any thread."""
        if self._server is not None:
            self._server.leave()

    async def _join(self) -> None:
        try:
            self._server = self._make()
            await asyncio.wait_for(self._server.join(), JOIN_SECONDS)
        # whatever it was: the engine serves, and the coordinator sees that it takes no part
        except Exception:
            logger.exception(
                "The engine could not be bound: it serves what it booted, without Hotweights"
            )
            self.gone()
