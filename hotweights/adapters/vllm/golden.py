"""Records what a cold load of a checkpoint answers: the golden tokens that travel with a version as
its ``probes``.

    python -m hotweights.adapters.vllm.golden MODEL_DIR [--dtype float32] [--tokens 16]

Needs vLLM, so `publish` runs it as a process in an environment that has it. Prints one JSON list in
the manifest's format and nothing else on standard output. The tokens come by the same road as in
the pause (`probe.run`). A batch rounds a little differently than a prompt alone, so a prompt is
kept only if both give the same tokens: what is near a tie here could fall the other way in an
engine with other limits.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from hotweights.adapters.vllm import probe


def record(model: Path, dtype: str, prompts: list[list[int]], tokens: int) -> list[dict[str, Any]]:
    """Start vLLM on the checkpoint, in this process, and ask it. ``tokens`` is how many to record
    for each prompt. Raises SystemExit where the answers prove nothing.
    """
    # EngineCore here, where `probe.run` reaches it
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # no plugin: a cold load is to be recorded, and nothing that somebody added to it
    os.environ.setdefault("VLLM_PLUGINS", "")
    # GB; by default vLLM takes nearly all memory of the machine
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    # no longer than needed: the memory for requests grows with it
    length = max(map(len, prompts)) + tokens + 1
    llm = LLM(
        str(model), dtype=dtype, enforce_eager=True, max_model_len=length, disable_log_stats=True
    )
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    together = probe.run(core, prompts, [tokens] * len(prompts))
    alone = [answer for prompt in prompts for answer in probe.run(core, [prompt], [tokens])]
    if any(answer["nan"] for answer in together):
        raise SystemExit(
            f"{model}: its answers contain NaN; a version like that should not be published"
        )
    if all(answer != other for answer, other in zip(together, alone, strict=True)):
        raise SystemExit(
            f"{model}: every prompt is near a tie, so its tokens prove nothing; give others "
            "with --prompts"
        )
    kind = probe.engine_kind(engine.vllm_config)
    return [
        {"engine": kind, "promptTokenIds": prompt, "tokenIds": answer["tokens"]}
        for prompt, answer, other in zip(prompts, together, alone, strict=True)
        if answer == other
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hotweights.adapters.vllm.golden", description=__doc__
    )
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="as the pods' --dtype: tokens of another one are not compared",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=probe.DEFAULT_LENGTH,
        help="tokens per prompt (default: %(default)s)",
    )
    parser.add_argument("--prompts", type=json.loads, help="JSON list of lists of token ids")
    arguments = parser.parse_args()
    prompts = arguments.prompts or [list(prompt) for prompt in probe.DEFAULT_PROMPTS]
    answer = os.dup(1)  # before vLLM is imported and finds its standard output
    os.dup2(2, 1)  # vLLM and its workers log to standard output
    probes = record(arguments.model, arguments.dtype, prompts, arguments.tokens)
    with os.fdopen(answer, "w") as stream:
        stream.write(json.dumps(probes) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
