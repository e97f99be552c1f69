"""Hot equals cold on a GPU: an engine that was switched answers what one answers that was started
on the version, eager, with CUDA graphs, compiled, and with weights quantized as they are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from e2e.engine import images
from e2e.engine.conftest import Engine, checkpoint, report
from e2e.engine.launch import FULL_GRAPHS, GPU, VLLM
from e2e.engine.test_architectures import PLAIN_WAY

SHARED = (
    *("--dtype", "bfloat16", "--gpu-memory-utilization", "0.05", "--max-num-seqs", "8"),
    *("--kv-cache-memory-bytes", "1073741824"),  # several start at a time: nothing is profiled
)
EAGER = ("--enforce-eager",)
WAYS = {
    "eager": EAGER,
    "graphs": ("--compilation-config", json.dumps(FULL_GRAPHS)),
    "compiled": ("--compilation-config", json.dumps({"cudagraph_capture_sizes": [1, 2, 4, 8]})),
}
CASES = [
    *(("llama", way, arguments) for way, arguments in WAYS.items()),
    ("llama", "fp8", (*EAGER, "--quantization", "fp8")),
    ("qwen3-moe", "graphs", WAYS["graphs"]),
    ("qwen2", "graphs", WAYS["graphs"]),
]


@pytest.mark.parametrize(
    ("arch", "arguments"),
    [(arch, arguments) for arch, _, arguments in CASES],
    ids=[f"{arch}-{way}" for arch, way, _ in CASES],
)
def test_hot_equals_cold(
    start: Callable[..., Engine],
    tmp_path: Path,
    arch: str,
    arguments: Sequence[str],
    request: pytest.FixtureRequest,
) -> None:
    models = [checkpoint(arch, seed, dtype="bfloat16") for seed in (0, 1)]
    arguments = (*SHARED, *arguments)
    hot = start(models[0], arguments=arguments, **GPU)
    expected = _cold(models[1], tmp_path, arguments)
    hot.ready()
    first = hot.vllm.greedy()
    assert first != expected
    versions = [images.build(images.read(model), version=model.name) for model in models]
    for number, answers in ((1, expected), (0, first), (1, expected)):
        answer = hot.agent.swap(versions[number])
        report(
            request,
            f"{answer.probe}: paused {answer.pause_seconds * 1e3:.1f} ms {answer.timings}",
        )
        assert hot.vllm.greedy() == answers
    assert PLAIN_WAY not in hot.vllm.log.read_text(errors="replace")


def test_an_engine_opens_its_port_with_the_version_that_it_is_told(
    start: Callable[..., Engine], tmp_path: Path
) -> None:
    models = [checkpoint("llama", seed, dtype="bfloat16") for seed in (0, 1)]
    arguments = (*SHARED, *WAYS["graphs"])
    target = images.build(images.read(models[1]), version="v1")
    hot = start(models[0], target, arguments, **GPU)
    expected = _cold(models[1], tmp_path, arguments)
    hot.ready()
    assert hot.vllm.greedy() == expected


def _cold(model: Path, folder: Path, arguments: Sequence[str]) -> list[list[int]]:
    """What a vLLM that is started on the checkpoint answers."""
    environment = {**GPU, "HOTWEIGHTS_SOCKET": ""}
    cold = VLLM(
        model, folder / "cold", folder / "nobody", arguments=arguments, environment=environment
    )
    try:
        cold.ready()
        return cold.greedy()
    except BaseException:
        print(cold.tail())
        raise
    finally:
        cold.stop()
