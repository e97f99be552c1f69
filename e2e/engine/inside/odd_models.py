"""A small model whose layers are packed when they are finished, and an engine's configuration that
has it, for checks that need no checkpoint of a real one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from e2e.engine import images
from hotweights.adapters.vllm.rank.shadow import skeleton

CPU = torch.device("cpu")
Weights = Iterable[tuple[str, torch.Tensor]]


class Method(QuantizeMethodBase):  # type: ignore[misc]
    """Packs a layer into an object that the layer has had all along."""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None: ...

    def apply(self, layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.scheme.packed = layer.weight.data
        layer.scheme.seen["layer"].append("finished")


class Layer(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))
        self.quant_method = Method()
        self.scheme = SimpleNamespace(packed=None, seen={"layer": []})


class Plain(nn.Module):  # type: ignore[misc]
    """Two layers; a tensor called ``ignored`` is loaded into none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.taken: list[str] = []

    def load_weights(self, weights: Weights) -> None:
        for name, tensor in weights:
            self.taken.append(name)
            if name != "ignored":
                self.layers[int(name)].weight.data.copy_(self.read(tensor))

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def engine(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    kind: type[Plain],
    tensors: dict[str, torch.Tensor],
) -> tuple[Any, Any]:
    """A running model of a kind, booted from ``tensors``, and its vLLM's configuration."""
    save_file(tensors, folder / "model.safetensors")
    monkeypatch.setattr(skeleton, "initialize_model", lambda config, model_config: kind())
    config = VllmConfig()
    config.model_config = SimpleNamespace(
        dtype=torch.float32,
        model=str(folder),
        tokenizer=str(folder),
        revision=None,
        hf_text_config=SimpleNamespace(tie_word_embeddings=False),
    )
    config.load_config = SimpleNamespace(load_format="auto")
    live = kind()
    live.load_weights((name, tensor.clone()) for name, tensor in tensors.items())
    for layer in live.layers:
        layer.quant_method.process_weights_after_loading(layer)
    return live, config


def of(*values: float) -> dict[str, torch.Tensor]:
    """A version: one value for each layer."""
    tensors = {str(number): torch.full((3,), value) for number, value in enumerate(values)}
    return tensors | {"ignored": torch.zeros(3)}


def image_of(tensors: dict[str, torch.Tensor]) -> images.Image:
    """As an agent hands it over: what has equal bytes lies in one place."""
    built = images.build(
        [images.Tensor(n, "F32", list(t.shape), t.numpy().tobytes()) for n, t in tensors.items()]
    )
    places: dict[str, Any] = {}
    for entry in built.table["tensors"]:
        entry["extents"] = places.setdefault(entry["content"], entry["extents"])
    os.close(built.fds[0])
    built.fds[0] = images.sealed(json.dumps(built.table).encode())
    return built
