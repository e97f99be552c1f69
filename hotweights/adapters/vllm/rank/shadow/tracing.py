"""What a model's loaders would do with a checkpoint's tensors, asked with tensors that have a shape
and no data.

Whatever writes into a parameter or buffer is seen, because it is recognized by the memory behind it
and not by who calls: a ``weight_loader``, ``load_weights`` itself, or a ``state_dict`` (as vLLM's
``AutoWeightsLoader`` reaches the statistics of a BatchNorm). Where the bytes came from is followed
too, through whatever a loader makes of tensors before it writes: some wait for three of them, fuse
them, and write when the last has come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hotweights.adapters.vllm.rank.fit.dry_load import Spec, Trace
from hotweights.adapters.vllm.rank.shadow.skeleton import storage_of
from hotweights.adapters.vllm.rank.table import TORCH_NAMES, torch_shape

_COPY = torch.ops.aten.copy_.default
_VALUE = torch.ops.aten._local_scalar_dense.default  # what ``item()`` and ``bool()`` ask


def trace(
    model: torch.nn.Module, targets: Iterable[tuple[str, torch.Tensor]], specs: Mapping[str, Spec]
) -> Trace:
    """Run the loaders of a skeleton. ``targets`` are its parameters and buffers by full name; of
    those that share memory the first name counts. The answer counts elements, and what a loader
    raises is in it.
    """
    found = Trace()
    names: dict[int, tuple[str, int]] = {}
    for name, target in targets:
        names.setdefault(storage_of(target), (name, target.numel()))
    writes = _Writes(names, found)
    try:
        with writes:
            model.load_weights(writes.announce(_on_meta(specs)))
    except Exception as error:  # noqa: BLE001 - any model's loader may raise anything; it is the answer
        # 400 characters: it becomes part of one message to the agent, and reprs can be long
        found.error = f"{type(error).__name__}: {error}"[:400]
        # what meta tensors raise, or what follows from a value that was made up
        of_meta = isinstance(error, TypeError) and "meta" in str(error)
        if isinstance(error, NotImplementedError) or of_meta or writes.asked_for_values:
            found.unable = True
        else:
            found.failed = writes.current
    found.sources, found.steps = writes.sources(), writes.steps()
    return found


class _Writes(TorchDispatchMode):  # type: ignore[misc]
    """Notes every write into a target, and counts the elements of those by ``copy_``, to which
    ``param[a:b] = x`` dispatches as well (``torch.utils._python_dispatch``).

    Other writes are not counted: ``fill_`` and ``zero_`` (vLLM fills the padding of a vocabulary
    so, which is why padding is never expected), ``index_put_``, ``scatter_``. An assignment of
    ``param.data`` and a new parameter in a module are not seen. What is not counted at boot is not
    expected of a version either.
    """

    def __init__(self, names: Mapping[int, tuple[str, int]], found: Trace) -> None:
        super().__init__()
        self._names, self._found = names, found
        self.current = ""  # the tensor that the loaders were given last
        self.asked_for_values = False
        # by storage: the tensors that what is in it comes from
        self._origins: dict[int, set[str]] = {}
        self._alive: list[torch.Tensor] = []  # else a storage's number would be given out again
        self._given: dict[int, str] = {}  # by storage: the tensors of the checkpoint
        self._steps: dict[int, int] = {}  # by storage, for those that have origins

    def announce(
        self, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The same, each noted when the loaders take it."""
        for name, tensor in tensors:
            self.current = name
            self._origins_of(tensor).add(name)
            self._given[storage_of(tensor)] = name
            self._steps[storage_of(tensor)] = hash(name)
            yield name, tensor

    def sources(self) -> dict[str, frozenset[str]]:
        """Where what was written into each target comes from."""
        return {
            name: frozenset(self._origins[storage])
            for storage, (name, _) in self._names.items()
            if storage in self._origins
        }

    def steps(self) -> dict[str, int]:
        """What names all that was done to each target."""
        return {
            name: self._steps.get(storage, 0)
            for storage, (name, _) in self._names.items()
            if storage in self._origins
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _VALUE and args[0].is_meta:
            # A static FP8 scale, a counter of batches: nobody knows it here. One is a value that
            # most loaders go on with; if this one does not, it could not be asked.
            self.asked_for_values = True
            self._found.read |= self._origins.get(storage_of(args[0]), set())
            return args[0].new_ones((), device="cpu").item()
        if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
            target = self._names.get(storage_of(args[0]))
            if target is not None:
                # the current one too: perhaps it only said when to write, or where
                self._origins_of(args[0]).add(self.current)
                name, numel = target
                copied = self._found.copied.setdefault(self.current, {})
                more = args[0].numel() if func is _COPY else 0
                # Some loaders transform in place after copying: more than everything is everything.
                copied[name] = min(copied.get(name, 0) + more, numel)
        result = func(*args, **(kwargs or {}))
        given, made = tree_leaves((args, kwargs)), tree_leaves(result)
        # some write into what they are given and answer nothing (``_foreach_copy_``)
        written = _written(func, args, kwargs or {}) if func._schema.is_mutable else []
        self._found.changed.update(
            self._given[storage] for storage in map(storage_of, written) if storage in self._given
        )
        self._follow(func, given, made, written)
        return result

    def _follow(
        self, func: Any, given: list[Any], made: list[Any], written: list[torch.Tensor]
    ) -> None:
        storages = {storage_of(leaf) for leaf in given if isinstance(leaf, torch.Tensor)}
        known = storages & self._origins.keys()
        if not known:
            return
        step = hash((str(func), *map(self._describe, given)))
        for leaf in (*made, *written):
            if not isinstance(leaf, torch.Tensor):
                continue
            # a view has its storage's origins already
            for storage in known - {storage_of(leaf)}:
                self._origins_of(leaf).update(self._origins[storage])
        changed = {storage_of(tensor) for tensor in written}
        new = {storage_of(leaf) for leaf in made if isinstance(leaf, torch.Tensor)} - storages
        self._steps.update(dict.fromkeys(changed | new, step))

    def _describe(self, leaf: Any) -> Any:
        """An argument, by what was done to it if it is a tensor."""
        if isinstance(leaf, torch.Tensor):
            place = (leaf.storage_offset(), *leaf.shape, *leaf.stride())
            return (self._steps.get(storage_of(leaf), 0), str(leaf.dtype), place)
        return repr(leaf)

    def _origins_of(self, tensor: torch.Tensor) -> set[str]:
        storage = storage_of(tensor)
        if storage not in self._origins:
            self._alive.append(tensor)
            self._origins[storage] = set()
        return self._origins[storage]


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments that an operation writes into, by its schema."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found


def _on_meta(specs: Mapping[str, Spec]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, spec in specs.items():
        dtype = getattr(torch, TORCH_NAMES[spec.dtype])
        yield name, torch.empty(torch_shape(spec.dtype, spec.shape), dtype=dtype, device="meta")
