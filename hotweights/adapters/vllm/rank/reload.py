"""The plain way: vLLM's own layer-by-layer reload inside the pause, with the repairs that it is
known to need.

It is for models that cannot be finished beside the running one (`shadow.Unsupported`), and for
weights that only vLLM's own loader can read. After a failure it does not recover by itself: layers
that still wait for weights are skipped by the next start, and half-buffered weights count. So
`purge` comes first, always. Afterwards two kinds of layers still hold what was packed from the old
weights: a tied ``lm_head`` (only its first owner is processed again) and experts (prepacking is
skipped while a kernel is set).

What is relied on is private to vLLM 0.32: ``model_loader/reload/layerwise.py``
(``get_layerwise_info``, ``LOADING_LAYERS``, ``_place_kernel_tensors``) and ``LayerReloadingInfo``
in ``types.py`` beside it. Everything here runs on the worker's main thread, inside the pause.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    layerwise,
)
from vllm.utils.torch_utils import set_default_torch_dtype

from hotweights.adapters.vllm.rank.shadow.model import Tensors


class ReloadError(Exception):
    """The plain way is not possible with this vLLM or this loader."""


@torch.no_grad()  # type: ignore[untyped-decorator]
def purge(model: torch.nn.Module) -> int:
    """Undo what a failed reload left: put the finished tensors back and forget buffered ones. Gives
    the layers that needed it.
    """
    count = 0
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if not info.can_load():
            continue  # a reload has not begun on this layer, or has ended
        count += 1
        # before the reset, which forgets them
        if info.kernel_tensors is not None:
            layerwise._place_kernel_tensors(layer, info)
        info.reset()
    layerwise.LOADING_LAYERS.clear()
    return count


@torch.no_grad()  # type: ignore[untyped-decorator]
def reload(model: torch.nn.Module, vllm_config: Any, tensors: Tensors) -> None:
    """Load every tensor into the running model, which must be paused; on an exception it is
    dirty. Raises whatever the model's loaders raise.
    """
    purge(model)
    # the model is paused: what is global to the process may be set
    dtype = vllm_config.model_config.dtype
    with set_current_vllm_config(vllm_config), set_default_torch_dtype(dtype):
        _forget_kernels(model)  # before the layers are finished again
        initialize_layerwise_reload(model)
        model.load_weights(iter(tensors))
        finalize_layerwise_reload(model, vllm_config.model_config)
        _repack_tied(model)  # once the first owner's weight is there


def boot_tensors(model: torch.nn.Module, vllm_config: Any) -> Tensors:
    """What the engine booted from, read again by vLLM's own loader (``get_all_weights`` of its
    ``DefaultModelLoader``). Raises `ReloadError` where that loader has none.
    """
    loader = get_model_loader(vllm_config.load_config)
    if not hasattr(loader, "get_all_weights"):
        raise ReloadError(
            f"load format {vllm_config.load_config.load_format} cannot read its weights again"
        )
    tensors: Tensors = loader.get_all_weights(vllm_config.model_config, model)
    return tensors


def _forget_kernels(model: torch.nn.Module) -> None:
    """Experts are packed again only while they have no kernel (vLLM's fused experts on CPUs)."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if (
            next(model.parameters()).device.type == "cpu"
            and getattr(method, "moe_kernel", None) is not None
        ):
            method.moe_kernel = None


def _repack_tied(model: torch.nn.Module) -> None:
    """Pack the weight again in every module that shares it with an earlier one."""
    owners: set[int] = set()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        method = getattr(module, "quant_method", None)
        shared = id(weight) in owners and isinstance(module, VocabParallelEmbedding)
        if shared and isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(module)
        owners.add(id(weight))
