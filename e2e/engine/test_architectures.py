"""Hot equals cold: after a swap, every architecture answers token by token what a cold load of that
checkpoint does.

Tied embeddings (qwen2, gpt2, opt) and experts come out wrong of vLLM's in-place reload on CPUs;
they have to come out right here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.engine import images
from e2e.engine.conftest import (
    Engine,
    assert_serves,
    checkpoint,
    delta,
    report,
    told_apart,
    version,
)
from hotweights_transports.handoff import frames

A_PART = r"differs from what serves in 1 of \d+ parts of the model"
PLAIN_WAY = "loaded inside the pause"  # what a rank's log says when there is no second model


@pytest.mark.parametrize("arch", ["qwen2", "qwen3-moe", "gpt2", "opt"])
def test_hot_equals_cold(
    start: Callable[..., Engine], arch: str, request: pytest.FixtureRequest
) -> None:
    old, new, other = checkpoint(arch, 0), checkpoint(arch, 1), delta(arch)
    told_apart(old, new, other)
    engine = start(old).ready()
    assert_serves(engine, old)
    first, second, third = version(old, "v0"), version(new, "v1"), version(other, "v2")
    for image, model, way in (
        (second, new, "Beside"),
        (first, old, "InPause"),
        (third, other, "Beside"),
        (first, old, "InPause"),
        (second, new, "Beside"),
    ):
        answer = engine.agent.swap(image, way)
        assert answer.probe == "Golden"
        assert_serves(engine, model)
        report(request, f"{way}: paused {answer.pause_seconds * 1e3:.1f} ms {answer.timings}")
    log = engine.vllm.log.read_text(errors="replace")
    assert PLAIN_WAY not in log
    # there and back again, by one layer of two; the embeddings and the rest stay
    assert len(re.findall(A_PART, log)) == 2, log[-4000:]
    if arch == "qwen2":
        heads(engine, new)
    engine.stop()


@pytest.mark.parametrize("arch", ["qwen2", "qwen3-moe"])
def test_the_plain_way_is_right_too(
    start: Callable[..., Engine], arch: str, request: pytest.FixtureRequest
) -> None:
    """Loaded inside the pause, as for a model that cannot be finished beside the running one."""
    old, new = checkpoint(arch, 0), checkpoint(arch, 1)
    told_apart(old, new)
    engine = start(old, HOTWEIGHTS_SABOTAGE_PLAIN="1").ready()
    first, second = version(old, "v0"), version(new, "v1")
    for image, model in ((second, new), (first, old)):
        answer = engine.agent.swap(image)
        assert answer.probe == "Golden"
        assert_serves(engine, model)
        report(request, f"paused {answer.pause_seconds * 1e3:.1f} ms {answer.timings}")
    (refused,) = engine.agent.prepare(images.build(images.read(new)[1:]))
    assert isinstance(refused, frames.Rejected)
    assert refused.reason == "MissingTensor"
    engine.stop()


def heads(engine: Engine, model: Path) -> None:
    """A tied head in the checkpoint: welcome when it equals the embeddings; another one would be
    silently ignored.
    """
    tensors = images.read(model)
    embedding = next(tensor for tensor in tensors if tensor.name == "model.embed_tokens.weight")
    equal = images.Tensor("lm_head.weight", embedding.dtype, embedding.shape, embedding.data)
    other = images.Tensor("lm_head.weight", embedding.dtype, embedding.shape, embedding.data[::-1])
    (answer,) = engine.agent.prepare(images.build([*tensors, other]))
    assert isinstance(answer, frames.Rejected)
    assert answer.reason == "UnknownTensor"
    assert "lm_head.weight differs" in answer.message
    engine.agent.swap(images.build([*tensors, equal]))
    assert_serves(engine, model)
