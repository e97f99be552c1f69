"""What an install of a finished version does to the running model: which tensors are copied, which
values are set.

What post-processing leaves beside the parameters (packed copies in closures, scales as plain
numbers) is carried over if it is a tensor, a function or a plain value. Of another object the
running model has its own, which is right as long as its tensors are parameters; where it has
tensors of its own, and where captured CUDA graphs hold what would change, it is `Unsupported`, and
`reload` does it instead.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hotweights.adapters.vllm.rank.shadow import leftovers, skeleton
from hotweights.adapters.vllm.rank.shadow.anatomy import Modules, full_name, tensors_of

_COMPARED_NBYTES = 64 << 20  # at once
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Unsupported(Exception):
    """This model cannot be finished beside the running one; the message says why."""


class Changes:
    """From modules without a version to the same with one. Made before the version is loaded into
    them; only `leave_equal` reads the running model's memory, and nothing here writes it.
    """

    def __init__(
        self, modules: Modules, live: Mapping[str, torch.nn.Module], captured: bool
    ) -> None:
        """``live``: the running model's modules by the same names. ``captured``: graphs of it may
        hold what it has (`leftovers.is_captured`).
        """
        self._modules, self._live, self._captured = modules, live, captured
        self.moves: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self.values: list[tuple[torch.nn.Module, str, Any]] = []
        # what loading and post-processing leave beside parameters is what was not there before
        self._before = {name: attributes_of(module) for name, module in modules}
        self._inside = leftovers.storages_in(
            value for attributes in self._before.values() for value in attributes.values()
        )

    def plan(self, filled: Mapping[str, int] | None) -> None:
        """Everything that an install will do, checked now: afterwards only the copying itself can
        go wrong. ``filled`` as in `Shadow.load`. Raises `Unsupported`.
        """
        seen: set[int] = set()
        for name, module in self._modules:
            live = self._live[name]
            for key, new in module._parameters.items():
                old = live._parameters.get(key)
                if new is None and old is None:
                    continue  # a layer without a bias, for instance
                full = full_name(name, key)
                if new is None or old is None or new.is_meta:
                    raise Unsupported(f"{full} exists only on one side after post-processing")
                if id(old) not in seen:  # tied modules share one tensor: it is copied once
                    seen.add(id(old))
                    self._move(full, old.data, new.data)
            for key, buffer in module._buffers.items():
                old = live._buffers.get(key)
                # A buffer that no checkpoint fills is the running model's own state: hands off.
                # Where nobody knows, it began as the running model's, so copying it back is safe.
                loaded = (
                    key not in module._non_persistent_buffers_set
                    if filled is None
                    else full_name(name, key) in filled
                )
                if buffer is not None and old is not None and loaded and id(old) not in seen:
                    seen.add(id(old))
                    self._move(full_name(name, key), old.data, buffer.data)
        known = self._known()
        for name, module in self._modules:
            self._plan_values(name, module, self._before[name], known)
        self._check_kept()

    def _check_kept(self) -> None:
        """An object that was there before is the running model's own there; if it was given tensors
        of its own meanwhile (weights packed for a kernel), those would be lost.
        """
        kept = {
            full_name(name, key): value
            for name, module in self._modules
            for key, value in attributes_of(module).items()
            if self._before[name].get(key) is value
        }
        new = leftovers.storages_in(kept.values()) - self._inside - self._known()
        for name, value in kept.items() if new else ():
            if leftovers.storages_in([value]) & new:
                raise Unsupported(f"post-processing leaves tensors inside of {name}")

    def _known(self) -> set[int]:
        return {skeleton.storage_of(tensor) for _, _, tensor in tensors_of(self._modules)}

    def leave_equal(self, pause: Callable[[], None]) -> None:
        """What the running model has already, bit for bit, needs no copy in the pause."""
        different = []
        for move in self.moves:
            if not _same_bits(move[1], move[2]):
                different.append(move)
            pause()
        self.moves = different

    def _plan_values(
        self, name: str, module: torch.nn.Module, before: dict[str, Any], known: set[int]
    ) -> None:
        live = self._live[name]
        for key, value in attributes_of(module).items():
            if key in before and before[key] is value:
                continue  # the constructor's: the running model has its own (`_check_kept`)
            old, full = live.__dict__.get(key), full_name(name, key)
            if isinstance(value, torch.Tensor):
                if (
                    isinstance(old, torch.Tensor)
                    and old.shape == value.shape
                    and old.dtype == value.dtype
                ):
                    self._move(full, old, value)  # in place, as a parameter is
                    continue
                changes = True
            elif isinstance(value, types.FunctionType):
                changes = leftovers.has_own_tensors(value, known)
            elif isinstance(value, leftovers.PLAIN):
                # by what they look like: 0.0 equals -0.0, and 1 equals True
                changes = type(value) is not type(old) or repr(value) != repr(old)
            elif (
                old is None
                or type(old) is not type(value)
                or leftovers.has_own_tensors(value, known)
            ):
                raise Unsupported(f"post-processing leaves a {type(value).__name__} in {full}")
            else:
                continue  # the running model has one, over its own parameters
            if changes and self._captured:
                raise Unsupported(f"captured graphs may hold {full}, which would change")
            self.values.append((live, key, value))

    def _move(self, name: str, old: torch.Tensor, new: torch.Tensor) -> None:
        if old.shape != new.shape or old.dtype != new.dtype:
            raise Unsupported(
                f"{name} is {new.dtype} {list(new.shape)} in the version, and {old.dtype} "
                f"{list(old.shape)} in the running model"
            )
        if torch._debug_has_internal_overlap(old) == 1:  # expanded: nothing can be copied into it
            raise Unsupported(f"{name} is one value that is shown many times")
        self.moves.append((name, old, new))


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of one shape and dtype. As integers: a NaN equals none, and -0.0 equals 0.0."""
    integers = _INTEGERS.get(one.element_size())
    if integers is None:
        return False
    one, other = one.view(integers), other.view(integers)
    if not one.dim() or not one.numel():
        return bool(torch.equal(one, other))
    # piece by piece: comparing takes memory for an answer of each element
    rows = max(1, _COMPARED_NBYTES * one.shape[0] // one.nbytes)
    pieces = zip(one.split(rows), other.split(rows), strict=True)
    return all(bool(torch.equal(mine, theirs)) for mine, theirs in pieces)


def attributes_of(module: torch.nn.Module) -> dict[str, Any]:
    """Of a module, by name, beside its parameters, buffers and modules."""
    # ``training`` is a mode that the running model was put into, no result of loading
    return {
        key: value
        for key, value in module.__dict__.items()
        if key not in skeleton.INTERNAL and key != "training"
    }
