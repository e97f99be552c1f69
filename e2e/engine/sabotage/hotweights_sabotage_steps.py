"""Breaks any step of a prepare, a commit or a repair, in whichever of vLLM's processes takes it.

Beside the file of ``HOTWEIGHTS_SABOTAGE``, ``<file>.<step>`` says what becomes of the step when it
is taken next: a deed, and ``always`` if it is to be so as long as the file is there.

    raise    it fails, and nothing is done
    lose     it is done, and its answer is lost
    memory   there is no memory for it (``map``, ``room``, ``load``)
    hold     it waits until ``<file>.<step>.held`` is removed
    kill     the process that takes it gets SIGKILL
    wrong    the ``probe`` answers with other tokens
    nan      the ``probe`` runs into NaN

Steps of a rank are ``map``, ``room``, ``load`` (halfway) and its commands (``check``, ``install``,
``settle``, ``repair``); of EngineCore ``rpc-<command>``, ``pause``, ``probe``, ``label`` and
``resume``.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HALFWAY = 3  # tensors of a load, of some twenty
HOLD_SECONDS = 300.0  # then whoever holds it has gone


def break_engine_core() -> None:
    """In EngineCore's process (and harmless in the others)."""
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    from hotweights.adapters.vllm import probe

    if hasattr(probe.run, "sabotaged"):
        return
    for cls in (EngineCore, EngineCoreProc):  # the second has a pause of its own
        cls.pause_scheduler = _breakable(cls.pause_scheduler, lambda *_: "pause")
    EngineCore.resume_scheduler = _breakable(EngineCore.resume_scheduler, lambda *_: "resume")
    EngineCore.set_weight_version = _breakable(EngineCore.set_weight_version, lambda *_: "label")
    EngineCore.collective_rpc = _breakable(EngineCore.collective_rpc, _rpc)
    probe.run = _breakable(probe.run, lambda *_: "probe", _spoiled)


def break_rank() -> None:
    """In a worker's process, once it has its model: these modules cannot be imported before."""
    from hotweights.adapters.vllm.rank import engine, image, room
    from hotweights.adapters.vllm.rank.shadow import model

    if hasattr(room.measure, "sabotaged"):
        return
    engine.Engine.command = _breakable(  # type: ignore[method-assign]
        engine.Engine.command, lambda _, name, *rest: str(name)
    )
    image._mmap = _breakable(image._mmap, lambda *_: "map")
    room.measure = _breakable(room.measure, lambda *_: "room", _short)
    between = model._between

    def breakable(*args: Any) -> Iterator[Any]:
        for number, item in enumerate(between(*args)):
            if number == HALFWAY:
                _do("load", _order("load"))
            yield item

    model._between = breakable  # type: ignore[assignment]


def _breakable(
    original: Callable[..., Any],
    step_of: Callable[..., str],
    spoil: Callable[[str, Any], Any] = lambda deed, result: result,
) -> Any:
    @functools.wraps(original)  # vLLM reads the signatures of what is called over its queues
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        step = step_of(*args)
        deed = _order(step)
        _do(step, deed)
        result = original(*args, **kwargs)
        if deed == "lose":
            raise RuntimeError(f"sabotage: the answer of {step} is lost")
        return spoil(deed, result)

    wrapped.sabotaged = True  # type: ignore[attr-defined]
    return wrapped


def _order(step: str) -> str:
    path = _file(step)
    try:
        deed, *often = path.read_text().split()
    except OSError:
        return ""
    if deed == "hold":
        path.rename(path.with_name(f"{path.name}.held"))
    elif not often:
        path.unlink()
    return deed


def _do(step: str, deed: str) -> None:
    if deed == "raise":
        raise RuntimeError(f"sabotage: {step} fails")
    if deed == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "hold":
        deadline = time.monotonic() + HOLD_SECONDS
        held = _file(f"{step}.held")
        while held.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    if deed == "memory" and step == "map":
        from hotweights.adapters.vllm.rank.table import ImageError

        raise ImageError(f"could not map: {os.strerror(12)}")  # ENOMEM, as `_mmap` says it
    if deed == "memory" and step == "load":
        import torch

        raise torch.OutOfMemoryError("sabotage: out of memory")


def _rpc(_: Any, method: Any, timeout: Any = None, args: Any = (), *rest: Any) -> str:
    return f"rpc-{args[0]}" if args else "rpc"


def _spoiled(deed: str, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if deed == "wrong":
        return [{**item, "tokens": [t + 1 for t in item["tokens"]]} for item in answers]
    return [{**item, "nan": True} for item in answers] if deed == "nan" else answers


def _short(deed: str, room: Any) -> Any:
    return dataclasses.replace(room, device_nbytes=0) if deed == "memory" else room


def _file(step: str) -> Path:
    return Path(f"{os.environ['HOTWEIGHTS_SABOTAGE']}.{step}")
