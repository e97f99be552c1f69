"""What post-processing leaves in a module beside its parameters, and whether it can be exchanged.

vLLM's layers keep packed weights in closures, scales as plain numbers, and objects over their own
parameters (a fused MoE's kernel). This module only looks; `shadow` decides.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from hotweights.adapters.vllm.rank.shadow.skeleton import storage_of

# values of attributes that cannot lead back to the shadow's modules; functions are there because
# vLLM's CPU layers keep packed weights in closures
SIMPLE = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
PLAIN = (*SIMPLE, types.FunctionType)
_MAX_OBJECTS = 10_000  # that are looked through for tensors, in one attribute
_MAX_OBJECTS_OF_A_MODEL = 1_000_000


def is_captured(vllm_config: Any, device: torch.device) -> bool:
    """Whether what runs was recorded or compiled once, with the addresses and numbers of then."""
    compilation = vllm_config.compilation_config
    eager = compilation.mode == 0 and compilation.cudagraph_mode.name == "NONE"
    return device.type != "cpu" and not eager


def may_sleep(vllm_config: Any) -> bool:
    """Whether the model's memory may be taken away meanwhile (``--enable-sleep-mode``)."""
    return bool(getattr(vllm_config.model_config, "enable_sleep_mode", False))


def has_own_tensors(value: Any, known: set[int]) -> bool:
    """Whether an object, or a function's closure, has a tensor that is none of ``known`` memory."""
    return any(
        tensor is None or storage_of(tensor) not in known  # who knows what else is in there
        for tensor in _tensors([value], _MAX_OBJECTS)
    )


def storages_in(values: Iterable[Any]) -> set[int]:
    """The memory of all tensors that objects lead to, but not of modules that they refer to."""
    found = _tensors(values, _MAX_OBJECTS_OF_A_MODEL)
    return {storage_of(tensor) for tensor in found if tensor is not None}


def _tensors(values: Iterable[Any], most: int) -> Iterator[torch.Tensor | None]:
    """Those that objects lead to; None where more than ``most`` objects are in the way."""
    left, seen = list(values), set()
    while left:
        item = left.pop()
        if isinstance(item, torch.Tensor):
            yield item
        # modules are looked at themselves, and classes are nobody's
        elif id(item) not in seen and not isinstance(item, torch.nn.Module | type):
            seen.add(id(item))
            if len(seen) > most:
                yield None
                return
            left += parts(item)


def parts(item: Any) -> list[Any]:
    """What an object refers to: items, attributes, or the values that a function closes over."""
    if isinstance(item, dict):
        return list(item.values())
    if isinstance(item, list | tuple | set | frozenset):
        return list(item)
    if isinstance(item, types.FunctionType):
        return [cell.cell_contents for cell in item.__closure__ or () if _is_set(cell)]
    if isinstance(item, types.MethodType):
        return [item.__self__, item.__func__]
    slots = [getattr(item, name, None) for name in getattr(type(item), "__slots__", ())]
    return [*slots, *getattr(item, "__dict__", {}).values()]


def _is_set(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that was never given a value
        return False
