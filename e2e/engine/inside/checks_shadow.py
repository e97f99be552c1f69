"""The second model beside the running one, on a model that has everything odd: what a cold load
would leave in each tensor is what an install leaves there, and nothing else is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.models.utils import AutoWeightsLoader

from e2e.engine.inside.shadows import (
    CPU,
    Method,
    Tensors,
    configuration,
    different,
    served,
    specs,
)
from hotweights.adapters.vllm.rank.shadow import anatomy
from hotweights.adapters.vllm.rank.shadow.changes import Unsupported
from hotweights.adapters.vllm.rank.shadow.materials import Incomplete
from hotweights.adapters.vllm.rank.shadow.model import Shadow

PADDED = 6


class Kernel:
    """What a layer's post-processing leaves: an object over tensors."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.parts = {"scale": [tensor]}


class Odd(nn.Module):  # type: ignore[misc]
    """Parameters, buffers of every kind, and what only the constructor writes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))
        self.padded = nn.Parameter(torch.empty(PADDED))
        self.padded.weight_loader = self.load_padded
        self.sentinel = nn.Parameter(torch.tensor(-1.0))
        self.scale = nn.Parameter(torch.full((2,), 3.0))
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("layer_scalar", torch.ones(1))
        self.register_buffer("state", torch.zeros(4), persistent=False)
        self.quant_method = Method()

    @staticmethod
    def load_padded(parameter: torch.Tensor, loaded: torch.Tensor) -> None:
        parameter.data[: loaded.shape[0]].copy_(loaded)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        return AutoWeightsLoader(self).load_weights(weights)


class Packed(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.empty(PADDED, dtype=torch.int64), requires_grad=False)
        self.codes.weight_loader = self.load_padded


class ReadsValues(Odd):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        for name, tensor in weights:
            if tensor.is_meta and tensor.flatten()[0].item() != 7:
                raise ValueError(f"{name} has no such value")


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Odd, Shadow]]:
    """A running model of a kind, and its shadow."""

    def made(kind: type[Odd] = Odd, finish: Callable[[Any], None] = lambda layer: None) -> Any:
        config = configuration(monkeypatch, kind, finish)
        live = kind()
        live.load_weights(checkpoint(0).items())
        live.quant_method.process_weights_after_loading(live)
        live.state.fill_(5)
        return live, Shadow(live, config, CPU)

    return made


def checkpoint(seed: int, **without: None) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "weight": (4, 4), "padded": (4,), "norm.weight": (4,), "norm.bias": (4,),
        "norm.running_mean": (4,), "norm.running_var": (4,), "layer_scalar": (1,),
    }  # fmt: skip
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["norm.num_batches_tracked"] = torch.tensor(seed + 10)
    return {name: tensor for name, tensor in tensors.items() if name not in without}


def load(shadow: Shadow, tensors: Tensors, **values: Any) -> Mapping[str, int]:
    shadow.clear()
    filled: Mapping[str, int] = shadow.trace(specs(tensors)).by_parameter()
    shadow.load(tensors.items(), filled, lambda: None, **values)
    return filled


def test_an_install_leaves_what_a_cold_load_leaves(make: Callable[..., Any]) -> None:
    live, shadow = make()
    cold, _ = make()
    cold.load_weights(checkpoint(1).items())
    cold.padded.data[4:] = 0  # padding that nobody writes
    load(shadow, checkpoint(1))
    shadow.install()
    assert different(served(live), served(cold)) == []
    assert live.norm.running_mean.equal(checkpoint(1)["norm.running_mean"])
    assert live.norm.num_batches_tracked == 11
    assert live.state.equal(torch.full((4,), 5.0))


def test_what_only_the_constructor_writes_is_what_it_wrote(make: Callable[..., Any]) -> None:
    live, shadow = make()
    live.sentinel.data.fill_(99)
    live.scale.data.fill_(99)
    load(shadow, checkpoint(1))
    shadow.install()
    assert live.sentinel == -1.0
    assert live.scale.tolist() == [3.0, 3.0]


def test_buffers_come_back_where_nobody_knows_what_a_version_fills(
    make: Callable[..., Any],
) -> None:
    """As in a repair of a version whose loaders could not be asked."""
    live, shadow = make()
    before = served(live)
    load(shadow, checkpoint(1))
    shadow.install()
    assert "layer_scalar" in different(served(live), before)
    shadow.load(checkpoint(0).items(), None, lambda: None)
    shadow.install()
    assert [name for name in different(served(live), before) if name != "padded"] == []


def test_what_nothing_fills_is_zero_where_that_is_padding_and_refused_where_nobody_knows(
    make: Callable[..., Any],
) -> None:
    live, shadow = make()
    load(shadow, checkpoint(1))
    shadow.install()
    assert live.padded[4:].tolist() == [0.0] * (PADDED - 4)
    with pytest.raises(Incomplete, match="2 of 6 elements of padded are in no tensor"):
        load(shadow, checkpoint(1), proven=False)
    without = checkpoint(1, weight=None)
    with pytest.raises(Incomplete, match="16 of 16 elements of weight"):
        load(shadow, without, proven=False)
    assert not shadow.ready


def test_integers_know_no_nan_so_their_count_decides(make: Callable[..., Any]) -> None:
    live, shadow = make(Packed)
    some = checkpoint(1) | {"codes": torch.arange(4), "padded": torch.ones(PADDED)}
    with pytest.raises(Incomplete, match="2 of 6 elements of codes are in no tensor"):
        load(shadow, some, proven=False)
    assert not shadow.ready
    load(shadow, some)
    shadow.install()
    assert live.codes.tolist() == [0, 1, 2, 3, 0, 0]
    load(shadow, some | {"codes": torch.arange(PADDED)}, proven=False)
    shadow.install()
    assert live.codes.tolist() == list(range(PADDED))


def test_a_trace_counts_what_is_written_by_any_way(make: Callable[..., Any]) -> None:
    _, shadow = make()
    trace = shadow.trace(specs(checkpoint(0)))
    assert (trace.failed, trace.unable) == (None, False)
    assert trace.by_parameter() == {
        "weight": 16, "padded": 4, "norm.weight": 4, "norm.bias": 4, "norm.running_mean": 4,
        "norm.running_var": 4, "norm.num_batches_tracked": 1, "layer_scalar": 1,
    }  # fmt: skip


def test_a_loader_that_judges_values_cannot_be_asked(make: Callable[..., Any]) -> None:
    _, shadow = make(ReadsValues)
    trace = shadow.trace(specs(checkpoint(0)))
    assert trace.unable
    assert trace.failed is None


@pytest.mark.parametrize("own", [True, False])
def test_an_object_may_stay_if_its_tensors_are_the_model_s(
    make: Callable[..., Any], own: bool
) -> None:
    def finish(layer: Any) -> None:
        layer.kernel = Kernel(layer.weight.data.clone() if own else layer.weight.data)

    live, shadow = make(finish=finish)
    if own:
        with pytest.raises(Unsupported, match="leaves a Kernel in kernel"):
            load(shadow, checkpoint(1))
    else:
        load(shadow, checkpoint(1))
        shadow.install()
        assert live.kernel.parts["scale"][0].equal(checkpoint(1)["weight"])


@pytest.mark.parametrize("captured", [True, False])
def test_what_captured_graphs_may_hold_is_not_exchanged(
    make: Callable[..., Any], captured: bool
) -> None:
    def finish(layer: Any) -> None:
        layer.factor = float(layer.weight.detach().sum())

    live, shadow = make(finish=finish)
    shadow._captured = captured
    if captured:
        with pytest.raises(Unsupported, match="captured graphs may hold factor"):
            load(shadow, checkpoint(1))
    load(shadow, checkpoint(0))  # the same number: nothing changes
    if not captured:
        load(shadow, checkpoint(1))
        shadow.install()
        assert live.factor == float(checkpoint(1)["weight"].sum())


class Vocabulary(nn.Embedding):  # type: ignore[misc]
    """As vLLM's ``VocabParallelEmbedding``, which needs a process group."""


class Head(Vocabulary):
    """As its ``ParallelLMHead``."""


class Speaking(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.embed = Vocabulary(4, 2)
        self.head = Head(4, 2)


def test_embeddings_are_known_by_their_kind_and_as_tied_by_their_memory(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anatomy, "VocabParallelEmbedding", Vocabulary)
    monkeypatch.setattr(anatomy, "ParallelLMHead", Head)
    live, shadow = make(Speaking)
    assert shadow.embeddings() == {"embed.weight"}
    assert shadow.tied() == frozenset()
    live.head.weight = live.embed.weight  # after loading: the skeleton has them apart
    assert shadow.tied() == {"embed.weight"}


class Scheme:
    """An object of the constructor, as vLLM's quantized linear layers have one."""


@pytest.mark.parametrize("new", [True, False])
def test_weights_packed_into_an_object_that_was_there_are_not_lost_in_silence(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, new: bool
) -> None:
    """As int8 on CPUs: the kernel of the layer's scheme keeps the packed weights."""

    def finish(layer: Any) -> None:
        layer.scheme.kernel = {"packed": layer.weight.data.clone() if new else layer.weight.data}

    built = Odd.__init__

    def with_scheme(self: Odd) -> None:
        built(self)
        self.scheme = Scheme()

    monkeypatch.setattr(Odd, "__init__", with_scheme)
    _, shadow = make(finish=finish)
    if new:
        with pytest.raises(Unsupported, match="leaves tensors inside of scheme"):
            load(shadow, checkpoint(1))
    else:
        load(shadow, checkpoint(1))


class LeavesMore(Odd):
    """What its loader leaves beside parameters."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        tensors = dict(weights)
        weight = tensors["weight"]
        self.first = 0.0 if weight.is_meta else float(weight[0, 0])
        return super().load_weights(tensors.items())


def test_what_a_loader_leaves_beside_parameters_is_carried_over(make: Callable[..., Any]) -> None:
    live, shadow = make(LeavesMore)
    load(shadow, checkpoint(1))
    shadow.install()
    assert live.first == float(checkpoint(1)["weight"][0, 0])
