"""Starts a real vLLM with the plugin on its path, exactly as an injected pod would: by environment
alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import localvllm
from hotweights.adapters.vllm import bundle
from localvllm.guard import Guard
from tests.ports import free_ports

MODEL_NAME = "m"
PROMPTS = ((1, 2, 3, 4, 5, 6, 7, 8), tuple(range(30, 70)), (200, 100, 50, 25, 12, 6, 3, 1, 9, 9, 9))
TOKENS = 24

GPU = {
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
}
"""What an engine on a GPU needs in its environment where there is no network, and no flashinfer."""

FULL_GRAPHS = {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 2, 4, 8]}
"""CUDA graphs without torch.compile, as ``--compilation-config`` takes it."""


class Ended(Exception):
    """vLLM ended before it was ready; the message has the end of its log."""


class VLLM:
    def __init__(
        self,
        model: Path,
        folder: Path,
        agent_socket: Path,
        *,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        extra_path: Path | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        plugin = bundle.write(folder / "plugin")
        (self.port,) = free_ports()
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.address}"
        self.log = folder / "vllm.log"
        paths = [str(path) for path in (extra_path, plugin) if path is not None]
        variables = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "HOTWEIGHTS_SOCKET": str(agent_socket),
            "HOTWEIGHTS_TOKEN_FILE": str(folder / "token"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_CI_ENV": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        variables |= environment or {}
        (folder / "token").write_text("not-a-real-token\n")
        command = [
            str(localvllm.python()),
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(model),
        ]
        command += [
            "--served-model-name",
            MODEL_NAME,
            "--dtype",
            "float32",
            "--max-model-len",
            "256",
        ]
        command += ["--port", str(self.port), *arguments]
        self._stream = self.log.open("w")
        # In a folder of its own: `python -m` looks there first, and would find this project's
        # modules in its root.
        self.process = subprocess.Popen(
            command,
            env=variables,
            stdout=self._stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
        )
        self._guard = Guard(self.process.pid)

    def alive(self) -> bool:
        return self.process.poll() is None

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def ready(self, seconds: float = 600.0) -> float:
        """Wait until the port answers; seconds that took."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if not self.alive():
                raise Ended(self.tail())
            if self.healthy():
                return time.monotonic() - began
            time.sleep(0.2)
        raise Ended(f"not ready within {seconds} s\n{self.tail()}")

    def tail(self, characters: int = 4000) -> str:
        return self.log.read_text(errors="replace")[-characters:]

    def complete(
        self,
        prompt: Sequence[int],
        tokens: int = TOKENS,
        timeout: float = 60.0,
        model: str = MODEL_NAME,
    ) -> list[int]:
        """Greedy token ids, of the model or an adapter."""
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer = self.post("/v1/completions", {**body, "return_token_ids": True}, timeout)
        return [int(token) for token in answer["choices"][0]["token_ids"]]

    def greedy(self) -> list[list[int]]:
        return [self.complete(prompt) for prompt in PROMPTS]

    def get(self, path: str, timeout: float = 60.0) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
            return json.loads(answer.read())

    def post(self, path: str, body: Mapping[str, Any], timeout: float = 60.0) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.loads(answer.read())

    def workers(self) -> list[int]:
        """The processes that hold the model, by rank."""
        found = []
        for child in descendants(self.process.pid):
            try:
                title = (
                    Path(f"/proc/{child}/cmdline")
                    .read_bytes()
                    .replace(b"\0", b" ")
                    .decode(errors="replace")
                )
            except OSError:
                continue
            if "Worker" in title:
                found.append((title, child))
        return [pid for _, pid in sorted(found)]

    def stop(self) -> None:
        if self.alive():
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._guard.dismiss()
        self._stream.close()


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    try:
        children = [
            int(c)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for c in (task / "children").read_text().split()
        ]
    except OSError:
        return found
    for child in children:
        found += [child, *descendants(child)]
    return found
