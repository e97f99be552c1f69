"""Records what a cold load of a checkpoint answers: the golden tokens that travel with a version as
its ``probes``.

    python -m hotweights.adapters.vllm.golden MODEL_DIR [--dtype float32] [--tokens 16]

Needs vLLM, so `publish` runs it as a process in an environment that has it. Prints one JSON list in
the manifest's format and nothing else on standard output. The tokens come by the same road as in
the pause (`probe.run`).

Another machine rounds a little differently, and where the two best logits lie closer to each other
than that, it answers otherwise without being wrong. So a prompt's tokens end before the first such
near tie: where the gap is smaller than a tolerance, or where the prompt alone gives another token
than in a batch. What was cut is nowhere in the manifest, whose format and digests stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hotweights.adapters.vllm import probe, releases

TOLERANCES = {"float32": 0.001, "float16": 0.02, "bfloat16": 0.15}
"""How far the second best logit must lie behind for a token to be recorded, by what is computed in.
Logits of 8 to 16 have a step of 2**-7 in float16 and of 2**-4 in bfloat16, and both of two may be
off by one. In float32 it is the order of sums that differs, far below a thousandth.
"""
NEAR_TIE = "near tie: "  # begins each line for whoever publishes; the rest is vLLM's log


def record(
    model: Path,
    dtype: str,
    prompts: list[list[int]],
    tokens: int,
    tolerance: float | None = None,
) -> list[dict[str, Any]]:
    """Start vLLM on the checkpoint, in this process, and ask it. ``tokens`` is how many to record
    for each prompt, at most; ``tolerance`` None: that of `TOLERANCES`. Raises SystemExit where the
    answers prove nothing, and for a vLLM that is not supported.
    """
    # EngineCore here, where `probe.run` reaches it
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # no plugin: a cold load is to be recorded, and nothing that somebody added to it
    os.environ.setdefault("VLLM_PLUGINS", "")
    # GB; by default vLLM takes nearly all memory of the machine
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm

    if problem := releases.refusal(vllm.__version__):
        raise SystemExit(problem)
    # no longer than needed: the memory for requests grows with it
    length = max(map(len, prompts)) + tokens + 1
    llm = vllm.LLM(
        str(model), dtype=dtype, enforce_eager=True, max_model_len=length, disable_log_stats=True
    )
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    together = probe.run(core, prompts, [tokens] * len(prompts), gaps=True)
    alone = [
        answer for prompt in prompts for answer in probe.run(core, [prompt], [tokens], gaps=True)
    ]
    if any(answer["nan"] for answer in together):
        raise SystemExit(
            f"{model}: its answers contain NaN; a version like that should not be published"
        )
    if tolerance is None:
        computed = str(engine.vllm_config.model_config.dtype).removeprefix("torch.")
        # a kind of number that nobody knew here: as for the coarsest
        tolerance = TOLERANCES.get(computed, max(TOLERANCES.values()))
    kind = probe.engine_kind(engine.vllm_config)
    recorded = []
    for number, prompt in enumerate(prompts):
        sure = sure_tokens([together[number], alone[number]], tolerance)
        if len(sure) < tokens:
            gap = together[number]["gaps"][len(sure)]
            text = (
                f"prompt {number} has {len(sure)} tokens of {tokens}: the next leads by {gap:.2g}"
            )
            print(f"{NEAR_TIE}{text}, tolerance {tolerance:g}", file=sys.stderr)
        if sure:
            recorded.append({"engine": kind, "promptTokenIds": prompt, "tokenIds": sure})
    if not recorded:
        raise SystemExit(
            f"{model}: every prompt begins near a tie (closer than {tolerance:g}), so its tokens "
            "prove nothing; give others with --prompts, or a smaller --tolerance if all engines "
            "run on machines like this one"
        )
    return recorded


def sure_tokens(answers: Sequence[dict[str, Any]], tolerance: float) -> list[int]:
    """Of several answers to one prompt (as `probe.run` gives them with gaps), the tokens before the
    first near tie: that all of them give, each with a gap of ``tolerance`` or more.
    """
    sure: list[int] = []
    each = [zip(answer["tokens"], answer["gaps"], strict=True) for answer in answers]
    for step in zip(*each, strict=True):
        # a gap that is NaN is no gap: it is not greater than anything
        if len({token for token, _ in step}) > 1 or not all(gap >= tolerance for _, gap in step):
            break
        sure.append(step[0][0])
    return sure


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
        help="tokens per prompt, at most (default: %(default)s)",
    )
    parser.add_argument("--prompts", type=json.loads, help="JSON list of lists of token ids")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="a token is recorded only if the second best logit lies so far behind it, and none "
        f"after one that is not; 0 records all (default, by what is computed in: {TOLERANCES})",
    )
    arguments = parser.parse_args()
    prompts = arguments.prompts or [list(prompt) for prompt in probe.DEFAULT_PROMPTS]
    answer = os.dup(1)  # before vLLM is imported and finds its standard output
    os.dup2(2, 1)  # vLLM and its workers log to standard output
    probes = record(
        arguments.model, arguments.dtype, prompts, arguments.tokens, arguments.tolerance
    )
    with os.fdopen(answer, "w") as stream:
        stream.write(json.dumps(probes) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
