"""The second model beside the running one, got ready in parts: which layers a part is, and that it
leaves what a load of the whole version leaves, by each way of waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from e2e.engine.inside.shadows import (
    CPU,
    Method,
    Tensors,
    configuration,
    different,
    served,
    specs,
)
from hotweights.adapters.vllm.rank import ways
from hotweights.adapters.vllm.rank.fit import delta
from hotweights.adapters.vllm.rank.fit.dry_load import Trace
from hotweights.adapters.vllm.rank.room import NoRoom, Room
from hotweights.adapters.vllm.rank.shadow.model import Shadow


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
        config = configuration(monkeypatch, Layered, pack)
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
    assert different(served(live), served(cold)) == []
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
    assert different(served(live), served(Layered.of(0))) == []


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
    assert different(served(live), served(Layered.of(0))) == [], (
        "nothing is touched before the pause"
    )
    assert all(tensor.is_meta for tensor in shadow._model.parameters()), "and nothing is held"
    nbytes = ready.install()
    whole.load(version.items(), trace.by_parameter(), lambda: None)
    assert nbytes == whole.install()
    assert different(served(live), served(cold)) == []
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
    assert different(served(live), served(Layered.of(0))) == []


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
    shadow = Shadow(kind.of(0), configuration(monkeypatch, kind), CPU)
    trace = shadow.trace(specs(layered(0)))
    assert trace.opaque or trace.read
    names, groups = layered(0).keys(), shadow.groups()
    assert delta.between(frozenset({"1.bias"}), names, trace, groups, frozenset()) is None
    assert delta.parts(names, trace, groups, frozenset(), None) == ()
