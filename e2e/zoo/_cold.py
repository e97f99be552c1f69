"""Runs inside vLLM's environment: says what a cold load of each checkpoint answers. See `cold.py`.

Every checkpoint is loaded in a process of its own, as by a cold start. Those are forks of one that
has imported vLLM, because importing it takes longer than loading a tiny model; nothing else is
done before a fork, so that they inherit modules and no state.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": ""}

import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401 - for the forks
from vllm import LLM  # noqa: F401 - for the forks

from hotweights.adapters.vllm import golden


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM logs to standard output
    for line in sys.stdin:
        answers.write(json.dumps(_in_a_fork(json.loads(line))) + "\n")


def _in_a_fork(asked: dict[str, Any]) -> dict[str, Any]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        with os.fdopen(write, "w") as stream:
            json.dump(_load(asked), stream)
        os._exit(0)  # without the interpreter's end: the parent's buffers are not the child's
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    if not text:
        return {"error": f"it ended with {os.waitstatus_to_exitcode(status)} and without a word"}
    found: dict[str, Any] = json.loads(text)
    return found


def _load(asked: dict[str, Any]) -> dict[str, Any]:
    try:
        probes = golden.record(Path(asked["model"]), "float32", asked["prompts"], asked["tokens"])
    except (Exception, SystemExit) as error:  # noqa: BLE001 - any model may raise anything; it is the answer
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:600]}
    return {"probes": probes}


main()
