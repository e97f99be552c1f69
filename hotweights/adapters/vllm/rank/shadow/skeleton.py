"""The model without memory: what its constructor makes, on torch's ``meta`` device.

A meta tensor has a shape and no data, so two things are lost that a cold load has. What a
constructor writes into a tensor (a scale of 1.0, a sentinel of -1.0) is kept here where it is one
number: `Constants` watches the constructor. And what a load leaves behind is put back by
`pristine.Pristine`, so that one skeleton serves every version.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

# torch.nn.Module's own tables: parameters and buffers are carried over one by one, and the modules
# of the running model stay
INTERNAL = ("_parameters", "_buffers", "_modules")
_aten = torch.ops.aten
# how a constructor fills a fresh tensor, and where its number stands among the arguments
_FILLED = {_aten.zeros.default: 0, _aten.ones.default: 1}
_FULL = (_aten.full.default, _aten.fill_.Scalar)


def build(vllm_config: Any) -> tuple[torch.nn.Module, Constants]:
    """The skeleton, with registries of its own (layers register themselves by name, and those names
    are taken), and what its constructor wrote. Raises what the model's constructor raises.
    """
    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.static_forward_context = {}
    config.compilation_config.static_all_moe_layers = []
    constants = Constants()
    with (
        set_default_torch_dtype(vllm_config.model_config.dtype),
        torch.device("meta"),
        constants.watching(),
    ):
        model: torch.nn.Module = initialize_model(config, model_config=vllm_config.model_config)
    return model, constants


class Constants:
    """What a constructor wrote into tensors on the meta device, where it was one number for the
    whole of a tensor. By storage: parameters are made of tensors that are gone by then.
    """

    def __init__(self) -> None:
        self._values: dict[int, float | torch.Tensor] = {}

    def knows(self, meta: torch.Tensor) -> bool:
        """Whether the constructor wrote it."""
        return storage_of(meta) in self._values

    def fill(self, meta: torch.Tensor, real: torch.Tensor) -> bool:
        """Write into ``real`` what ``meta`` was made with; False: that is not known."""
        value = self._values.get(storage_of(meta))
        if value is None:
            return False
        if isinstance(value, torch.Tensor):
            real.copy_(value)
        else:
            real.fill_(value)
        return True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Of the thread that makes the model."""
        with _Fills(self._values), _Literals(self._values):
            yield


class _Fills(TorchDispatchMode):  # type: ignore[misc]
    """Every operation of the constructor: it fills a tensor, or what is known of it is out of
    date.
    """

    def __init__(self, values: dict[int, float | torch.Tensor]) -> None:
        super().__init__()
        self._values = values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        into = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        given = {storage_of(leaf) for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        for tensor in into:
            storage = storage_of(tensor)
            if func in _FILLED:
                self._values[storage] = _FILLED[func]
            elif func is _aten.zero_.default and is_whole(tensor):
                self._values[storage] = 0
            elif func in _FULL and is_whole(tensor):
                self._values[storage] = args[1]
            elif storage not in given or func._schema.is_mutable:
                # a fresh tensor, perhaps in the place of one that is gone; or one that was changed
                self._values.pop(storage, None)
        return result


class _Literals(TorchFunctionMode):  # type: ignore[misc]
    """``torch.tensor(-1.0)`` is no operation that a dispatch mode sees."""

    def __init__(self, values: dict[int, float | torch.Tensor]) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.tensor and result.is_meta:
            self._values[storage_of(result)] = torch.tensor(
                args[0], dtype=result.dtype, device="cpu"
            )
        return result


def blocks(model: torch.nn.Module) -> dict[str, str]:
    """Of each module, by full name, the outermost item of a list that it is in, a decoder layer for
    instance; itself where it is in none.
    """
    inside: dict[str, str] = {}
    lists: set[str] = set()
    for name, module in model.named_modules():  # parents come first
        parent = name.rpartition(".")[0]
        if parent in inside:
            inside[name] = inside[parent]
        elif parent in lists:
            inside[name] = name
        if isinstance(module, torch.nn.ModuleList):
            lists.add(name)
    return {name: inside.get(name, name) for name, _ in model.named_modules()}


def quantizes_online(parameter: torch.Tensor) -> bool:
    """Whether its loader belongs to vLLM's online quantization (``--quantization fp8`` over a
    checkpoint of wider numbers). Such a loader buffers a layer's tensors, finishes the layer with
    the last of them, and so does what `shadow` does after loading.
    """
    loader = getattr(parameter, "weight_loader", None)
    return str(getattr(loader, "__name__", "")) == "online_process_loader"


def storage_of(tensor: torch.Tensor) -> int:
    """Names the memory behind a tensor; its views, ``data`` and detached copies share it."""
    return int(tensor.untyped_storage()._cdata)


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether it is all of its storage."""
    return int(tensor.nbytes) == int(tensor.untyped_storage().nbytes())


def like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A real tensor for a meta one, with its class and its loader: same shape, strides and dtype,
    on ``device``; its memory is not initialized.
    """
    new = torch.empty_strided(
        tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device
    )
    new.__class__ = tensor.__class__
    new.__dict__ = dict(tensor.__dict__)
    return new


def by_name(live: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The running model's modules, by the names that they had before adapters wrapped them."""
    found: dict[str, torch.nn.Module] = {}
    for name, module in live.named_modules(remove_duplicate=False):
        # vLLM's LoRA layers keep the layer that they wrap as ``base_layer``
        plain = ".".join(part for part in name.split(".") if part != "base_layer")
        # the wrapped layer has the weights: it wins over its wrapper
        if plain not in found or "base_layer" in name:
            found[plain] = module
    return found
