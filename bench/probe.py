"""What a probe costs inside the pause, by how it is asked, and what a cheaper one would still prove.

    python bench/probe.py [--gb 1] [--rounds 9] [--json FILE]

One vLLM in a process of its own, without a server and with nothing else to do, is asked by the
plugin's own code, as in a pause. *As it is*: the default prompts, two tokens each, so a step that
prefills and one that decodes. *One token* leaves out decoding. *Short prompts* have four tokens
each. *Sixteen tokens* is what a long list of golden tokens costs; *sixteen prefilled* holds the same
list against the best token at every place of one prefill (``prompt_logprobs``), and says at how many
places it is the one that decoding gave. Rows: ``how, prompt_tokens, tokens, steps, seconds,
first_seconds, agree``; ``first_seconds`` is the first time, when kernels may be compiled.

On a GPU machine, run ``bench/commit.py`` for the pause itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LONG = 16  # tokens
SHORT = 4
LIMIT_SECONDS = 1800


def inside(model: str, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """The rows. In vLLM's environment, with the plugin on the path."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # EngineCore here, where `probe` reaches it
    from vllm import LLM

    from hotweights.adapters.vllm import probe

    llm = LLM(model, dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=8)
    core = llm.llm_engine.engine_core.engine_core
    prompts = [list(prompt) for prompt in probe.DEFAULT_PROMPTS]
    steps = _count_steps(core)
    rows: list[dict[str, Any]] = []

    def measure(how: str, asked: Sequence[list[int]], tokens: int, ask: Callable[[], Any]) -> Any:
        times, before = [], len(steps)
        for _ in range(rounds + 1):
            began = time.monotonic()
            answers = ask()
            times.append(time.monotonic() - began)
        row = {"how": how, "prompt_tokens": sum(map(len, asked)), "tokens": tokens}
        row["steps"] = (len(steps) - before) // (rounds + 1)
        row |= {"seconds": statistics.median(times[1:]), "first_seconds": times[0]}
        rows.append(row)
        return answers

    def decode(how: str, asked: Sequence[list[int]], tokens: int) -> list[list[int]]:
        lengths = [tokens] * len(asked)
        answers = measure(how, asked, tokens, lambda: probe.run(core, asked, lengths))
        return [list(answer["tokens"]) for answer in answers]

    decode("as it is", prompts, probe.DEFAULT_LENGTH)
    decode("one token", prompts, 1)
    decode("short prompts", [prompt[:SHORT] for prompt in prompts], probe.DEFAULT_LENGTH)
    decode("one short prompt", [prompts[0][:SHORT]], probe.DEFAULT_LENGTH)
    golden = decode("sixteen tokens", prompts, LONG)
    whole = [prompt + tokens for prompt, tokens in zip(prompts, golden, strict=True)]
    best = measure("sixteen prefilled", whole, 0, lambda: _prefill(core, whole))
    agree = sum(
        one == other
        for prompt, tokens, found in zip(prompts, golden, best, strict=True)
        for one, other in zip(tokens, found[len(prompt) - 1 :], strict=True)
    )
    rows[-1]["agree"] = f"{agree} of {sum(map(len, golden))}"
    return rows


def _count_steps(core: Any) -> list[None]:
    """Grows by one with each step of the engine."""
    steps: list[None] = []
    step = core.step_fn

    def counted() -> Any:
        steps.append(None)
        return step()

    core.step_fn = counted
    return steps


def _prefill(core: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The best token behind each token of each prompt but the last, from one forward pass, as
    `probe.run` steps. vLLM 0.32 puts the prompt's own token before the best ones
    (``v1/outputs.py``: ``LogprobsTensors``).
    """
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    from hotweights.adapters.vllm import probe

    found: dict[str, list[int]] = {}
    with probe._alone(core.scheduler):
        for number, prompt in enumerate(prompts):
            name = f"{probe._PREFIX}{number}"
            sampling = SamplingParams(
                temperature=0.0, max_tokens=1, detokenize=False, prompt_logprobs=1
            )
            sampling.skip_reading_prefix_cache = True
            request = Request(
                request_id=name,
                prompt_token_ids=list(prompt),
                sampling_params=sampling,
                pooling_params=None,
                block_hasher=core.request_block_hasher,
            )
            core.scheduler.add_request(request)
            found[name] = []
        while core.scheduler.has_requests():
            for output in probe._step(core):
                tensors = output.new_prompt_logprobs_tensors
                if tensors is not None:
                    found[output.request_id] += tensors.logprob_token_ids[:, 1].tolist()
    return list(found.values())


def measure(gb: float, rounds: int) -> list[dict[str, Any]]:
    """The rows of a model of that size. Raises SystemExit with the end of what vLLM said."""
    import localvllm
    from bench.commit import checkpoints
    from hotweights.adapters.vllm import bundle

    model = checkpoints(gb, "cpu")[0].dir
    with tempfile.TemporaryDirectory() as folder:
        variables = {
            **os.environ,
            "PYTHONPATH": str(bundle.write(Path(folder) / "plugin")),
            "VLLM_PLUGINS": "",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_CI_ENV": "1",
            "HF_HUB_OFFLINE": "1",
        }
        answer = Path(folder) / "rows.json"
        command = [str(localvllm.python()), str(Path(__file__).resolve())]
        command += ["--rounds", str(rounds), "--inside", str(model), str(answer)]
        done = subprocess.run(
            command,
            env=variables,
            cwd=folder,
            check=False,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
        )
        if done.returncode:
            raise SystemExit(done.stderr[-4000:])
        rows: list[dict[str, Any]] = json.loads(answer.read_text())
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """One line for each way of asking."""
    from rich.console import Console
    from rich.table import Table

    names = ("how", "prompt_tokens", "tokens", "steps", "seconds", "first_seconds", "agree")
    table = Table(*names)
    for row in rows:
        cells = (row.get(name, "") for name in names)
        table.add_row(*(f"{one:.4f}" if isinstance(one, float) else str(one) for one in cells))
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--inside", nargs=2, metavar=("MODEL", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        model, file = arguments.inside
        Path(file).write_text(json.dumps(inside(model, "bfloat16", arguments.rounds)))
        return 0
    rows = measure(arguments.gb, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
