"""What vLLM's ``vllm.endpoint_plugins`` entry point gives the API server: the boot barrier, and the
agent's commits.

vLLM awaits `Plugin.init_state` before its port answers. There the agent is asked which version this
pod is to serve, and it commits it or says ``keep``; so a restarted container never serves old
weights behind a readiness gate that is still true. Afterwards the connection lives on beside the
server. The plugin adds no route, and no port: it connects outwards.
"""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from hotweights.adapters.vllm import PLUGIN_VERSION, agent_connection, errors, plugin, settings
from hotweights.adapters.vllm.commit import Switch
from hotweights.adapters.vllm.engine_client import EngineClient
from hotweights.adapters.vllm.suitability import caveat, unsuitable
from hotweights_transports.handoff import frames

logger = logging.getLogger("vllm.hotweights.server")


class Plugin:
    """The shape of vLLM's endpoint plugins; vLLM makes one, in the API server's process."""

    name = "hotweights_server"
    required_tasks = None  # any engine: one that cannot be updated has to say so

    def attach_router(self, app: Any) -> None:
        """No routes: whoever may talk to a vLLM port may not change its weights."""

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Awaited by vLLM before its port answers. Raises RuntimeError, which ends vLLM, where this
        engine cannot be updated and the boot policy is Hold.
        """
        read = settings.read()
        if not read.socket or engine_client is None:  # no agent here, or a server without an engine
            return
        unknown = plugin.unsupported()
        clients = getattr(engine_client, "_client_count", 1)
        problem = unknown or unsuitable(engine_client.vllm_config, clients)
        if problem and read.hold:
            raise RuntimeError(
                f"{problem} (HOTWEIGHTS_BOOT_POLICY=Hold serves nothing that nobody assigned)"
            )
        if problem:
            logger.error("%s; serving what was booted, without Hotweights", problem)
        try:
            client = EngineClient(engine_client)
        except AttributeError as error:
            if not unknown:
                raise
            logger.error("The agent cannot be told: this vLLM has no such thing (%s)", error)
            return
        server = Server(client, read, unsupported=problem)
        state.hotweights = server  # lives as long as the application does
        if problem:
            server.say_so()
        else:
            await server.boot()


class Server:
    """The API server's end of the connection."""

    def __init__(
        self,
        engine_client: EngineClient,
        read: settings.Settings,
        end: Callable[[str], None] = errors.end_process,
        unsupported: str = "",
    ) -> None:
        """``end`` is the last resort for an engine that cannot be repaired; ``unsupported`` is why
        this engine is never switched.
        """
        self._unsupported = unsupported
        self._engine_client = engine_client
        self._settings = read
        self._loop = asyncio.get_running_loop()
        self._told = asyncio.Event()  # the agent has said what to serve, and it is served
        self._tasks: set[asyncio.Task[None]] = set()
        self.switch = Switch(engine_client, read.repair_seconds, self._tell, end)
        self._link = agent_connection.AgentLink(read.socket, self._hello, self._handle)

    async def boot(self) -> None:
        """The boot barrier: returns when this process may open its port. Raises `EngineDead`."""
        # What the booted weights answer is asked before a commit can come; the heap is frozen
        # before the link brings work.
        atexit.register(self._last_word)
        await self.switch.remember_boot()
        await self.switch.freeze()
        self._link.start()
        seconds = self._settings.boot_timeout_seconds
        logger.info("Boot barrier: waiting for the agent to say which version to serve")
        await asyncio.wait([self._loop.create_task(self._told.wait())], timeout=seconds)
        if not self._told.is_set() and self._settings.hold:
            logger.error(
                "No answer after %.0f s; the boot policy is Hold: the port stays closed", seconds
            )
            await self._told.wait()
        elif not self._told.is_set():
            logger.error(
                "No answer after %.0f s; the boot policy is Serve: serving what was booted", seconds
            )
        while self.switch.dirty:  # noqa: ASYNC110 - a commit of the barrier failed: its repair ends, or ends the process
            await asyncio.sleep(0.05)
        self.switch.state = "Serving"
        self._tell(self._state())

    async def join(self) -> None:
        """Without a barrier: for an engine that serves what it booted until somebody says
        otherwise.
        """
        await self.switch.remember_boot()
        self.switch.state = "Serving"
        self._link.start()

    def say_so(self) -> None:
        """For an engine that cannot be updated: it serves what it booted, and its pod's status says
        why.
        """
        self.switch.state = "Serving"
        self._link.start()

    def leave(self) -> None:
        """End the connection: the engine is gone. From any thread."""
        self._link.stop()

    def _last_word(self) -> None:
        """vLLM ends itself when its engine has died, with 0, and may be faster than the commit that
        notices it too.
        """
        if self.switch.torn or self.switch.dirty:
            errors.end_process("vLLM ended in the middle of a switch")

    # --- on the link's thread: `_hello` only reads, `_handle` only hands over ------------------

    def _hello(self) -> frames.Hello:
        return frames.Hello(
            role="server",
            token=agent_connection.read_token(self._settings.token_file),
            world_size=self._engine_client.world_size,
            instance=self._engine_client.vllm_config.instance_id,
            plugin=PLUGIN_VERSION,
            engine=self._engine_client.kind,
            state=self.switch.state,
            digest=self.switch.digest,
            commit_token=self.switch.token,
            unsupported=self._unsupported,
            caveat=caveat(self._engine_client.vllm_config),
            probe=self.switch.probed,
        )

    def _handle(
        self, connection: agent_connection.Connection, frame: frames.Frame, fds: list[int]
    ) -> None:
        agent_connection.close_all(fds)  # no frame to a server process has any
        self._loop.call_soon_threadsafe(self._dispatch, connection, frame)

    # --- on the event loop ---------------------------------------------------------------------

    def _dispatch(self, connection: agent_connection.Connection, frame: frames.Frame) -> None:
        if isinstance(frame, frames.Commit):
            task = self._loop.create_task(self._commit(connection, frame))
            self._tasks.add(task)  # the event loop itself holds tasks only weakly
            task.add_done_callback(self._tasks.discard)
        elif isinstance(frame, frames.Keep):
            if self.switch.keep(frame.commit_token):
                self._told.set()
                connection.send(frames.Kept(frame.id, frame.commit_token))
            else:
                message = (
                    f"token {frame.commit_token} is older than {self.switch.token}, seen already"
                )
                connection.send(
                    frames.CommitFailed(frame.id, "", frame.commit_token, "StaleToken", message)
                )

    async def _commit(self, connection: agent_connection.Connection, frame: frames.Commit) -> None:
        was_dirty = self.switch.dirty  # refused for that: whoever made it dirty is repairing
        answer = await self._answer(frame)
        # a commit that was asked for twice has one answer, and each asker its own id
        answered = connection.send(dataclasses.replace(answer, id=frame.id))  # type: ignore[call-arg]
        if isinstance(answer, frames.Committed):
            self._told.set()
            if not answered:
                # whoever asked has gone; its successor said hello before this ended
                self._tell(self._state())
        elif self.switch.dirty and not was_dirty:
            await self.switch.repair()

    async def _answer(self, frame: frames.Commit) -> frames.Frame:
        if self._unsupported:
            place = (frame.id, frame.digest, frame.commit_token)
            return frames.CommitFailed(*place, "EngineUnsupported", self._unsupported)
        return await self.switch.commit(frame)

    def _state(self) -> frames.State:
        switch = self.switch
        return frames.State(switch.state, switch.digest, switch.token, probe=switch.probed)

    def _tell(self, state: frames.State) -> None:
        connection = self._link.connection
        if connection is not None:
            connection.send(state)
