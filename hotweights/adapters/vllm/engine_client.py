"""The whole engine as the API server reaches it: pause, resume, ask every rank, probe. One place
that knows vLLM's client.

Nothing here decides anything (that is `commit`), and nothing else in the API server calls the
engine.

``engine_client`` is vLLM 0.32's ``AsyncLLM`` (``v1/engine/async_llm.py``), or what stands for one
in this process; ``call_utility_async`` of its ``engine_core`` (``v1/engine/core_client.py``) calls
a method of EngineCore by name. Everything runs on the API server's event loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from vllm.v1.engine.exceptions import EngineDeadError

from hotweights.adapters.vllm import plugin, probe, releases
from hotweights.adapters.vllm.errors import EngineDead, RankError

T = TypeVar("T")


class EngineClient:
    """vLLM's client, with the few calls that a commit needs. Each may raise `EngineDead`; none has
    a limit of time of its own, `commit` sets them.
    """

    def __init__(self, engine_client: Any) -> None:
        self._client = engine_client
        self.vllm_config = engine_client.vllm_config
        self.world_size: int = self.vllm_config.parallel_config.world_size
        self.kind = probe.engine_kind(self.vllm_config)

    async def ranks(self, command: str, argument: Any = None) -> list[dict[str, Any]]:
        """Every rank's answer to one of `Engine.command`. Raises `RankError` with the first no,
        after all have answered.
        """
        return _agreed(await self._rpc(command, argument))

    async def _rpc(self, command: str, argument: Any) -> list[dict[str, Any]]:
        return list(
            await _alive(
                self._client.collective_rpc(plugin.WORKER_METHOD, args=(command, argument))
            )
        )

    async def asleep(self) -> bool:
        """Whether sleep mode has taken the weights out of memory: a copy would go nowhere."""
        if not getattr(self.vllm_config.model_config, "enable_sleep_mode", False):
            return False
        return bool(await _alive(self._client.is_sleeping()))

    async def pause(self, mode: str) -> None:
        """Stop scheduling and forget what was computed with the old weights, of running requests
        too.
        """
        core = self._client.engine_core
        renderer: Any = getattr(self._client, "renderer", None)
        if hasattr(core, "pause_scheduler_async") and hasattr(renderer, "clear_mm_cache_async"):
            # What pause_generation does, less its fixed sleep of 20 ms, which it calls unnecessary
            # itself.
            await renderer.clear_mm_cache_async()
            await _alive(core.pause_scheduler_async(mode=mode.lower(), clear_cache=True))
        else:
            await _alive(self._client.pause_generation(mode=mode.lower(), clear_cache=True))

    async def resume(self) -> None:
        """Schedule again; harmless for an engine that is not paused."""
        await _alive(self._client.resume_generation())

    async def open(self, version: str) -> None:
        """`label` and `resume` in one visit."""
        await self._core_does(plugin.OPEN_METHOD, version)

    async def forget_caches(self) -> None:
        """What was computed with other weights: vLLM does not forget it by itself. Paused requests
        hold blocks of the prefix cache, so theirs are computed again.
        """
        await _alive(self._client.reset_prefix_cache(reset_running_requests=True))
        await _alive(self._client.reset_encoder_cache())

    async def label(self, version: str) -> None:
        """What vLLM itself reports as its weights' version, where it has one to report."""
        if releases.api().has_weight_version:
            await _alive(self._client.update_weight_version(version))

    async def switch(
        self, digest: str, prompts: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> tuple[list[dict[str, Any]], float]:
        """Copy a version on every rank and probe, in one visit: the probe's answers (as `probe.run`
        gives them), and the copy's seconds. ``lengths`` are tokens to answer, one for each prompt.
        Raises `RankError`.
        """
        done = await self._core_does(
            plugin.SWITCH_METHOD, digest, [list(prompt) for prompt in prompts], list(lengths)
        )
        _agreed(done["ranks"])
        return list(done["answers"]), float(done["copySeconds"])

    async def probe(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> list[dict[str, Any]]:
        """What the model answers as it is."""
        done = await self._core_does(
            plugin.SWITCH_METHOD, None, [list(prompt) for prompt in prompts], list(lengths)
        )
        return list(done["answers"])

    async def _core_does(self, method: str, *args: Any) -> Any:
        return await _alive(self._client.engine_core.call_utility_async(method, *args))


def _agreed(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for answer in answers:
        if not answer["ok"]:
            raise RankError(answer["reason"], f"rank {answer['rank']}: {answer['message']}")
    return answers


async def _alive(call: Awaitable[T]) -> T:
    try:
        return await call
    except EngineDeadError as error:
        raise EngineDead(str(error)) from error
