"""What a cold load of a checkpoint answers: the truth that a switched engine is compared with."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import localvllm
from e2e.engine.launch import PROMPTS, TOKENS
from hotweights.adapters.vllm import bundle
from localcluster import paths

Probes = list[dict[str, Any]]


class ColdLoadFailed(Exception):
    """vLLM itself does not run this checkpoint here, or its answers prove nothing; the message is
    its own.
    """


class ColdLoads:
    """A process that loads checkpoints, one at a time; it starts with the first that is asked for
    and not known. ``folder`` keeps its log.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    @property
    def log(self) -> Path:
        return self._folder / "cold.log"

    def golden(self, model: Path) -> Probes:
        """The probes that both a batch and a prompt alone answer alike; kept beside the checkpoint.
        Raises `ColdLoadFailed`.
        """
        record = model.with_name(f"{model.name}.golden.json")
        if not record.exists():
            answer = self._ask(model)
            if "error" in answer:
                raise ColdLoadFailed(answer["error"])
            paths.write_atomically(record, json.dumps(answer["probes"]))
        found: Probes = json.loads(record.read_text())
        return found

    def _ask(self, model: Path) -> dict[str, Any]:
        process = self._process = self._process or self._start()
        if process.stdin is None or process.stdout is None:
            raise ColdLoadFailed("the process that loads has no pipes")
        question = {"model": str(model), "prompts": PROMPTS, "tokens": TOKENS}
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise ColdLoadFailed(f"the process that loads has ended; {self.log} says why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> subprocess.Popen[str]:
        variables = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_CI_ENV": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(bundle.write(self._folder / "plugin")),
        }
        with self.log.open("w") as log:
            return subprocess.Popen(
                [str(localvllm.python()), "-P", str(Path(__file__).with_name("_cold.py"))],
                env={**os.environ, **variables},
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def told_apart(versions: Sequence[Probes]) -> list[list[int]]:
    """The prompts that every version was asked and no two answer alike: by any other an engine
    could serve either. Raises `ColdLoadFailed` where there is none.
    """
    by_prompt = [
        {tuple(probe["promptTokenIds"]): tuple(probe["tokenIds"]) for probe in probes}
        for probes in versions
    ]
    found = [
        [*prompt]
        for prompt in by_prompt[0]
        if all(prompt in answers for answers in by_prompt)
        and len({answers[prompt] for answers in by_prompt}) == len(by_prompt)
    ]
    if not found:
        raise ColdLoadFailed("no prompt tells its versions apart: whatever was served, it would pass")
    return found
