"""What the tests of the seeds' adapters need: a coordinator in a process of its own, plans of
checkpoints, and a program with an engine.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import localvllm
from e2e.engine import images
from e2e.engine.images import Tensor
from hotweights_coordinator.client.client import Client
from hotweights_coordinator.wire.messages import CoordinatorError
from hotweights_planner import plan as plans
from hotweights_storage.resolve import publish
from hotweights_storage.sources.file import open_folder
from localvllm.guard import Guard
from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
INSIDE = Path(__file__).with_name("inside")
PACKAGES = (
    "common",
    "crds",
    "kube",
    "planner",
    "storage",
    "transports",
    "coordinator",
    "agent",
    "hack",
    ".",
)
ENGINE_SECONDS = 600.0


def environment(**values: str) -> dict[str, str]:
    """For a program that has Hotweights on its path and a small vLLM."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in PACKAGES),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_CI_ENV": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
        "HOTWEIGHTS_BINDER_METRICS_PORT": "0",
        **values,
    }


def run_inside(folder: Path, *arguments: str | Path) -> str:
    """What a program under vLLM's Python prints; its end is without an error."""
    command = [str(localvllm.python()), *map(str, arguments)]
    done = subprocess.run(
        command,
        env=environment(),
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, json.dumps(done.stdout)[-3000:] + done.stderr[-6000:]
    return done.stdout


def plan_of(folder: Path, version: str, model: str = "demo") -> plans.Plan:
    """The plan that brings a whole checkpoint."""
    with open_folder(folder) as source:
        return plans.build(publish(source, model, version), None, source.uri)


def rewritten(folder: Path, destination: Path, change: Callable[[Tensor], Tensor | None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    destination.mkdir()
    header, data = {}, b""
    for tensor in filter(None, map(change, images.read(folder))):
        span = [len(data), len(data) + len(tensor.data)]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": span}
        data += tensor.data
    text = json.dumps(header).encode()
    (destination / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return destination


class Operator:
    """Somebody who tells a coordinator what to do, and looks at what comes of it."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.client = Client(endpoint, "", timeout_seconds=30.0)

    def status(self, seconds: float = 60.0) -> dict[str, Any] | None:
        try:
            return self.client.call("status", timeout_seconds=seconds).result
        except CoordinatorError:
            return None

    def begin(self, plan: plans.Plan, **values: Any) -> int:
        self.client.call("submit_plan", binary=plan.canonical)
        return int(
            self.client.call("begin", version=plan.version, digest=plan.digest, **values).result[
                "token"
            ]
        )

    def commit(self, version: str) -> None:
        self.client.call("commit", version=version)

    def until(self, condition: Callable[[], Any], seconds: float = 120.0) -> Any:
        """What the condition gives once it is true."""
        deadline = time.monotonic() + seconds
        while not (result := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"not within {seconds} s; the coordinator says {json.dumps(self.status())}"
                )
            time.sleep(0.1)
        return result

    def until_state(self, state: str, seconds: float = 120.0) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            found = self.status()
            return found if found is not None and found["state"] == state else None

        result: dict[str, Any] = self.until(reached, seconds)
        return result

    def stop(self) -> None:
        self.client.close()


class Coordinator(Operator):
    """With a `hotweights coord-serve` of its own."""

    def __init__(self) -> None:
        port, _events, metrics = free_ports(3)
        super().__init__(f"tcp://127.0.0.1:{port}")
        command = [
            sys.executable,
            "-m",
            "hotweights.cli",
            "coord-serve",
            "--endpoint",
            self.endpoint,
        ]
        variables = {**os.environ, "HOTWEIGHTS_COORD_METRICS_PORT": str(metrics)}
        self.process = subprocess.Popen(command, env=variables, cwd=ROOT)
        try:
            self.until(lambda: self.status(5.0) is not None, 180.0)
        except TimeoutError:
            self.stop()
            raise

    def stop(self) -> None:
        super().stop()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


class Program:
    """`inside/drive.py`: a process with an engine, that answers prompts."""

    def __init__(self, folder: Path, asked: dict[str, Any], **values: str) -> None:
        self.log = folder / "program.log"
        self._stream = self.log.open("w")
        command = [str(localvllm.python()), str(INSIDE / "drive.py"), json.dumps(asked)]
        self.process = subprocess.Popen(
            command, env=environment(**values), cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._stream, text=True, start_new_session=True,
        )  # fmt: skip
        self._guard = Guard(self.process.pid)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self._lines.put(line)

    def line(self, seconds: float = ENGINE_SECONDS) -> dict[str, Any]:
        """The program's next word."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                result: dict[str, Any] = json.loads(self._lines.get(timeout=0.5))
                return result
            except queue.Empty:
                if self.process.poll() is not None and self._lines.empty():
                    raise RuntimeError(
                        f"it ended with {self.process.returncode}:\n{self.tail()}"
                    ) from None
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nothing within {seconds} s:\n{self.tail()}") from None

    def ask(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """Greedy tokens."""
        if self.process.stdin is None:
            raise RuntimeError("it takes no prompts")
        self.process.stdin.write(json.dumps({"prompt": list(prompt), "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return list(self.line(120.0)["tokens"])

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def stop(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        self._guard.dismiss()
        self._reader.join(30)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._stream.close()
