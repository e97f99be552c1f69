"""How long a running engine stands still for new weights, beside vLLM's own way of changing them in
place.

    python bench/pause.py [--layers 8] [--hidden 512] [--rounds 12] [--idle] [--json FILE]

Two real vLLM servers on the same checkpoints, each with a client that asks without end (``--idle``:
without), take turns. *Ours* is what a commit of a prepared version reports as its pause: running
requests kept, the copy, the caches, a probe of the new weights, and on. *vLLM's own* is what its
endpoints for reinforcement learning do: ``/pause?mode=keep``, ``reload_weights`` of the folder
through ``/collective_rpc``, ``/resume``; it has no probe, reads the files inside the pause, and is
timed from the first call to the last answer. The *floor* is a copy of as many bytes from memory to
memory, by one thread. What our preparing costs beside serving stands in its own line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from rich.console import Console
from rich.table import Table

from e2e.engine import images
from e2e.engine.conftest import Engine
from e2e.engine.launch import VLLM
from e2e.harness.traffic import Traffic
from hotweights_transports.handoff import frames
from localvllm import build, models

SETTLE_SECONDS = 1.0
PROMPT = tuple(range(30, 70))
THREADS: dict[str, Any] = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def checkpoints(layers: int, hidden: int) -> list[Path]:
    """Two versions of one model, made once."""
    folder = build.cache() / "models" / f"pause-{layers}-{hidden}"
    made = [
        models.Model(folder / f"v{seed}", "llama", seed, layers=layers, hidden=hidden)
        for seed in (0, 1)
    ]
    models.make_models(made)
    return [model.dir for model in made]


def theirs(url: str, checkpoint: Path) -> float:
    """Seconds that vLLM's own way takes."""
    began = time.monotonic()
    _post(f"{url}/pause?{urlencode({'mode': 'keep'})}", {})
    _post(
        f"{url}/collective_rpc",
        {"method": "reload_weights", "kwargs": {"weights_path": str(checkpoint)}, "timeout": 120},
    )
    _post(f"{url}/resume", {})
    return time.monotonic() - began


def _post(url: str, body: dict[str, Any]) -> None:
    # our own server
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=180) as answer:
        answer.read()


def copied(nbytes: int) -> float:
    """Seconds that a copy of so many bytes takes, with all pages there."""
    source, target = bytes(nbytes), bytearray(nbytes)
    target[:] = source
    began = time.monotonic()
    target[:] = source
    return time.monotonic() - began


def measure(layers: int, hidden: int, rounds: int, *, idle: bool) -> dict[str, Any]:
    """Everything, by turns."""
    paths = checkpoints(layers, hidden)
    versions = [images.build(images.read(path), version=path.name) for path in paths]
    nbytes = sum(file.stat().st_size for file in paths[0].glob("*.safetensors"))
    ours: list[float] = []
    own: list[float] = []
    prepared: list[float] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        mine = Engine(paths[0], Path(folder) / "ours", **THREADS)
        stack.callback(mine.stop)
        without = {**THREADS, "HOTWEIGHTS_SOCKET": "", "VLLM_SERVER_DEV_MODE": "1"}
        plain = VLLM(paths[0], Path(folder) / "own", Path(folder) / "nobody", environment=without)
        stack.callback(plain.stop)
        mine.ready()
        plain.ready()
        traffic = Traffic([mine.vllm.address, plain.address])
        if not idle:
            stack.enter_context(traffic)
        for number in range(rounds + 1):  # the first is for the caches of both
            before = [engine.complete(PROMPT, 8) for engine in (mine.vllm, plain)]
            version = (number + 1) % 2
            began = time.monotonic()
            mine.agent.prepare(versions[version])
            prepared.append(time.monotonic() - began)
            answer = mine.agent.commit(versions[version].digest)
            if not isinstance(answer, frames.Committed):
                raise SystemExit(f"the commit failed: {answer}")
            ours.append(answer.pause_seconds)
            time.sleep(SETTLE_SECONDS)
            own.append(theirs(plain.url, paths[version]))
            time.sleep(SETTLE_SECONDS)
            after = [engine.complete(PROMPT, 8) for engine in (mine.vllm, plain)]
            if any(new == old for new, old in zip(after, before, strict=True)):
                raise SystemExit(f"one of them still serves what it did: {before} became {after}")
    if not idle:
        if traffic.failures:
            raise SystemExit(f"{len(traffic.failures)} requests failed: {traffic.failures[:5]}")
        if not all(traffic.answered.values()):
            raise SystemExit(f"the clients were not answered: {traffic.answered}")
    floor = [copied(nbytes) for _ in range(5)]
    return {
        "bytes": nbytes,
        "ours_seconds": ours[1:],
        "vllm_seconds": own[1:],
        "prepare_seconds": prepared[1:],
        "floor_seconds": statistics.median(floor),
        "answered": 0 if idle else traffic.requests,
    }


def show(found: dict[str, Any]) -> None:
    """One line for each."""
    table = Table(
        "", "median", "worst", title=f"the pause for {found['bytes'] / 1e6:.0f} MB of weights"
    )
    for name, key in (
        ("ours, with a probe", "ours_seconds"),
        ("vLLM's own reload", "vllm_seconds"),
    ):
        table.add_row(
            name, f"{statistics.median(found[key]) * 1e3:.0f} ms", f"{max(found[key]) * 1e3:.0f} ms"
        )
    table.add_row("floor: one copy", f"{found['floor_seconds'] * 1e3:.1f} ms", "")
    table.add_row(
        "preparing, while it serves",
        f"{statistics.median(found['prepare_seconds']) * 1e3:.0f} ms",
        "",
    )
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--idle", action="store_true", help="without clients")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    found = measure(arguments.layers, arguments.hidden, arguments.rounds, idle=arguments.idle)
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
