"""Engines as the plugin's `Switch` reaches them, when there is no API server: `vllm.LLM`'s and an
embedded `AsyncLLM`'s.

One place that knows vLLM's synchronous client. Calls that wait go to a thread, so that the switch
keeps its deadlines. An engine that cannot be repaired is declared dead, as vLLM itself does it:
whoever asks it anything gets `EngineDeadError`. The process is the caller's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from vllm.v1.engine.core_client import InprocClient
from vllm.v1.engine.exceptions import EngineDeadError

from hotweights.adapters.vllm import plugin, probe, releases
from hotweights.adapters.vllm.engine_client import EngineClient
from hotweights.adapters.vllm.errors import EngineDead

logger = logging.getLogger("vllm.hotweights.replicas")


class SyncEngineClient(EngineClient):
    """The engine of a `vllm.LLM`. The gate is closed whenever anything here is called. Its client
    is vLLM 0.32's ``SyncMPClient`` or ``InprocClient`` (``v1/engine/core_client.py``).
    """

    def __init__(self, client: Any, vllm_config: Any) -> None:
        """``client`` is the engine's client itself, not what guards it."""
        self._core = client
        self.vllm_config = vllm_config
        self.world_size = self.vllm_config.parallel_config.world_size
        self.kind = probe.engine_kind(self.vllm_config)

    def in_flight(self) -> bool:
        """Whether a step has begun that ends in another call: only where the steps run in this
        process.
        """
        return isinstance(self._core, InprocClient) and bool(self._core.engine_core.batch_queue)

    # As `EngineClient` has them, by the synchronous client's calls; each may raise `EngineDead`.

    async def pause(self, mode: str) -> None:
        """As `EngineClient.pause`. Raises ValueError where this mode would wait for its own
        caller.
        """
        if isinstance(self._core, InprocClient) and mode == "Wait":
            raise ValueError(
                "an engine in the caller's own thread cannot drain while the caller waits: use "
                "mode Keep"
            )
        await self._ask(self._utility, "pause_scheduler", mode.lower(), True)

    async def resume(self) -> None:
        await self._ask(self._utility, "resume_scheduler")

    async def forget_caches(self) -> None:
        await self._ask(self._core.reset_prefix_cache, True, False)
        await self._ask(self._core.reset_encoder_cache)

    async def label(self, version: str) -> None:
        if releases.api().has_weight_version:
            await self._ask(self._core.set_weight_version, version)

    async def _core_does(self, method: str, *args: Any) -> Any:
        return await self._ask(self._utility, method, *args)

    async def _rpc(self, command: str, argument: Any) -> list[dict[str, Any]]:
        return list(
            await self._ask(
                self._core.collective_rpc, plugin.WORKER_METHOD, None, (command, argument), {}
            )
        )

    def _utility(self, method: str, *args: Any) -> Any:
        if isinstance(self._core, InprocClient):
            return getattr(self._core.engine_core, method)(*args)
        return self._core.call_utility(method, *args)

    async def _ask(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return await asyncio.to_thread(call, *args)
        except EngineDeadError as error:
            raise EngineDead(str(error)) from error


def end_async(engine: Any, reason: str) -> None:
    """No way back for an `AsyncLLM`: whoever waits for an answer is told. On its event loop. As
    vLLM 0.32's clients do it when their engine process has died (``v1/engine/core_client.py``:
    ``engine_dead``).
    """
    logger.critical("This engine is given up: %s", reason)
    engine.engine_core.resources.engine_dead = True
    engine.engine_core.outputs_queue.put_nowait(EngineDeadError())
