"""The whole engine as the API server reaches it: pause, resume, ask every rank, probe. One place that knows vLLM's client.

Nothing here decides anything (that is `commit`), and nothing else in the API server calls the engine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError

from hotweights.adapters.vllm import plugin, probe

logger = logging.getLogger("vllm.hotweights.replica")
PAUSE_MODES = {"Keep": "keep", "Wait": "wait", "Abort": "abort"}
__all__ = ["EngineDeadError", "RankError", "Replica", "end_process"]


class RankError(Exception):
    """A rank said no; ``reason`` is one of the wire's."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Replica:
    def __init__(self, engine_client: Any) -> None:
        self._client = engine_client
        self.vllm_config = engine_client.vllm_config
        self.world_size: int = self.vllm_config.parallel_config.world_size
        self.kind = probe.engine_kind(self.vllm_config)

    async def ranks(self, command: str, argument: Any = None) -> list[dict[str, Any]]:
        """Every rank's answer. Raises `RankError` with the first no, after all have answered."""
        answers = await self._client.collective_rpc(plugin.WORKER_METHOD, args=(command, argument))
        for answer in answers:
            if not answer["ok"]:
                raise RankError(answer["reason"], f"rank {answer['rank']}: {answer['message']}")
        return list(answers)

    async def pause(self, mode: str) -> None:
        """Stop scheduling and forget what was computed with the old weights, of running requests too."""
        core = self._client.engine_core
        renderer: Any = getattr(self._client, "renderer", None)
        if hasattr(core, "pause_scheduler_async") and hasattr(renderer, "clear_mm_cache_async"):
            # What pause_generation does, less its fixed sleep of 20 ms, which it calls unnecessary itself.
            await renderer.clear_mm_cache_async()
            await core.pause_scheduler_async(mode=PAUSE_MODES[mode], clear_cache=True)
        else:
            await self._client.pause_generation(mode=PAUSE_MODES[mode], clear_cache=True)

    async def resume(self) -> None:
        await self._client.resume_generation()

    async def forget_caches(self) -> None:
        await self._client.reset_prefix_cache(reset_running_requests=True)
        await self._client.reset_encoder_cache()

    async def label(self, version: str) -> None:
        """What vLLM itself reports as its weights' version."""
        await self._client.update_weight_version(version)

    async def probe(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[dict[str, Any]]:
        answers = await self._client.engine_core.call_utility_async(
            plugin.CORE_METHOD, [list(prompt) for prompt in prompts], list(lengths)
        )
        return list(answers)

    @property
    def dead(self) -> bool:
        return bool(self._client.errored)


async def end_process(reason: str) -> None:
    """End this server and everything it started: the container restarts, into the boot barrier.

    By itself a vLLM whose engine died exits with 0, which a restart policy may take for success.
    """
    logger.critical("Ending this process: %s", reason)
    await asyncio.sleep(0.1)  # for the log line and the last frame
    for pid in _descendants(os.getpid()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    os._exit(1)


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return found
    for child in children:
        found += [*_descendants(child), child]
    return found
