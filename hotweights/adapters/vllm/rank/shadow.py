"""A second model beside the running one: the new version is loaded and finished there, and the
pause only copies.

It is the cold start, done again while serving: the same constructor, the model's own loaders, the
same post-processing; so what a cold load gets right (tied embeddings, fused and repacked weights,
experts) comes out right here, where an in-place reload does not. Between two versions it is a
skeleton on the ``meta`` device and takes no memory. It is built once, at start-up and on the
worker's main thread, because the constructor depends on settings that are global to the process
(default dtype, current config).

What post-processing leaves beside the parameters (packed copies in closures, scales as plain
numbers) is carried over if it is a tensor, a function or a plain value. Anything else could refer
back to the shadow: then it is `Unsupported`, and `reload` does it instead.

Mirrored from vLLM 0.32, so that a newer vLLM has to be compared with it again:
``model_loader/utils.py`` (``process_weights_after_loading``, in `Shadow._post_process`; called as
they are: ``initialize_model``, ``device_loading_context``), ``layers/attention/__init__.py``
(``is_deferred_attention_layer``) and, for how a loader finds a parameter's own function,
``model_loader/weight_utils.py`` (``default_weight_loader``).

`Shadow.load` takes memory that nobody has written (`_like`) and relies on the loaders to fill it:
a parameter that they leave out would be copied as garbage over the running model's. So whoever
calls it has proven before that the version covers every parameter (`Compatibility.check`): by
`Shadow.trace` and `dry_load.check_trace` (as many elements as at boot; at least one where nothing
is known of the boot), or by equal names where no loader can be asked. Neither says anything of a
parameter that no checkpoint fills and only a constructor writes: its value is not carried over, as
buffers' are.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.utils import device_loading_context, initialize_model
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.utils.torch_utils import set_default_torch_dtype

from hotweights.adapters.vllm.rank.dry_load import Spec, Trace
from hotweights.adapters.vllm.rank.image import TORCH_NAMES
from hotweights.adapters.vllm.rank.throttle import giving_way

Tensors = Iterable[tuple[str, torch.Tensor]]
# values of attributes that cannot lead back to the shadow's modules; functions are there because
# vLLM's CPU layers keep packed weights in closures
_PLAIN = (
    bool,
    int,
    float,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    types.FunctionType,
)
# torch.nn.Module's own tables: parameters and buffers are carried over one by one, and the modules
# of the running model stay
_INTERNAL = ("_parameters", "_buffers", "_modules")


class Unsupported(Exception):
    """This model cannot be finished beside the running one; the message says what stands against
    it.
    """


class Shadow:
    """The skeleton, and the version in it. One thread at a time; only `install` touches the running
    model. Built on the worker's main thread; `trace`, `load` and `clear` run on the thread that
    prepares, `install` and a whole repair on the main thread: `Engine` keeps them apart, by its
    lock and its pin.

    Raises `Unsupported`, or whatever the model's constructor raises.
    """

    def __init__(self, live: torch.nn.Module, vllm_config: Any, device: torch.device) -> None:
        self._config = vllm_config
        self._device = device
        self._live = _by_name(live)
        self._model = _skeleton(vllm_config)
        # rotary tables come from a cache that the running model uses too
        shared = set(live.modules())
        self._modules = [
            (name, module) for name, module in self._model.named_modules() if module not in shared
        ]
        for name, _ in self._modules:
            if name not in self._live:
                raise Unsupported(f"the running model has no module {name!r} (is it wrapped?)")
        if any(map(_quantizes_online, self._model.parameters())):
            raise Unsupported("its weights are quantized while they are loaded, layer by layer")
        self._pristine = [_Pristine(module) for _, module in self._modules]
        self._moves: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self._values: list[tuple[torch.nn.Module, str, Any]] = []
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
        trace, current = Trace(), [""]
        targets = {
            f"{prefix}.{key}" if prefix else key: tensor
            for prefix, module in self._modules
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        for name, target in targets.items():
            _watch(target, name, trace, current)
        try:
            self._model.load_weights(_announce(_on_meta(specs), current))
        # what meta tensors answer when a loader asks for their values
        except NotImplementedError as error:
            trace.unable, trace.error = True, str(error)
        except Exception as error:  # noqa: BLE001 - any model's loader may raise anything; it is the answer
            # 400 characters: it becomes part of one message to the agent, and reprs can be long
            trace.failed, trace.error = current[0], f"{type(error).__name__}: {error}"[:400]
        finally:
            self.clear()
        return trace

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def load(
        self, tensors: Tensors, touched: Iterable[str] | None, pause: Callable[[], None]
    ) -> int:
        """Load and finish a version; ``pause`` is called between small steps and may sleep or
        raise. Gives bytes to copy.

        ``tensors`` cover every parameter: the caller has proven that (see the module). ``touched``
        are the full names of the parameters and buffers that this version's tensors fill
        (`Compatibility.touched`); None: not known. Parameters are copied either way, a buffer only
        if it is among them: any other is the running model's own state.

        Raises `Unsupported`, what ``pause`` raises, and whatever loaders raise; the shadow is a
        skeleton again then.
        """
        self.clear()
        try:
            with set_current_vllm_config(self._config), giving_way():
                self._materialize()
                self._model.load_weights(_between(tensors, pause))
                # after loading, before post-processing: only what the latter leaves is carried over
                before = {name: _attributes(module) for name, module in self._modules}
                self._post_process(pause)
            self._plan(before, touched)
        except BaseException:
            self.clear()
            raise
        self.ready = True  # last: only a plan without a contradiction may be installed
        return sum(new.nbytes for _, _, new in self._moves)

    @property
    def moves(self) -> tuple[tuple[str, torch.Tensor, torch.Tensor], ...]:
        """What is to be copied: a parameter's or attribute's name, the running model's tensor, the
        finished version's.
        """
        return tuple(self._moves)

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
        self._moves, self._values = [], []
        for pristine in self._pristine:
            pristine.restore()

    def _materialize(self) -> None:
        # by identity: tied modules share one tensor here as there
        made: dict[int, torch.Tensor] = {}
        for name, module in self._modules:
            live = self._live[name]
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    if id(parameter) not in made:
                        made[id(parameter)] = _like(parameter, self._device)
                    module._parameters[key] = made[id(parameter)]
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    if id(buffer) not in made:
                        made[id(buffer)] = _like(buffer, self._device)
                    module._buffers[key] = made[id(buffer)]
                    # what a constructor computed, a meta device does not know
                    current = live._buffers.get(key)
                    if current is not None and current.shape == buffer.shape:
                        made[id(buffer)].copy_(current)

    def _post_process(self, pause: Callable[[], None]) -> None:
        """What vLLM 0.32's ``process_weights_after_loading`` (``model_loader/utils.py``) does, with
        time to breathe between the layers, in its order: attention needs finished linear layers.

        Left out: tying an ``lm_head`` again that equals the embeddings (``maybe_retie_…``), what it
        does for pre-processed weights and for torchao, its timing, and giving memory back under
        pressure. ``requires_device_loading`` is not asked: everything lies on the device already.
        """
        for _, module in self._modules:
            method = getattr(module, "quant_method", None)
            if isinstance(method, QuantizeMethodBase):
                with device_loading_context(module, self._device):
                    method.process_weights_after_loading(module)
                # post-processing may have put new parameters there, which do not know their layer's
                # tensor parallelism (as in vLLM)
                if hasattr(module, "update_param_tp_status"):
                    module.update_param_tp_status()
                pause()
        for _, module in self._modules:
            if is_deferred_attention_layer(module):
                with device_loading_context(module, self._device):
                    module.process_weights_after_loading(self._config.model_config.dtype)
                pause()
        if hasattr(self._model, "process_weights_after_loading"):
            self._model.process_weights_after_loading()

    def _plan(self, before: Mapping[str, dict[str, Any]], touched: Iterable[str] | None) -> None:
        """Everything that `install` will do, checked now: afterwards only the copying itself can go
        wrong.
        """
        loaded = None if touched is None else set(touched)
        seen: set[int] = set()
        for name, module in self._modules:
            live = self._live[name]
            for key, new in module._parameters.items():
                old = live._parameters.get(key)
                if new is None and old is None:
                    continue  # a layer without a bias, for instance
                full = f"{name}.{key}" if name else key
                if new is None or old is None or new.is_meta:
                    raise Unsupported(f"{full} exists only on one side after post-processing")
                if id(old) not in seen:  # tied modules share one tensor: it is copied once
                    seen.add(id(old))
                    self._move(full, old.data, new.data)
            for key, buffer in module._buffers.items():
                full = f"{name}.{key}" if name else key
                old = live._buffers.get(key)
                # A buffer that no checkpoint fills is the running model's own state: hands off.
                if buffer is not None and old is not None and loaded is not None and full in loaded:
                    self._move(full, old.data, buffer.data)
            self._plan_values(name, live, module, before[name])

    def _plan_values(
        self, name: str, live: torch.nn.Module, module: torch.nn.Module, before: dict[str, Any]
    ) -> None:
        for key, value in _attributes(module).items():
            if key in before and before[key] is value:
                continue  # the constructor's or the loaders': the running model has its own
            old = live.__dict__.get(key)
            if isinstance(value, torch.Tensor):
                if (
                    isinstance(old, torch.Tensor)
                    and old.shape == value.shape
                    and old.dtype == value.dtype
                ):
                    self._move(f"{name}.{key}", old, value)  # in place, as a parameter is
                else:
                    self._values.append((live, key, value))
            elif isinstance(value, _PLAIN):
                self._values.append((live, key, value))
            # the running model has one of the same kind, which its own post-processing made: it
            # keeps it
            elif old is None or type(old) is not type(value):
                raise Unsupported(
                    f"post-processing leaves a {type(value).__name__} in {name}.{key}"
                )

    def _move(self, name: str, old: torch.Tensor, new: torch.Tensor) -> None:
        if old.shape != new.shape or old.dtype != new.dtype:
            raise Unsupported(
                f"{name} is {new.dtype} {list(new.shape)} here and {old.dtype} {list(old.shape)} "
                "there"
            )
        self._moves.append((name, old, new))


class _Pristine:
    """A skeleton module as its constructor left it: its tables, its attributes, the attributes of
    its tensors (loaders leave marks there) and those of its quantization method.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._parameters = dict(module._parameters)
        self._buffers = dict(module._buffers)
        self._dict = {key: value for key, value in module.__dict__.items() if key not in _INTERNAL}
        self._loaders = [
            (tensor, dict(tensor.__dict__))
            for tensor in (*self._parameters.values(), *self._buffers.values())
            if tensor is not None
        ]
        method = getattr(module, "quant_method", None)
        self._method = (
            (method, dict(method.__dict__)) if isinstance(method, QuantizeMethodBase) else None
        )

    def restore(self) -> None:
        module = self._module
        for table, pristine in (
            (module._parameters, self._parameters),
            (module._buffers, self._buffers),
        ):
            table.clear()
            table.update(pristine)
        for key in [
            key for key in module.__dict__ if key not in self._dict and key not in _INTERNAL
        ]:
            del module.__dict__[key]
        module.__dict__.update(self._dict)
        for tensor, attributes in self._loaders:
            tensor.__dict__.clear()
            tensor.__dict__.update(attributes)
        if self._method is not None:
            method, attributes = self._method
            method.__dict__.clear()
            method.__dict__.update(attributes)


class _Copies(TorchDispatchMode):  # type: ignore[misc]
    """Counts the elements that ``copy_`` writes, through ``__torch_dispatch__``
    (``torch.utils._python_dispatch``).

    Loaders write with ``copy_``, and ``param[a:b] = x`` dispatches to it as well. Every other write
    stays uncounted: ``fill_`` and ``zero_`` (vLLM fills the padding of a vocabulary so, which is
    why padding is never expected), ``index_copy_``, ``index_put_`` and ``scatter_``, an assignment
    of ``param.data``, a new parameter in a module, and whatever ``load_weights`` writes without
    going through the parameter's ``weight_loader``. What is not counted at boot is not expected of
    a version either, but a buffer that is only written so is not among the touched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.numel += args[0].numel()
        return func(*args, **(kwargs or {}))


def _watch(target: torch.Tensor, name: str, trace: Trace, current: list[str]) -> None:
    """Let the trace know what loaders write into a parameter (restored by `_Pristine`): vLLM's
    models take the function from its ``weight_loader``, else the default one.
    """
    original = getattr(target, "weight_loader", default_weight_loader)

    def watching(*args: Any, **kwargs: Any) -> Any:
        with _Copies() as copies:
            result = original(*args, **kwargs)
        copied = trace.copied.setdefault(current[0], {})
        # Some loaders transform in place after copying: more than everything is everything.
        copied[name] = min(copied.get(name, 0) + copies.numel, target.numel())
        return result

    target.weight_loader = watching


def _quantizes_online(parameter: torch.Tensor) -> bool:
    """Whether its loader belongs to vLLM's online quantization (``--quantization fp8`` over a
    checkpoint of wider numbers). Such a loader buffers a layer's tensors, finishes the layer with
    the last of them, and wraps what it finds once more if it is not named like itself.
    """
    loader = getattr(parameter, "weight_loader", None)
    return getattr(loader, "__name__", "") == "online_process_loader"


def _announce(tensors: Tensors, current: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        current[0] = name
        yield name, tensor


def _on_meta(specs: Mapping[str, Spec]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, spec in specs.items():
        yield (
            name,
            torch.empty(spec.shape, dtype=getattr(torch, TORCH_NAMES[spec.dtype]), device="meta"),
        )


def _between(tensors: Tensors, pause: Callable[[], None]) -> Iterator[tuple[str, torch.Tensor]]:
    for item in tensors:
        yield item
        pause()


def _like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A real tensor for a meta one, with its class and its loader: same shape, strides and dtype,
    on ``device``; its memory is not initialized.
    """
    new = torch.empty_strided(
        tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device
    )
    new.__class__ = tensor.__class__
    new.__dict__ = dict(tensor.__dict__)
    return new


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    # ``training`` is a mode that the running model was put into, no result of loading
    return {
        key: value
        for key, value in module.__dict__.items()
        if key not in _INTERNAL and key != "training"
    }


def _by_name(live: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The running model's modules, by the names that they had before adapters wrapped them."""
    found: dict[str, torch.nn.Module] = {}
    for name, module in live.named_modules(remove_duplicate=False):
        # vLLM's LoRA layers keep the layer that they wrap as ``base_layer``
        plain = ".".join(part for part in name.split(".") if part != "base_layer")
        # the wrapped layer has the weights: it wins over its wrapper
        if plain not in found or "base_layer" in name:
            found[plain] = module
    return found


def _skeleton(vllm_config: Any) -> torch.nn.Module:
    """The model without memory, with registries of its own: layers register themselves by name, and
    those names are taken.
    """
    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.static_forward_context = {}
    if hasattr(config.compilation_config, "static_all_moe_layers"):  # not in every vLLM
        config.compilation_config.static_all_moe_layers = []
    with set_default_torch_dtype(vllm_config.model_config.dtype), torch.device("meta"):
        model: torch.nn.Module = initialize_model(config, model_config=vllm_config.model_config)
    return model
