"""vLLM's sleep mode takes the memory of a model away and brings it back, at the same addresses.

In between nobody may read or write it: not who gets a version ready, not who commits one. So a
worker tells its rank before it falls asleep, and after it has woken (vLLM 0.32, ``sleep`` and
``wake_up`` of ``v1/worker/gpu_worker.py``, on the worker's main thread).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

ASLEEP = "the engine sleeps, with its weights out of memory: wake it (POST /wake_up)"
_LEVEL_2 = (
    "sleep level 2 throws the weights away, and Hotweights would go on saying that they are served: "
    "sleep at level 1"
)


class Sleeper(Protocol):
    """Who has to know."""

    def fall_asleep(self) -> None:
        """From the return on, the model's memory is not touched. May raise: not now."""
        ...

    def wake(self) -> None:
        """It is there again."""
        ...


def watch(worker_class: type, sleeper_of: Callable[[Any], Sleeper | None]) -> str:
    """Have workers of this class tell the sleeper that they have, if any; once for a class, however
    often it is called. Gives why that cannot be; empty when it can.
    """
    sleep, wake_up = (getattr(worker_class, name, None) for name in ("sleep", "wake_up"))
    if sleep is None or wake_up is None:
        return (
            f"Hotweights cannot see when {worker_class.__name__} sleeps: start the engine without "
            "--enable-sleep-mode"
        )
    if getattr(sleep, "hotweights", False):
        return ""

    @functools.wraps(sleep)
    def telling_sleep(worker: Any, level: int = 1) -> Any:
        sleeper = sleeper_of(worker)
        if sleeper is not None:
            if level > 1:
                raise RuntimeError(_LEVEL_2)
            sleeper.fall_asleep()
        return sleep(worker, level)

    @functools.wraps(wake_up)
    def telling_wake_up(worker: Any, tags: list[str] | None = None) -> Any:
        result = wake_up(worker, tags)
        sleeper = sleeper_of(worker)
        # the cache can be woken without the weights
        if sleeper is not None and (tags is None or "weights" in tags):
            sleeper.wake()
        return result

    telling_sleep.hotweights = True  # type: ignore[attr-defined]
    worker_class.sleep = telling_sleep  # type: ignore[attr-defined]
    worker_class.wake_up = telling_wake_up  # type: ignore[attr-defined]
    return ""
