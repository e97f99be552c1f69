"""A second model beside the running one: the new version is loaded and finished there, and the
pause only copies.

It is the cold start, done again while serving: the same constructor, the model's own loaders, the
same post-processing; so what a cold load gets right (tied embeddings, fused and repacked weights,
experts) comes out right here, where an in-place reload does not. Of a version that differs in some
layers only those are done (`delta`). Between two versions it is a `skeleton` and takes no memory. It
is built once, at start-up and on the worker's main thread, because the constructor depends on
settings that are global to the process (default dtype, current config).

Mirrored from vLLM 0.32, so that a newer vLLM has to be compared with it again:
``model_loader/utils.py`` (``process_weights_after_loading``, in `Shadow._post_process`; called as
they are: ``initialize_model``, ``device_loading_context``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.utils import device_loading_context

from hotweights.adapters.vllm import releases
from hotweights.adapters.vllm.rank.fit.dry_load import Spec, Trace
from hotweights.adapters.vllm.rank.shadow import anatomy, leftovers, skeleton, tracing
from hotweights.adapters.vllm.rank.shadow.anatomy import full_name, tensors_of
from hotweights.adapters.vllm.rank.shadow.changes import Changes, Unsupported
from hotweights.adapters.vllm.rank.shadow.default_dtype import default_dtype
from hotweights.adapters.vllm.rank.shadow.materials import Materials, check_written
from hotweights.adapters.vllm.rank.shadow.pristine import Pristine
from hotweights.adapters.vllm.rank.throttle import giving_way

Tensors = Iterable[tuple[str, torch.Tensor]]


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
        self._model, constants = skeleton.build(vllm_config)
        self._materials = Materials(self._live, constants, device)
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
        self._groups = anatomy.groups_of(self._model, self._modules)
        self._chosen = self._modules  # of the version that is in it
        self._changes: Changes | None = None  # that it makes
        self._captured = leftovers.is_captured(vllm_config, device)

    @property
    def ready(self) -> bool:
        """Whether a finished version is in it."""
        return self._changes is not None

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
        made: dict[int, torch.Tensor] = {}  # by identity, as in `Materials.put`
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
            full_name(prefix, key): self._groups[prefix]
            for prefix, key, _ in tensors_of(self._modules)
        }

    def fillable(self) -> frozenset[str]:
        """What a checkpoint can fill: parameters, and buffers that are saved with them. Of those
        that share memory the first, as in a trace.
        """
        names: dict[int, str] = {}
        modules = dict(self._modules)
        for prefix, key, tensor in tensors_of(self._modules):
            if key not in modules[prefix]._non_persistent_buffers_set:
                names.setdefault(skeleton.storage_of(tensor), full_name(prefix, key))
        return frozenset(names.values())

    def embeddings(self) -> frozenset[str]:
        """The parameters that hold the vocabulary's embeddings, whatever they are called."""
        return frozenset(full_name(prefix, "weight") for prefix in self._embeddings())

    def tied(self) -> frozenset[str]:
        """Those of them that the running model uses as its head too."""
        heads = {
            skeleton.storage_of(self._live[prefix].weight)
            for prefix in anatomy.vocabularies(self._modules, self._live, is_head=True)
        }
        return frozenset(
            full_name(prefix, "weight")
            for prefix in self._embeddings()
            if skeleton.storage_of(self._live[prefix].weight) in heads
        )

    def _embeddings(self) -> Iterator[str]:
        return anatomy.vocabularies(self._modules, self._live, is_head=False)

    def _targets(self) -> Iterator[tuple[str, torch.Tensor]]:
        for prefix, key, tensor in tensors_of(self._chosen):
            yield full_name(prefix, key), tensor

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
                to_check = self._materials.put(self._chosen, filled, 0.0 if proven else math.nan)
                changes = Changes(self._chosen, self._live, self._captured)
                self._model.load_weights(_between(tensors, pause))
                check_written(to_check)
                self._post_process(pause)
            changes.plan(filled)
            if not leftovers.may_sleep(
                self._config
            ):  # vLLM may give it other weights when it wakes
                changes.leave_equal(pause)
        except BaseException:
            self.clear()
            raise
        self._changes = changes  # last: only a plan without a contradiction may be installed
        return sum(new.nbytes for _, _, new in changes.moves)

    def nbytes(self, groups: Collection[str] | None = None) -> int:
        """What a version takes here before it is finished, in bytes; or these groups of it. Asked
        of the skeleton.
        """
        tensors = {
            id(tensor): tensor.nbytes
            for prefix, _, tensor in tensors_of(self._modules)
            if groups is None or self._groups[prefix] in groups
        }
        return sum(tensors.values())

    @property
    def moves(self) -> tuple[tuple[str, torch.Tensor, torch.Tensor], ...]:
        """What is to be copied: a parameter's or attribute's name, the running model's tensor, the
        finished version's.
        """
        return tuple(self._changes.moves) if self._changes is not None else ()

    @property
    def values(self) -> tuple[tuple[torch.nn.Module, str, Any], ...]:
        """What is to be set: a module of the running model, an attribute's name, its value."""
        return tuple(self._changes.values) if self._changes is not None else ()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def install(self) -> int:
        """Copy the finished version over the running model. Nothing here allocates, waits, or can
        disagree about a shape. Gives bytes copied; on a GPU they are under way until the caller
        synchronizes. The model must be paused. Raises RuntimeError without a finished version.

        In place (``Tensor.copy_``): captured graphs and kernels keep the addresses that they know.
        """
        if not self.ready:
            raise RuntimeError("there is no finished version to copy")
        for _, old, new in self.moves:
            old.copy_(new)
        self.set_values()
        return sum(new.nbytes for _, _, new in self.moves)

    def set_values(self) -> None:
        """The part of `install` that is not a copy: plain values and packed copies that
        post-processing left in attributes.
        """
        for module, name, value in self.values:
            setattr(module, name, value)

    def clear(self) -> None:
        """Back to the skeleton: what was loaded is freed once nothing else refers to it."""
        self._changes = None
        self._chosen = self._modules
        self._pristine.restore()

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
        is_deferred = releases.api().is_deferred_attention_layer
        for _, module in self._chosen:
            if is_deferred(module):
                with device_loading_context(module, self._device):
                    module.process_weights_after_loading(self._config.model_config.dtype)
                pause()
        if hasattr(self._model, "process_weights_after_loading"):
            self._model.process_weights_after_loading()


def _between(tensors: Tensors, pause: Callable[[], None]) -> Iterator[tuple[str, torch.Tensor]]:
    for item in tensors:
        yield item
        pause()
