"""What a version is loaded into: real tensors in the place of a skeleton's.

Nothing uninitialised is ever installed. A tensor begins as the constructor made it, as far as that
is known, a buffer as the running model has it; what remains is zero if the version was proven to
fill as much as the boot did (the rest is padding), else NaN, and `Incomplete` if any is left.
Integers know no NaN: of theirs the loaders' own count decides, and where they could not be asked,
zero stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from hotweights.adapters.vllm.rank.shadow import skeleton
from hotweights.adapters.vllm.rank.shadow.anatomy import Modules, full_name


class Incomplete(Exception):
    """A version leaves a part of a parameter unwritten; the message names it."""


class Materials:
    """Where tensors come from: the running model's modules, by name, what the skeleton's
    constructor wrote, and the device.
    """

    def __init__(
        self,
        live: Mapping[str, torch.nn.Module],
        constants: skeleton.Constants,
        device: torch.device,
    ) -> None:
        self._live, self._constants, self._device = live, constants, device

    def put(
        self, modules: Modules, filled: Mapping[str, int] | None, rest: float
    ) -> list[tuple[str, torch.Tensor]]:
        """Real tensors for meta ones. ``filled``: elements that the version writes, by full name;
        None: not known. ``rest`` is what an element is that nobody writes; gives the tensors, by
        name, that begin as NaN (`check_written`). Raises `Incomplete`.
        """
        to_check: list[tuple[str, torch.Tensor]] = []
        counts = filled or {}
        # by identity: tied modules share one tensor here as there
        made: dict[int, torch.Tensor] = {}
        for name, module in modules:
            for table, live in (
                (module._parameters, None),
                (module._buffers, self._live[name]._buffers),
            ):
                for key, meta in table.items():
                    if meta is None:
                        continue
                    if id(meta) not in made:
                        # where the constructor chose a device itself, it chooses that one again
                        device = self._device if meta.is_meta else meta.device
                        real = made[id(meta)] = skeleton.like(meta, device)
                        full = full_name(name, key)
                        count = None if filled is None else counts.get(full, 0)
                        # what a constructor computed, a meta device does not know: buffers, and
                        # parameters that no checkpoint fills
                        current = None if live is None else live.get(key)
                        if live is None and count == 0 and rest == 0.0:
                            current = self._computed(name, key, meta)
                        if current is not None and current.shape == meta.shape:
                            real.copy_(current)
                        elif self._begin(full, meta, real, rest, count):
                            to_check.append((full, real))
                    table[key] = made[id(meta)]
        return to_check

    def _computed(self, name: str, key: str, meta: torch.Tensor) -> torch.Tensor | None:
        parameter = self._live[name]._parameters.get(key)
        known = self._constants.knows(meta) or not meta.is_meta
        if known or parameter is None or parameter.dtype != meta.dtype:
            return None
        return parameter

    def _begin(
        self,
        name: str,
        meta: torch.Tensor,
        real: torch.Tensor,
        rest: float,
        count: int | None,
    ) -> bool:
        """As the constructor made it, else as ``rest`` says. ``count``: elements that the version
        writes; None: not known. Gives whether it began as NaN.
        """
        if not meta.is_meta:
            real.copy_(meta)
            return False
        if self._constants.fill(meta, real):
            return False
        if math.isnan(rest) and real.is_floating_point():
            real.fill_(rest)
            return True
        if math.isnan(rest) and count is not None and count < meta.numel():
            raise Incomplete(
                f"{meta.numel() - count} of {meta.numel()} elements of {name} are in no tensor"
            )
        real.zero_()
        return False


def check_written(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise `Incomplete` if any of those that began as NaN still has some."""
    for name, tensor in tensors:
        left = int(torch.isnan(tensor).sum())
        if left:
            raise Incomplete(f"{left} of {tensor.numel()} elements of {name} are in no tensor")
