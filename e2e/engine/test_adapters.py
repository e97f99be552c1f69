"""A base changes under the adapters that are loaded over it: base and adapter then answer as in an
engine that booted with that base.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from e2e.engine.conftest import Engine, assert_serves, checkpoint, report, told_apart, version
from e2e.engine.launch import PROMPTS

ADAPTER = "style"
RANK = 4


def test_a_base_changes_under_an_adapter(
    start: Callable[..., Engine], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    models = checkpoint("llama", 0, shards=3), checkpoint("llama", 1, shards=2)
    told_apart(*models)
    adapter = _write_adapter(tmp_path / ADAPTER, models[0])
    arguments = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{ADAPTER}={adapter}"]
    engines = [start(model, "keep", arguments) for model in models]
    cold = [_by_adapter(engine.ready()) for engine in engines]
    versions = [version(model, f"v{number}") for number, model in enumerate(models)]
    for engine, served, other in zip(engines, models, reversed(versions), strict=True):
        assert _by_adapter(engine) != engine.vllm.greedy(), "the adapter changes nothing"
        answer = engine.agent.swap(other)
        report(request, f"paused {answer.pause_seconds * 1e3:.1f} ms {answer.timings}")
        assert answer.probe == "Golden"
        assert_serves(engine, models[1] if served is models[0] else models[0])
    assert [_by_adapter(engine) for engine in engines] == cold[::-1]


def _by_adapter(engine: Engine) -> list[list[int]]:
    return [engine.vllm.complete(prompt, model=ADAPTER) for prompt in PROMPTS]


def _write_adapter(folder: Path, base: Path) -> Path:
    """Of the attention's queries and values, as PEFT writes it; large enough to be noticed."""
    config = json.loads((base / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    outputs = {"q_proj": heads * width, "v_proj": config["num_key_value_heads"] * width}
    random = np.random.default_rng(7)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in outputs.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = _normal(random, RANK, hidden)
            tensors[f"{prefix}.lora_B.weight"] = _normal(random, size, RANK)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted(outputs),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def _normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    values: np.ndarray = random.standard_normal(shape, np.float32)
    return values
