"""Breaks copies on purpose. A general plugin of the tests' own, in a folder of its own on
``PYTHONPATH``: production code has no hook for it.

``HOTWEIGHTS_SABOTAGE`` names a file; while it exists its text says what the next copy does:
``half`` (copy half, then raise), ``always`` (the same, every time, and no reload either), ``slow``
(sleep for seconds first), ``kill`` (SIGKILL this worker halfway). ``half@1`` is for rank 1 alone.
Without the file nothing happens. ``HOTWEIGHTS_SABOTAGE_PLAIN`` takes the second model away, so that
versions are loaded inside the pause; ``HOTWEIGHTS_SABOTAGE_RELEASE`` is what vLLM calls its version.
Other steps than the copy: `hotweights_sabotage_steps`.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import hotweights_sabotage_steps as steps  # type: ignore[import-not-found]


def register() -> None:
    import vllm
    from vllm.v1.worker.worker_base import WorkerBase

    from hotweights.adapters.vllm import plugin

    if release := os.environ.get("HOTWEIGHTS_SABOTAGE_RELEASE"):
        vllm.__version__ = release
        return  # ours refuses it by itself
    plugin.register()  # theirs first, whatever the order of entry points is
    if os.environ.get("HOTWEIGHTS_SABOTAGE_PLAIN"):
        _forbid_shadows()
    steps.break_engine_core()
    original = getattr(WorkerBase, plugin.WORKER_METHOD)
    if hasattr(original, "sabotaged"):
        return

    def wrapped(worker: Any, command: str, argument: Any = None) -> Any:
        _arm()  # before a version comes: the boot asks for what it serves
        return original(worker, command, argument)

    wrapped.sabotaged = True  # type: ignore[attr-defined]
    setattr(WorkerBase, plugin.WORKER_METHOD, wrapped)


def _forbid_shadows() -> None:
    from hotweights.adapters.vllm.rank.shadow import changes, skeleton

    def refuse(vllm_config: Any) -> Any:
        raise changes.Unsupported("sabotage: no second model")

    skeleton.build = refuse


def _arm() -> None:
    from hotweights.adapters.vllm.rank import reload
    from hotweights.adapters.vllm.rank.shadow.model import Shadow

    if not hasattr(Shadow, "honest_install"):
        honest_reload = reload.reload

        def _reload(*args: Any) -> None:
            if _order_file().exists():
                raise RuntimeError("sabotage: always")  # the repair's last resort as well
            honest_reload(*args)

        reload.reload = _reload
        Shadow.honest_install = Shadow.install  # type: ignore[attr-defined]
        Shadow.install = _install  # type: ignore[method-assign]
        steps.break_rank()


def _install(shadow: Any) -> Any:
    order = _order()
    if order == "slow":
        time.sleep(4.0)
    if order in ("half", "always", "kill"):
        for _, old, new in shadow.moves[: len(shadow.moves) // 2]:
            old.copy_(new)
        if order == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError(f"sabotage: {order}")
    return shadow.honest_install()


def _order() -> str:
    path = _order_file()
    try:
        order, _, rank = path.read_text().strip().partition("@")
    except OSError:
        return ""
    if rank and int(rank) != _rank():
        return ""
    if order != "always":
        path.unlink()
    return order


def _order_file() -> Path:
    return Path(os.environ["HOTWEIGHTS_SABOTAGE"])


def _rank() -> int:
    from vllm.distributed.parallel_state import get_world_group

    return int(get_world_group().rank_in_group)
