"""Loaders that do more than to copy: what one leaves behind is undone, what one writes into is its
own, and what one does only among all tensors is not done with some.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from e2e.engine.inside import odd_models
from e2e.engine.inside.odd_models import CPU, Plain, Weights, of
from hotweights.adapters.vllm.rank import page_locked
from hotweights.adapters.vllm.rank.fit.compatibility import Compatibility
from hotweights.adapters.vllm.rank.fit.delta import Delta
from hotweights.adapters.vllm.rank.image import Image
from hotweights.adapters.vllm.rank.shadow.default_dtype import default_dtype
from hotweights.adapters.vllm.rank.shadow.model import Shadow

Make = Callable[..., tuple[Any, Shadow, Compatibility]]


class Doubles(Plain):
    """Writes into the tensors that it is given."""

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mul_(2)


class DoublesByValue(Plain):
    """So does this one, after it has looked into them, which nobody can follow."""

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mul_(2) if tensor.sum().item() > 0 else tensor


class AsksWhatIsThere(Plain):
    def load_weights(self, weights: Weights) -> None:
        tensors = dict(weights)
        factor = 1 if "ignored" in tensors else 3
        super().load_weights((name, tensor * factor) for name, tensor in tensors.items())


class ChoosesTheDevice(Plain):
    """Its bias is made on a device that the constructor names."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((3,), 7.0, device="cpu"))

    def load_weights(self, weights: Weights) -> None:
        tensors = dict(weights)
        bias = tensors.pop("bias", None)
        if bias is not None:
            self.bias.data[:2].copy_(bias)
        super().load_weights(tensors.items())


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """A running model of a kind, its shadow, and what asks its loaders."""

    def made(kind: type[Plain], tensors: dict[str, torch.Tensor]) -> Any:
        live, config = odd_models.engine(monkeypatch, tmp_path, kind, tensors)
        compatibility = Compatibility(config, Shadow(live, config, CPU))
        return live, Shadow(live, config, CPU), compatibility

    return made


def mapped(tensors: dict[str, torch.Tensor]) -> Image:
    built = odd_models.image_of(tensors)
    try:
        return Image.open(built.fds, built.digest)
    finally:
        built.close()


def switch(shadow: Shadow, compatibility: Compatibility, image: Image) -> None:
    shadow.load(
        compatibility.tensors(image), compatibility.filled(image.digest), lambda: None, proven=True
    )
    shadow.install()
    shadow.clear()


@pytest.mark.parametrize("kind", [Doubles, DoublesByValue])
def test_a_loader_may_write_into_what_it_is_given(make: Make, kind: type[Plain]) -> None:
    """Into memory that cannot be written it would end the engine; into the version's own, the next
    load would find it, and so would a tensor of the same bytes.
    """
    live, shadow, compatibility = make(kind, of(1.0, 2.0))
    version = mapped(of(5.0, 5.0))
    assert compatibility.check(version) is None
    for _ in range(2):
        switch(shadow, compatibility, version)
        assert [layer.weight.tolist() for layer in live.layers] == [[10.0] * 3] * 2


def test_what_loading_and_finishing_leave_is_undone(make: Make) -> None:
    live, shadow, compatibility = make(Plain, of(1.0, 2.0))
    version = mapped(of(5.0, 6.0))
    assert compatibility.check(version) is None
    model = shadow._model
    layer = model.layers[0]
    scheme, taken, seen = layer.scheme, model.taken, layer.scheme.seen["layer"]
    shadow.load(compatibility.tensors(version), None, lambda: None)
    assert (taken, seen) == (["0", "1", "ignored"], ["finished"])
    assert scheme.packed is not None
    shadow.clear()
    assert (taken, seen, scheme.packed) == ([], [], None)
    assert model.taken is taken
    assert layer.scheme is scheme
    assert live.taken == ["0", "1", "ignored"], "the running model's own"


def test_a_part_whose_loader_misses_other_tensors_does_not_stand_alone(make: Make) -> None:
    parts = {}
    for kind in (Plain, AsksWhatIsThere):
        _, _, compatibility = make(kind, of(1.0, 2.0))
        version = mapped(of(5.0, 2.0))
        assert compatibility.check(version) is None
        part = Delta(frozenset({"layers.0"}), frozenset({"0"}))
        parts[kind] = compatibility.stands_alone(version, part)
    assert parts == {Plain: True, AsksWhatIsThere: False}


def test_what_the_constructor_put_on_a_device_is_loaded_like_the_rest(make: Make) -> None:
    live, shadow, compatibility = make(ChoosesTheDevice, of(1.0, 2.0) | {"bias": torch.ones(2)})
    for value in (5.0, 6.0):
        version = mapped(of(value, value) | {"bias": torch.full((2,), value)})
        assert compatibility.check(version) is None
        switch(shadow, compatibility, version)
        assert live.bias.tolist() == [value, value, 7.0]
        assert shadow._model.bias.tolist() == [7.0] * 3, "as its constructor left it"


def test_the_default_dtype_is_the_model_s_on_this_thread_alone() -> None:
    elsewhere: list[torch.dtype] = []
    with default_dtype(torch.bfloat16):
        thread = threading.Thread(target=lambda: elsewhere.append(torch.empty(1).dtype))
        thread.start()
        thread.join(30.0)
        made = (torch.empty(1), torch.zeros(2), torch.tensor([1, 2.5]), torch.full((1,), 0.5))
        others = (torch.tensor([1]), torch.tensor(True), torch.full((1,), 2), torch.arange(3))
        named = torch.ones(1, dtype=torch.float64)
        copied = torch.tensor(torch.ones(1, dtype=torch.float16).tolist(), dtype=torch.float16)
    assert {tensor.dtype for tensor in made} == {torch.bfloat16}
    assert {tensor.dtype for tensor in others} == {torch.int64, torch.bool}
    assert (named.dtype, copied.dtype) == (torch.float64, torch.float16)
    assert elsewhere == [torch.float32]
    assert torch.empty(1).dtype == torch.float32


def test_copies_on_the_host_have_the_shape_and_the_strides_of_what_they_are_of() -> None:
    tensors = [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.tensor(3, dtype=torch.int64),
        torch.empty(0, 4),
        torch.arange(8, dtype=torch.uint8)[::2],
    ]
    copies = page_locked.copies(tensors)
    for one, other in zip(tensors, copies, strict=True):
        assert one.equal(other)
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
    assert [tensor.shape for tensor in page_locked.copies([torch.empty(0)])] == [(0,)]
    assert page_locked.copies([]) == []
