"""A second model beside the running one: the new version is loaded and finished there, and the
pause only copies.

It is the cold start, done again while serving: the same constructor, the model's own loaders, the
same post-processing; so what a cold load gets right (tied embeddings, fused and repacked weights,
experts) comes out right here, where an in-place reload does not. Of a version that differs in some
layers only those are done (`delta`). Between two versions it is a `skeleton` and takes no memory. It is built once, at start-up and on the worker's main thread,
because the constructor depends on settings that are global to the process (default dtype, current
config).

Nothing uninitialised is ever installed. A tensor begins as the constructor made it, as far as that
is known, a buffer as the running model has it; what remains is zero if the version was proven to
fill as much as the boot did (the rest is padding), else NaN, and `Incomplete` if any is left.
Integers know no NaN: of theirs the loaders' own count decides, and where they could not be asked,
zero stays.

What post-processing leaves beside the parameters (packed copies in closures, scales as plain
numbers) is carried over if it is a tensor, a function or a plain value. Of another object the
running model has its own, which is right as long as its tensors are parameters; where it has
tensors of its own, and where captured CUDA graphs hold what would change, it is `Unsupported`, and
`reload` does it instead.

Mirrored from vLLM 0.32, so that a newer vLLM has to be compared with it again:
``model_loader/utils.py`` (``process_weights_after_loading``, in `Shadow._post_process`; called as
they are: ``initialize_model``, ``device_loading_context``) and ``layers/attention/__init__.py``
(``is_deferred_attention_layer``).
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.utils import device_loading_context

from hotweights.adapters.vllm.rank import leftovers, skeleton, tracing
from hotweights.adapters.vllm.rank.default_dtype import default_dtype
from hotweights.adapters.vllm.rank.fit.dry_load import Spec, Trace
from hotweights.adapters.vllm.rank.pristine import Pristine
from hotweights.adapters.vllm.rank.throttle import giving_way

Tensors = Iterable[tuple[str, torch.Tensor]]
_COMPARED_NBYTES = 64 << 20  # at once
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Unsupported(Exception):
    """This model cannot be finished beside the running one; the message says why."""


class Incomplete(Exception):
    """A version leaves a part of a parameter unwritten; the message names it."""


class Shadow:
    """The skeleton, and the version in it. One thread at a time; only `install` touches the running
    model. Built on the worker's main thread; `trace`, `load` and `clear` run on the thread that
    prepares, `install` and a whole repair on the main thread: `Versions` keeps them apart, by its
    lock and its pin.

    Raises `Unsupported`, or whatever the model's constructor raises.
    """

    def __init__(self, live: torch.nn.Module, vllm_config: Any, device: torch.device) -> None:
        self._config = vllm_config
        self._device = device
        self._live = skeleton.by_name(live)
        self._model, self._constants = skeleton.build(vllm_config)
        # rotary tables come from a cache that the running model uses too
        shared = set(live.modules())
        self._modules = [
            (name, module) for name, module in self._model.named_modules() if module not in shared
        ]
        for name, _ in self._modules:
            if name not in self._live:
                raise Unsupported(f"the running model has no module {name!r} (is it wrapped?)")
        if any(map(skeleton.quantizes_online, self._model.parameters())):
            raise Unsupported("its weights are quantized while they are loaded, layer by layer")
        self._pristine = Pristine([module for _, module in self._modules], live)
        self._groups = self._find_groups()
        self._chosen = self._modules  # of the version that is in it
        self._moves: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self._values: list[tuple[torch.nn.Module, str, Any]] = []
        self._to_check: list[tuple[str, torch.Tensor]] = []
        self._captured = leftovers.is_captured(vllm_config, device)
        self.ready = False

    def parameters(self) -> dict[str, int]:
        """Elements of every parameter that a checkpoint can fill (of this rank)."""
        return {name: parameter.numel() for name, parameter in self._model.named_parameters()}

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def trace(self, specs: Mapping[str, Spec]) -> Trace:
        """Ask the loaders what they would do with such tensors; nothing is loaded and no memory is
        taken. The answer counts elements of this rank's parameters and buffers, by their names in
        the skeleton.

        It needs the skeleton: a shadow with a version in it is not the one to ask (RuntimeError).
        What a loader raises is in the answer.
        """
        if self.ready:
            raise RuntimeError("this shadow holds a version; ask another one")
        try:
            self._without_data()
            before = self._storages()
            with default_dtype(self._config.model_config.dtype):
                found = tracing.trace(self._model, self._targets(), specs)
            found.opaque = self._storages() != before
            found.left = self._pristine.left_values()
        finally:
            self.clear()
        return found

    def _without_data(self) -> None:
        """Tensors that the constructor put on a device itself have a shape alone here, as others
        have.
        """
        made: dict[int, torch.Tensor] = {}  # by identity, as in `_materialize`
        for _, module in self._modules:
            for table in (module._parameters, module._buffers):
                for key, tensor in table.items():
                    if tensor is not None and not tensor.is_meta:
                        if id(tensor) not in made:
                            made[id(tensor)] = skeleton.like(tensor, torch.device("meta"))
                        table[key] = made[id(tensor)]

    def _storages(self) -> list[tuple[str, int]]:
        return [(name, skeleton.storage_of(tensor)) for name, tensor in self._targets()]

    def groups(self) -> dict[str, str]:
        """Of every parameter and buffer, the group of modules that is loaded and finished by itself
        (`load`): what is in one layer, or shares memory. Empty: this model has no such parts.
        """
        if not self._groups:
            return {}
        return {
            _full(prefix, key): self._groups[prefix] for prefix, key, _ in _tensors(self._modules)
        }

    def _find_groups(self) -> dict[str, str]:
        inside = skeleton.blocks(self._model)
        attention = [name for name, m in self._modules if is_deferred_attention_layer(m)]
        if hasattr(self._model, "process_weights_after_loading") or any(
            inside[name] == name for name in attention
        ):
            return {}  # finishing reaches over modules, and nobody says which
        joined: dict[str, str] = {}

        def group(name: str) -> str:
            while name in joined:
                name = joined[name]
            return name

        # tied modules, in whatever groups they are
        of_storage: dict[int, str] = {}
        for prefix, _, tensor in _tensors(self._modules):
            mine = group(inside[prefix])
            other = group(of_storage.setdefault(skeleton.storage_of(tensor), mine))
            if mine != other:
                joined[mine] = other
        return {prefix: group(inside[prefix]) for prefix, _ in self._modules}

    def fillable(self) -> frozenset[str]:
        """What a checkpoint can fill: parameters, and buffers that are saved with them. Of those
        that share memory the first, as in a trace.
        """
        names: dict[int, str] = {}
        modules = dict(self._modules)
        for prefix, key, tensor in _tensors(self._modules):
            if key not in modules[prefix]._non_persistent_buffers_set:
                names.setdefault(skeleton.storage_of(tensor), _full(prefix, key))
        return frozenset(names.values())

    def embeddings(self) -> frozenset[str]:
        """The parameters that hold the vocabulary's embeddings, whatever they are called."""
        return frozenset(_full(prefix, "weight") for prefix in self._vocabularies(is_head=False))

    def tied(self) -> frozenset[str]:
        """Those of them that the running model uses as its head too."""
        heads = {
            skeleton.storage_of(self._live[prefix].weight)
            for prefix in self._vocabularies(is_head=True)
        }
        return frozenset(
            _full(prefix, "weight")
            for prefix in self._vocabularies(is_head=False)
            if skeleton.storage_of(self._live[prefix].weight) in heads
        )

    def _vocabularies(self, is_head: bool) -> Iterator[str]:
        """Layers with a row for each token, by name; heads or embeddings. Quantized ones have no
        such weight.
        """
        for prefix, module in self._modules:
            if (
                isinstance(module, VocabParallelEmbedding)
                and isinstance(module, ParallelLMHead) is is_head
                and isinstance(getattr(self._live[prefix], "weight", None), torch.Tensor)
            ):
                yield prefix

    def _targets(self) -> Iterator[tuple[str, torch.Tensor]]:
        for prefix, key, tensor in _tensors(self._chosen):
            yield _full(prefix, key), tensor

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def load(
        self,
        tensors: Tensors,
        filled: Mapping[str, int] | None,
        pause: Callable[[], None],
        *,
        proven: bool = True,
        groups: Collection[str] | None = None,
    ) -> int:
        """Load and finish a version; ``pause`` is called between small steps and may sleep or
        raise. Gives bytes to copy: those that the running model has not yet.

        ``groups``: only these are done, and ``tensors`` has what they are loaded from; the rest of
        the running model is the version's already. None: all of it.

        ``filled`` says of the parameters and buffers that this version's tensors write how many
        elements each gets (`Compatibility.filled`); None: not known. Parameters are copied either
        way. A buffer is copied if it is among them, and where that is not known if it is one that
        a checkpoint can fill. ``proven``: the version was held against the checkpoint that this
        engine booted from, and fills as much.

        Raises `Unsupported`, `Incomplete`, what ``pause`` raises, and whatever loaders raise; the
        shadow is a skeleton again then.
        """
        self.clear()
        if groups is not None:
            self._chosen = [item for item in self._modules if self._groups[item[0]] in groups]
        try:
            # global to the process, and asked for where models are built and finished, which the
            # running one was before anything is loaded here
            with (
                set_current_vllm_config(self._config),
                default_dtype(self._config.model_config.dtype),
                giving_way(),
            ):
                self._materialize(filled, 0.0 if proven else math.nan)
                # what loading and post-processing leave beside them is carried over too
                before = {name: _attributes(module) for name, module in self._chosen}
                inside = leftovers.storages_in(
                    value for attributes in before.values() for value in attributes.values()
                )
                self._model.load_weights(_between(tensors, pause))
                self._check_written()
                self._post_process(pause)
            self._plan(before, filled)
            self._check_kept(before, inside)
            self._leave_equal(pause)
        except BaseException:
            self.clear()
            raise
        self.ready = True  # last: only a plan without a contradiction may be installed
        return sum(new.nbytes for _, _, new in self._moves)

    def nbytes(self, groups: Collection[str] | None = None) -> int:
        """What a version takes here before it is finished, in bytes; or these groups of it. Asked
        of the skeleton.
        """
        tensors = {
            id(tensor): tensor.nbytes
            for prefix, _, tensor in _tensors(self._modules)
            if groups is None or self._groups[prefix] in groups
        }
        return sum(tensors.values())

    @property
    def moves(self) -> tuple[tuple[str, torch.Tensor, torch.Tensor], ...]:
        """What is to be copied: a parameter's or attribute's name, the running model's tensor, the
        finished version's.
        """
        return tuple(self._moves)

    @property
    def values(self) -> tuple[tuple[torch.nn.Module, str, Any], ...]:
        """What is to be set: a module of the running model, an attribute's name, its value."""
        return tuple(self._values)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def install(self) -> int:
        """Copy the finished version over the running model. Nothing here allocates, waits, or can
        disagree about a shape. Gives bytes copied; on a GPU they are under way until the caller
        synchronizes. The model must be paused. Raises RuntimeError without a finished version.

        In place (``Tensor.copy_``): captured graphs and kernels keep the addresses that they know.
        """
        if not self.ready:
            raise RuntimeError("there is no finished version to copy")
        for _, old, new in self._moves:
            old.copy_(new)
        self.set_values()
        return sum(new.nbytes for _, _, new in self._moves)

    def set_values(self) -> None:
        """The part of `install` that is not a copy: plain values and packed copies that
        post-processing left in attributes.
        """
        for module, name, value in self._values:
            setattr(module, name, value)

    def clear(self) -> None:
        """Back to the skeleton: what was loaded is freed once nothing else refers to it."""
        self.ready = False
        self._moves, self._values, self._to_check = [], [], []
        self._chosen = self._modules
        self._pristine.restore()

    def _materialize(self, filled: Mapping[str, int] | None, rest: float) -> None:
        """Real tensors for meta ones. ``rest`` is what an element is that nobody writes."""
        counts = filled or {}
        # by identity: tied modules share one tensor here as there
        made: dict[int, torch.Tensor] = {}
        for name, module in self._chosen:
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
                        full = _full(name, key)
                        count = None if filled is None else counts.get(full, 0)
                        # what a constructor computed, a meta device does not know: buffers, and
                        # parameters that no checkpoint fills
                        current = None if live is None else live.get(key)
                        if live is None and count == 0 and rest == 0.0:
                            current = self._computed(name, key, meta)
                        if current is not None and current.shape == meta.shape:
                            real.copy_(current)
                        else:
                            self._begin(full, meta, real, rest, count)
                    table[key] = made[id(meta)]

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
    ) -> None:
        """As the constructor made it, else as ``rest`` says. ``count``: elements that the version
        writes; None: not known.
        """
        if not meta.is_meta:
            real.copy_(meta)
            return
        if self._constants.fill(meta, real):
            return
        if math.isnan(rest) and real.is_floating_point():
            real.fill_(rest)
            self._to_check.append((name, real))
            return
        if math.isnan(rest) and count is not None and count < meta.numel():
            raise Incomplete(
                f"{meta.numel() - count} of {meta.numel()} elements of {name} are in no tensor"
            )
        real.zero_()

    def _check_written(self) -> None:
        for name, tensor in self._to_check:
            left = int(torch.isnan(tensor).sum())
            if left:
                raise Incomplete(f"{left} of {tensor.numel()} elements of {name} are in no tensor")
        self._to_check = []

    def _post_process(self, pause: Callable[[], None]) -> None:
        """What vLLM 0.32's ``process_weights_after_loading`` (``model_loader/utils.py``) does, with
        time to breathe between the layers, in its order: attention needs finished linear layers.

        Left out: tying an ``lm_head`` again that equals the embeddings (``maybe_retie_…``), what it
        does for pre-processed weights and for torchao, its timing, and giving memory back under
        pressure. ``requires_device_loading`` is not asked: everything lies on the device already.
        """
        for _, module in self._chosen:
            method = getattr(module, "quant_method", None)
            if isinstance(method, QuantizeMethodBase):
                with device_loading_context(module, self._device):
                    method.process_weights_after_loading(module)
                # post-processing may have put new parameters there, which do not know their layer's
                # tensor parallelism (as in vLLM)
                if hasattr(module, "update_param_tp_status"):
                    module.update_param_tp_status()
                pause()
        for _, module in self._chosen:
            if is_deferred_attention_layer(module):
                with device_loading_context(module, self._device):
                    module.process_weights_after_loading(self._config.model_config.dtype)
                pause()
        if hasattr(self._model, "process_weights_after_loading"):
            self._model.process_weights_after_loading()

    def _plan(self, before: Mapping[str, dict[str, Any]], filled: Mapping[str, int] | None) -> None:
        """Everything that `install` will do, checked now: afterwards only the copying itself can go
        wrong.
        """
        seen: set[int] = set()
        for name, module in self._chosen:
            live = self._live[name]
            for key, new in module._parameters.items():
                old = live._parameters.get(key)
                if new is None and old is None:
                    continue  # a layer without a bias, for instance
                full = _full(name, key)
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
                    else _full(name, key) in filled
                )
                if buffer is not None and old is not None and loaded and id(old) not in seen:
                    seen.add(id(old))
                    self._move(_full(name, key), old.data, buffer.data)
        known = self._known()
        for name, module in self._chosen:
            self._plan_values(name, module, before[name], known)

    def _check_kept(self, before: Mapping[str, dict[str, Any]], inside: set[int]) -> None:
        """An object that was there before is the running model's own there; if it was given tensors
        of its own meanwhile (weights packed for a kernel), those would be lost.
        """
        kept = {
            _full(name, key): value
            for name, module in self._chosen
            for key, value in _attributes(module).items()
            if before[name].get(key) is value
        }
        new = leftovers.storages_in(kept.values()) - inside - self._known()
        for name, value in kept.items() if new else ():
            if leftovers.storages_in([value]) & new:
                raise Unsupported(f"post-processing leaves tensors inside of {name}")

    def _known(self) -> set[int]:
        return {skeleton.storage_of(tensor) for _, _, tensor in _tensors(self._chosen)}

    def _leave_equal(self, pause: Callable[[], None]) -> None:
        """What the running model has already, bit for bit, needs no copy in the pause."""
        if leftovers.may_sleep(self._config):
            return  # asleep, it has no memory to be read
        different = []
        for move in self._moves:
            if not _same_bits(move[1], move[2]):
                different.append(move)
            pause()
        self._moves = different

    def _plan_values(
        self, name: str, module: torch.nn.Module, before: dict[str, Any], known: set[int]
    ) -> None:
        live = self._live[name]
        for key, value in _attributes(module).items():
            if key in before and before[key] is value:
                continue  # the constructor's: the running model has its own (`_check_kept`)
            old, full = live.__dict__.get(key), _full(name, key)
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
            self._values.append((live, key, value))

    def _move(self, name: str, old: torch.Tensor, new: torch.Tensor) -> None:
        if old.shape != new.shape or old.dtype != new.dtype:
            raise Unsupported(
                f"{name} is {new.dtype} {list(new.shape)} in the version, and {old.dtype} "
                f"{list(old.shape)} in the running model"
            )
        if torch._debug_has_internal_overlap(old) == 1:  # expanded: nothing can be copied into it
            raise Unsupported(f"{name} is one value that is shown many times")
        self._moves.append((name, old, new))


def _tensors(
    modules: Iterable[tuple[str, torch.nn.Module]],
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Parameters and buffers: their module's name, their key in it, the tensor."""
    for prefix, module in modules:
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield prefix, key, tensor


def _between(tensors: Tensors, pause: Callable[[], None]) -> Iterator[tuple[str, torch.Tensor]]:
    for item in tensors:
        yield item
        pause()


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


def _full(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    # ``training`` is a mode that the running model was put into, no result of loading
    return {
        key: value
        for key, value in module.__dict__.items()
        if key not in skeleton.INTERNAL and key != "training"
    }
