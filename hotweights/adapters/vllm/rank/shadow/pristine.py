"""What a skeleton's constructor left, and the way back to it, so that one skeleton serves every
version.

Loaders and post-processing change more than a module's tables: they leave marks on tensors, append
to lists, fill dictionaries, and give tensors to objects that a layer has had all along. All of that
is undone, in place, because closures and other objects refer to the very same ones. What the
running model refers to as well is not ours: a configuration, a registry.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from hotweights.adapters.vllm.rank.shadow import leftovers
from hotweights.adapters.vllm.rank.shadow.skeleton import INTERNAL

# not looked into: modules are looked at themselves, and the others are nobody's
_CLOSED = (torch.nn.Module, torch.Tensor, type, types.ModuleType, enum.Enum)


class Pristine:
    """Skeleton modules as their constructors left them."""

    def __init__(self, modules: Iterable[torch.nn.Module], live: torch.nn.Module) -> None:
        """``live`` is the running model, of the same kind."""
        theirs = {id(item) for item in _reached(live.modules())}
        self._modules = list(modules)
        self._tables = [
            (table, dict(table)) for m in self._modules for table in (m._parameters, m._buffers)
        ]
        self._kept: list[tuple[Any, Any]] = [
            *((module, _attributes(module)) for module in self._modules),
            # loaders leave marks there
            *(
                (tensor, dict(tensor.__dict__))
                for _, table in self._tables
                for tensor in table.values()
                if tensor is not None
            ),
        ]
        for item in _reached(self._modules):
            if id(item) not in theirs or isinstance(item, QuantizeMethodBase):
                if isinstance(item, dict | list | set):
                    self._kept.append((item, item.copy()))
                elif isinstance(getattr(item, "__dict__", None), dict):
                    self._kept.append((item, dict(item.__dict__)))

    def left_values(self) -> bool:
        """Whether a module has plain values that its constructor did not give it."""
        for module, before in self._kept[: len(self._modules)]:
            for key, value in _attributes(module).items():
                old = before.get(key)
                if value is not old and isinstance(value, leftovers.SIMPLE) and value != old:
                    return True
        return False

    def restore(self) -> None:
        """As it was. What has not changed is not touched."""
        for table, before in self._tables:
            table.clear()
            table.update(before)
        for item, before in self._kept:
            if isinstance(item, list):
                if len(item) != len(before) or any(map(_differ, item, before)):
                    item[:] = before
            elif isinstance(item, set):
                if item != before:
                    item.clear()
                    item.update(before)
            else:
                _restore(item if isinstance(item, dict) else item.__dict__, before)


def _restore(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    for key in [key for key in now if key not in before and key not in INTERNAL]:
        del now[key]
    for key, value in before.items():
        if key not in now or now[key] is not value:
            now[key] = value


def _differ(one: Any, other: Any) -> bool:
    return one is not other


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    return {key: value for key, value in module.__dict__.items() if key not in INTERNAL}


def _reached(modules: Iterable[torch.nn.Module]) -> Iterator[Any]:
    """Every container and object that modules lead to, and the marks on their tensors, each once."""
    left: list[Any] = []
    for module in modules:
        left += _attributes(module).values()
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                left += tensor.__dict__.values()
    seen: dict[int, Any] = {}  # held, so that no number is given out again meanwhile
    while left:
        item = left.pop()
        if isinstance(item, (*_CLOSED, *leftovers.SIMPLE)) or id(item) in seen:
            continue
        seen[id(item)] = item
        if not isinstance(item, types.FunctionType | types.MethodType | tuple | frozenset):
            yield item
        left += leftovers.parts(item)
