"""A program as its users write it: `install_autobind`, then an engine. Driven by JSON lines,
because a test wants to ask it things.

    python drive.py {"kind": "llm" | "async", "model": …, "autobind": {…}}

Every line is ``{"prompt": [ids], "tokens": n}``, answered with the greedy tokens.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from typing import Any

from hotweights.adapters.vllm_auto import install_autobind


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM and its children log to standard output
    logging.basicConfig(level=logging.INFO)
    asked = json.loads(sys.argv[1])
    autobind = asked["autobind"]
    if autobind.pop("slashes", False):
        autobind["name_map"] = slashes
    bound = install_autobind(**autobind)
    answers.write(json.dumps({"bound": bound}) + "\n")
    if asked["kind"] == "llm":
        synchronous(asked, answers)
    else:
        asyncio.run(asynchronous(asked, answers))


def slashes(plan: dict[str, Any]) -> dict[str, str]:
    return {it["key"]: it["tensor"].replace("/", ".") for b in plan["buckets"] for it in b["items"]}


def engine_arguments(asked: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": asked["model"],
        "dtype": "float32",
        "max_model_len": 256,
        **asked.get("engine", {}),
    }


def synchronous(asked: dict[str, Any], answers: Any) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(**engine_arguments(asked))
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        sampling = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True)
        (answer,) = llm.generate(
            [{"prompt_token_ids": request["prompt"]}], sampling, use_tqdm=False
        )
        answers.write(json.dumps({"tokens": list(answer.outputs[0].token_ids)}) + "\n")


async def asynchronous(asked: dict[str, Any], answers: Any) -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(asked)))
    answers.write(json.dumps({"ready": True}) + "\n")
    number = 0
    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line)
        number += 1
        sampling = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True)
        tokens: list[int] = []
        async for output in engine.generate(
            {"prompt_token_ids": request["prompt"]}, sampling, str(number)
        ):
            tokens = list(output.outputs[0].token_ids)
        answers.write(json.dumps({"tokens": tokens}) + "\n")
    engine.shutdown()


if __name__ == "__main__":
    main()
