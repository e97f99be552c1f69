"""Says what a cold load of a checkpoint answers, for `e2e.zoo.cold`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": ""}

import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401 - for the forks
from vllm import LLM  # noqa: F401 - for the forks

from e2e.zoo.inside.serve import inspect_models_here, serve
from hotweights.adapters.vllm import golden


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    model = Path(asked["model"])
    return {"probes": golden.record(model, "float32", asked["prompts"], asked["tokens"])}


inspect_models_here()
serve(answer)
