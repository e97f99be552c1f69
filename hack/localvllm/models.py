"""Tiny checkpoints, different enough that two versions of one model answer visibly different text.

Real architectures with two small layers and a byte-level tokenizer, written by `transformers`
inside vLLM's environment (`_write_models.py` runs there). Heads are 64 wide, because vLLM's CPU
attention refuses widths that are no multiple of 32, and only at the first request. Weights are
scaled up, because a fresh random model repeats one token whatever its seed.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localvllm import build

ARCHITECTURES = ("llama", "qwen2", "gpt2", "opt", "qwen3-moe")
DTYPES = ("float32", "bfloat16", "float16")
PROMPTS = ((1, 2, 3, 4, 5, 6, 7, 8), tuple(range(30, 70)), (200, 100, 50, 25, 12, 6, 3, 1, 9, 9, 9))


@dataclass(frozen=True, slots=True)
class Model:
    """One checkpoint to write."""

    dir: Path
    arch: str = "llama"
    seed: int = 0
    shards: int = 1
    dtype: str = "float32"
    layers: int = 2
    hidden: int = 256
    config_class: str = ""
    """Of `transformers`: another architecture than those above, of the name that ``arch`` gives."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """All that this class is called with."""
    scale: float = 5.0
    """What weights are multiplied with: more than makes the answers of two versions differ, and
    some architectures run into NaN."""


def make_model(
    dir: Path,
    arch: str,
    seed: int,
    shards: int = 1,
    dtype: str = "float32",
) -> Path:
    """Write one tiny checkpoint (about 2 s, most of it imports; `make_models` writes many in one
    go).
    """
    make_models([Model(dir, arch, seed, shards, dtype)])
    return dir


def make_models(models: Sequence[Model]) -> None:
    """Write the checkpoints whose folder does not exist yet."""
    missing = [model for model in models if not (model.dir / "config.json").exists()]
    for model in missing:
        known = model.config_class or model.arch in ARCHITECTURES
        if not known or model.dtype not in DTYPES:
            raise ValueError(
                f"{model.arch}/{model.dtype}: choose from {ARCHITECTURES} and {DTYPES}"
            )
    if missing:
        _in_vllm(
            "_write_models.py",
            json.dumps([dataclasses.asdict(model) for model in missing], default=str),
        )


def greedy_text(
    model: Path, prompts: Sequence[Sequence[int]] = PROMPTS, tokens: int = 24
) -> list[list[int]]:
    """The greedy token ids that a cold vLLM (float32, eager) gives for prompts: what a hot swap
    must give too.
    """
    request = {
        "model": str(model),
        "prompts": [list(prompt) for prompt in prompts],
        "tokens": tokens,
    }
    return [list(answer) for answer in json.loads(_in_vllm("_greedy_text.py", json.dumps(request)))]


def _in_vllm(script: str, argument: str) -> str:
    command = [str(build.python()), str(Path(__file__).with_name(script)), argument]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    if result.returncode:
        raise build.BuildError(
            f"{script} failed (exit {result.returncode}):\n{result.stderr[-3000:]}"
        )
    return result.stdout.splitlines()[-1] if result.stdout else ""
