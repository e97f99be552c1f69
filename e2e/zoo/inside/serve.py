"""Answers JSON lines, each in a fork of a process that has imported vLLM: importing it takes longer
than loading a tiny model. Nothing else is done before a fork, so that each inherits modules and no
state, and one that is killed takes no other with it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def serve(answer: Answer) -> None:
    """Until standard input ends. What ``answer`` raises is answered as ``{"error": …}``."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM logs to standard output
    for line in sys.stdin:
        answers.write(json.dumps(_in_a_fork(answer, json.loads(line))) + "\n")


def inspect_models_here() -> None:
    """Have this process and its forks look themselves what a model's class can do. vLLM 0.32 asks a
    new process (``model_executor/models/registry.py``), which imports all of vLLM first.
    """
    from vllm.model_executor.models import registry

    def inspect(registered: Any) -> Any:
        return registry._ModelInfo.from_model_cls(registered.load_model_cls())

    registry._LazyRegisteredModel.inspect_model_cls = inspect


def _in_a_fork(answer: Answer, asked: dict[str, Any]) -> dict[str, Any]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        with os.fdopen(write, "w") as stream:
            json.dump(_try(answer, asked), stream)
        os._exit(0)  # without the interpreter's end: the parent's buffers are not the child's
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    if not text:
        return {"error": f"it ended with {os.waitstatus_to_exitcode(status)} and without a word"}
    found: dict[str, Any] = json.loads(text)
    return found


def _try(answer: Answer, asked: dict[str, Any]) -> dict[str, Any]:
    try:
        return answer(asked)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - any model may raise anything; it is the answer
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:600]}
