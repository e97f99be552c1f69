"""A process in vLLM's environment that answers questions, one at a time (`inside.serve`)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import localvllm
from e2e.zoo import inside
from hotweights.adapters.vllm import bundle
from localvllm.guard import Guard

ROOT = Path(__file__).resolve().parents[2]


class Unanswered(Exception):
    """vLLM itself does not run this checkpoint here, or what it answers proves nothing; the
    message is its own.
    """


class Forks:
    """It starts with the first question. ``script`` is a module of `inside`; ``folder`` keeps the
    log.
    """

    def __init__(self, script: str, folder: Path) -> None:
        self._script = Path(inside.__path__[0]) / script
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._guard: Guard | None = None
        self.log = folder / f"{self._script.stem}.log"

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Raises `Unanswered`."""
        process = self._process = self._process or self._start()
        if process.stdin is None or process.stdout is None:
            raise Unanswered("the process that answers has no pipes")
        with contextlib.suppress(BrokenPipeError):  # its last words are in the log
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            end = self.log.read_text(errors="replace")[-600:]
            raise Unanswered(f"the process that answers has ended; the end of its log: {end}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unanswered(answer["error"])
        return answer

    def _start(self) -> subprocess.Popen[str]:
        # the bundle first: what runs in vLLM's processes is what pods get
        path = [str(bundle.write(self._folder / "plugin")), str(ROOT)]
        variables = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_CI_ENV": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(path),
        }
        with self.log.open("w") as log:
            process = subprocess.Popen(
                [str(localvllm.python()), "-P", str(self._script)],
                env={**os.environ, **variables},
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # so that it ends with its forks, by `close` alone
            )
        self._guard = Guard(process.pid)
        return process

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
        if self._guard is not None:
            self._guard.dismiss()
