"""What the checks of the second model share: a layer's post-processing that a test chooses, and
comparisons.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from hotweights.adapters.vllm.rank.fit.dry_load import Spec
from hotweights.adapters.vllm.rank.shadow import skeleton

Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")


class Method(QuantizeMethodBase):  # type: ignore[misc]
    """``finish`` is the test's post-processing of a layer."""

    finish: Callable[[Any], None] = staticmethod(lambda layer: None)

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None: ...

    def apply(self, layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:
        type(self).finish(layer)


def configuration(
    monkeypatch: pytest.MonkeyPatch,
    kind: Callable[[], nn.Module],
    finish: Callable[[Any], None] = lambda layer: None,
) -> VllmConfig:
    """Of an engine whose models are of that kind, and finished so."""
    monkeypatch.setattr(skeleton, "initialize_model", lambda config, model_config: kind())
    monkeypatch.setattr(Method, "finish", staticmethod(finish))
    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.float32)
    return config


def specs(tensors: Tensors) -> dict[str, Spec]:
    names = {torch.float32: "F32", torch.int64: "I64"}
    return {name: Spec(names[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


def served(model: nn.Module) -> Tensors:
    return {
        name: tensor.detach().clone()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


def different(one: Tensors, other: Tensors) -> list[str]:
    """The names of the first whose values the other has not."""
    return [name for name in one if not torch.equal(one[name], other[name])]
