"""The second model beside the running one, on a model that has everything odd: what a cold load
would leave in each tensor is what an install leaves there, and nothing else is touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.models.utils import AutoWeightsLoader

from hotweights.adapters.vllm.rank import ways
from hotweights.adapters.vllm.rank.fit import delta
from hotweights.adapters.vllm.rank.fit.dry_load import Spec, Trace
from hotweights.adapters.vllm.rank.room import NoRoom, Room
from hotweights.adapters.vllm.rank.shadow import anatomy, skeleton
from hotweights.adapters.vllm.rank.shadow.changes import Unsupported
from hotweights.adapters.vllm.rank.shadow.materials import Incomplete
from hotweights.adapters.vllm.rank.shadow.model import Shadow

Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")
PADDED = 6


class Kernel:
    """What a layer's post-processing leaves: an object over tensors."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.parts = {"scale": [tensor]}


class Method(QuantizeMethodBase):  # type: ignore[misc]
    """``finish`` is the test's post-processing of a layer."""

    finish: Callable[[Any], None] = staticmethod(lambda layer: None)

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None: ...

    def apply(self, layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:
        type(self).finish(layer)


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

    def made(kind: type[Odd] = Odd, finish: Callable[[Any], None] | None = None) -> Any:
        monkeypatch.setattr(skeleton, "initialize_model", lambda config, model_config: kind())
        monkeypatch.setattr(Method, "finish", staticmethod(finish or (lambda layer: None)))
        config = VllmConfig()
        config.model_config = SimpleNamespace(dtype=torch.float32)
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


def specs(tensors: Tensors) -> dict[str, Spec]:
    names = {torch.float32: "F32", torch.int64: "I64"}
    return {name: Spec(names[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


def load(shadow: Shadow, tensors: Tensors, **values: Any) -> Mapping[str, int]:
    shadow.clear()
    filled: Mapping[str, int] = shadow.trace(specs(tensors)).by_parameter()
    shadow.load(tensors.items(), filled, lambda: None, **values)
    return filled


def served(model: Odd) -> Tensors:
    return {
        name: tensor.detach().clone()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


def same(one: Tensors, other: Tensors) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_an_install_leaves_what_a_cold_load_leaves(make: Callable[..., Any]) -> None:
    live, shadow = make()
    cold, _ = make()
    cold.load_weights(checkpoint(1).items())
    cold.padded.data[4:] = 0  # padding that nobody writes
    load(shadow, checkpoint(1))
    shadow.install()
    assert same(served(live), served(cold)) == []
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
    assert "layer_scalar" in same(served(live), before)
    shadow.load(checkpoint(0).items(), None, lambda: None)
    shadow.install()
    assert [name for name in same(served(live), before) if name != "padded"] == []


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


class Layer(nn.Module):  # type: ignore[misc]
    """Fused of two tensors, and packed when it is finished."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.empty(2, 3))
        self.bias = nn.Parameter(torch.empty(3))
        self.quant_method = Method()


class Layered(nn.Module):  # type: ignore[misc]
    """Layers in a list, and a head tied to the embeddings. Its loader waits for a layer's second
    half before it writes both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4, bias=False)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight

    @classmethod
    def of(cls, seed: int) -> Layered:
        model = cls()
        model.load_weights(layered(seed).items())
        return model

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        halves: Tensors = {}
        for name, tensor in weights:
            number, _, kind = name.partition(".")
            if kind == "first":
                halves[number] = tensor * 2
            elif kind == "second":
                layer = self.layers[int(number)]
                layer.fused.data.copy_(torch.stack([halves[number], tensor]))
            elif kind == "bias":
                self.layers[int(number)].bias.data.copy_(tensor)
            elif name == "embed":
                self.embed.weight.data.copy_(tensor)


def layered(seed: int, *of_seed_1: str) -> Tensors:
    tensors = {}
    for name in ("embed", *(f"{n}.{k}" for n in range(3) for k in ("first", "second", "bias"))):
        shape = (4, 3) if name == "embed" else (3,)
        generator = torch.Generator().manual_seed(1 if name in of_seed_1 else seed)
        tensors[name] = torch.randn(shape, generator=generator)
    return tensors | {"ignored": torch.zeros(1)}


@pytest.fixture
def make_layered(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Layered, Shadow]]:
    def pack(layer: Any) -> None:
        layer.total = float(layer.fused.detach().sum())

    def made() -> tuple[Layered, Shadow]:
        monkeypatch.setattr(skeleton, "initialize_model", lambda config, model_config: Layered())
        monkeypatch.setattr(Method, "finish", staticmethod(pack))
        config = VllmConfig()
        config.model_config = SimpleNamespace(dtype=torch.float32)
        live = Layered()
        live.load_weights(layered(0).items())
        for layer in live.layers:
            pack(layer)
        return live, Shadow(live, config, CPU)

    return made


def test_the_parts_of_a_model_are_its_layers_and_what_shares_memory(
    make_layered: Callable[[], tuple[Layered, Shadow]],
) -> None:
    _, shadow = make_layered()
    groups = shadow.groups()
    assert {name: group for name, group in groups.items() if name.startswith("layers")} == {
        f"layers.{n}.{key}": f"layers.{n}" for n in range(3) for key in ("fused", "bias")
    }
    assert groups["embed.weight"] == groups["head.weight"]
    assert shadow.nbytes({"layers.1"}) == 9 * 4
    assert shadow.nbytes() == (3 * 9 + 12) * 4


def test_what_is_written_is_traced_to_all_that_it_is_made_of(
    make_layered: Callable[[], tuple[Layered, Shadow]],
) -> None:
    _, shadow = make_layered()
    sources = shadow.trace(specs(layered(0))).sources
    assert sources["layers.1.fused"] == {"1.first", "1.second"}
    assert sources["layers.1.bias"] == {"1.bias"}
    assert sources["embed.weight"] == {"embed"}


def load_part(
    shadow: Shadow, version: Tensors, trace: Trace, part: delta.Delta, pause: Callable[[], None]
) -> None:
    """From nothing but the tensors that it needs."""
    tensors = [(name, version[name]) for name in version if name in part.tensors]
    shadow.load(tensors, trace.by_parameter(), pause, groups=part.groups)


@pytest.mark.parametrize("changed", ["1.first", "1.bias", "embed", "ignored"])
def test_a_part_of_a_version_leaves_what_all_of_it_leaves(
    make_layered: Callable[[], tuple[Layered, Shadow]], changed: str
) -> None:
    live, shadow = make_layered()
    cold, whole = make_layered()
    version = layered(0, changed)
    trace = shadow.trace(specs(version))
    unseen = shadow.fillable() - trace.sources.keys()
    part = delta.between(frozenset({changed}), version.keys(), trace, shadow.groups(), unseen)
    assert part is not None
    load_part(shadow, version, trace, part, lambda: None)
    moved = {name for name, _, _ in shadow.moves}
    of = {"1.first": {"layers.1.fused"}, "1.bias": {"layers.1.bias"}, "embed": {"embed.weight"}}
    assert moved == of.get(changed, set())
    shadow.install()
    whole.load(version.items(), trace.by_parameter(), lambda: None)
    whole.install()
    assert same(served(live), served(cold)) == []
    assert [layer.total for layer in live.layers] == [layer.total for layer in cold.layers]


def test_what_the_model_has_already_is_not_copied(
    make_layered: Callable[[], tuple[Layered, Shadow]],
) -> None:
    live, shadow = make_layered()
    live.embed.weight.data[0, 0] = -0.0
    version = layered(0)
    version["embed"] = live.embed.weight.detach().clone()
    version["embed"][0, 0] = 0.0
    assert shadow.load(version.items(), None, lambda: None) == version["embed"].nbytes


def plenty() -> Room:
    return Room(1 << 40, None, "here", "more")


def test_a_pause_without_room_is_refused_before_it_begins(
    make_layered: Callable[[], tuple[Layered, Shadow]],
) -> None:
    live, shadow = make_layered()
    version = layered(2)
    trace = shadow.trace(specs(version))
    parts = delta.parts(version.keys(), trace, shadow.groups(), frozenset(), None)
    load = partial(load_part, shadow, version, trace)
    free = [1 << 40]
    ready = ways.InPause(
        shadow, parts, load, 60.0, lambda: None, lambda: 0.0, lambda: Room(free[0], None, "", "")
    )
    ready.check()
    free[0] = 1 << 20
    with pytest.raises(NoRoom, match=r"loading in the pause needs 0\.25 GiB"):
        ready.check()
    assert same(served(live), served(Layered.of(0))) == []


@pytest.mark.parametrize("way", ["Host", "InPause"])
@pytest.mark.parametrize("changed", [None, "1.first"])
def test_part_by_part_it_becomes_what_it_becomes_at_once(
    make_layered: Callable[[], tuple[Layered, Shadow]], way: str, changed: str | None
) -> None:
    live, shadow = make_layered()
    cold, whole = make_layered()
    version = layered(2) if changed is None else layered(0, changed)
    trace = shadow.trace(specs(version))
    unexplained = shadow.fillable() - trace.sources.keys()
    within = None
    if changed is not None:
        within = delta.between(
            frozenset({changed}), version.keys(), trace, shadow.groups(), unexplained
        )
    parts = delta.parts(version.keys(), trace, shadow.groups(), unexplained, within)
    assert len(parts) == (4 if changed is None else 1)

    load = partial(load_part, shadow, version, trace)
    ready: ways.Way
    if way == "Host":
        ready = ways.Host(shadow, parts, lambda part: load(part, lambda: None))
    else:
        ready = ways.InPause(shadow, parts, load, 60.0, lambda: None, lambda: 0.0, plenty)
    assert same(served(live), served(Layered.of(0))) == [], "nothing is touched before the pause"
    assert all(tensor.is_meta for tensor in shadow._model.parameters()), "and nothing is held"
    nbytes = ready.install()
    whole.load(version.items(), trace.by_parameter(), lambda: None)
    assert nbytes == whole.install()
    assert same(served(live), served(cold)) == []
    assert [layer.total for layer in live.layers] == [layer.total for layer in cold.layers]


def test_a_pause_that_would_be_too_long_is_refused_before_it(
    make_layered: Callable[[], tuple[Layered, Shadow]],
) -> None:
    live, shadow = make_layered()
    version = layered(1)
    trace = shadow.trace(specs(version))
    parts = delta.parts(version.keys(), trace, shadow.groups(), frozenset(), None)

    def load(part: delta.Delta, pause: Callable[[], None]) -> None:
        time.sleep(0.02)
        load_part(shadow, version, trace, part, pause)

    with pytest.raises(NoRoom, match=r"may take 0\.05 s \(activation\.maxPauseSeconds\)"):
        ways.InPause(shadow, parts, load, 0.05, lambda: None, lambda: 0.0, plenty)
    assert same(served(live), served(Layered.of(0))) == []


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


class Replaces(Layered):
    """Puts a parameter of its own in the place of the model's."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        tensors = dict(weights)
        super().load_weights(tensors.items())
        self.layers[1].bias = nn.Parameter(tensors["1.bias"])


class ByValue(Layered):
    """Reads a number before it knows what to do."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        tensors = dict(weights)
        if tensors["ignored"].item() >= 0:
            super().load_weights(tensors.items())


@pytest.mark.parametrize("kind", [Replaces, ByValue])
def test_what_was_not_seen_makes_no_part(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    monkeypatch.setattr(skeleton, "initialize_model", lambda config, model_config: kind())
    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.float32)
    shadow = Shadow(kind.of(0), config, CPU)
    trace = shadow.trace(specs(layered(0)))
    assert trace.opaque or trace.read
    names, groups = layered(0).keys(), shadow.groups()
    assert delta.between(frozenset({"1.bias"}), names, trace, groups, frozenset()) is None
    assert delta.parts(names, trace, groups, frozenset(), None) == ()
