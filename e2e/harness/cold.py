"""What a vLLM that is started cold on a checkpoint answers: the truth that running engines are
compared with.

A cold start takes half a minute, and what it answers never changes, so it is kept beside the
checkpoint that was made once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from localcluster import paths
from localvllm import build, models
from localvllm.models import Model

PROMPT = tuple(range(30, 70))
TOKENS = 24
"""What tests ask, where nothing speaks for asking something else."""


def made(version: str) -> Path:
    """The folder of the samples' model in this version (v0, v1, …: seeds of one architecture), made
    where it is missing.
    """
    folder = build.cache() / "models" / "tiny-llama" / version
    models.make_models([Model(folder, "llama", int(version.removeprefix("v")))])
    return folder


def answers(version: str, prompt: Sequence[int], tokens: int) -> list[int]:
    """The greedy continuation of a prompt, in token ids."""
    folder = made(version)
    question = hashlib.sha256(json.dumps([list(prompt), tokens]).encode()).hexdigest()[:16]
    record = build.cache() / "models" / "tiny-llama-cold" / f"{version}-{question}.json"
    if not record.exists():
        paths.write_atomically(record, json.dumps(models.greedy_text(folder, [prompt], tokens)[0]))
    found: list[int] = json.loads(record.read_text())
    return found
