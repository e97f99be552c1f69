"""How long preparing and committing a version takes on a GPU, beside the floor and vLLM's own way.

    python bench/commit.py [--gb 8] [--rounds 3] [--json FILE]

One real vLLM with CUDA graphs serves v0, is given v1 and v0 in turn by the agent's own handoff, and
then reloads the same folders by vLLM's own endpoints (``/pause``, ``reload_weights``, ``/resume``).
The floor of a pause is a copy of as many bytes within the card; that of preparing is a copy from
page-locked memory; both are measured in the same run. Rows: ``what, way, changed, seconds,
floor_seconds, ratio, bytes``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import localvllm
from bench.pause import theirs
from e2e.engine import images
from e2e.engine.conftest import Engine
from e2e.engine.launch import FULL_GRAPHS, GPU
from e2e.harness.traffic import Traffic
from hotweights_transports.handoff import frames
from localvllm import build, models

HIDDEN = 4096
LAYER_NBYTES = 302 << 20  # of a layer this wide, in bfloat16
FLOORS = """
import json, sys, torch
nbytes = int(sys.argv[1])
def seconds(work):
    times = []
    for _ in range(6):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(); work(); end.record(); end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times[1:])[2]
one = torch.empty(nbytes, dtype=torch.uint8, device="cuda"); two = torch.empty_like(one)
part = min(nbytes, 1 << 30)
host = torch.empty(part, dtype=torch.uint8).pin_memory()
plain = torch.ones(part, dtype=torch.uint8)
print(json.dumps({
    "card": torch.cuda.get_device_name(), "device_copy": seconds(lambda: two.copy_(one)),
    "pinned_copy": seconds(lambda: one[:part].copy_(host, non_blocking=True)) * nbytes / part,
    "pageable_copy": seconds(lambda: one[:part].copy_(plain)) * nbytes / part,
}))
"""


def checkpoints(gb: float) -> list[models.Model]:
    """Two versions of one model, made once."""
    layers = max(1, round(gb * 1e9 / LAYER_NBYTES))
    folder = build.cache() / "models" / f"commit-{layers}"
    made = [
        models.Model(folder / f"v{seed}", "llama", seed, 1, "bfloat16", layers, HIDDEN)
        for seed in (0, 1)
    ]
    _timed("writing models", lambda: models.make_models(made))
    return made


def measure(gb: float, rounds: int) -> dict[str, Any]:
    """All rows, and what was measured on."""
    made = checkpoints(gb)
    nbytes = sum(file.stat().st_size for file in made[0].dir.glob("*.safetensors"))
    floors = json.loads(
        subprocess.run(
            [str(localvllm.python()), "-c", FLOORS, str(nbytes)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    print(floors, nbytes, flush=True)
    rows: list[dict[str, Any]] = []

    def row(what: str, way: str, seconds: float, floor: float) -> None:
        rows.append(
            {
                "what": what,
                "way": way,
                "changed": 1.0,
                "seconds": seconds,
                "floor_seconds": floor,
                "ratio": seconds / floor,
                "bytes": nbytes,
            }
        )
        print(rows[-1], flush=True)

    began = time.monotonic()
    versions = [images.stage(model.dir, model.dir.name) for model in made]
    row("publish and stage", "file", (time.monotonic() - began) / 2, floors["pinned_copy"])
    arguments = (
        *("--dtype", "bfloat16", "--gpu-memory-utilization", "0.4", "--max-num-seqs", "8"),
        *("--compilation-config", json.dumps(FULL_GRAPHS)),
    )
    with tempfile.TemporaryDirectory() as scratch:
        engine = Engine(
            made[0].dir,
            Path(scratch) / "engine",
            "keep",
            arguments,
            1,
            VLLM_SERVER_DEV_MODE="1",
            **GPU,
        )
        try:
            row("restart", "vllm", engine.vllm.ready(240), floors["pinned_copy"])
            engine.connected()
            print("memory", _memory(), flush=True)
            for number in range(rounds):
                before = engine.vllm.greedy()
                version = versions[(number + 1) % 2]
                with Traffic([engine.vllm.address], plain=1, streams=2, max_tokens=100) as traffic:
                    time.sleep(1.5)
                    began = time.monotonic()
                    print(engine.agent.prepare(version), "memory", _memory(), flush=True)
                    prepared = time.monotonic()
                    row("prepare", "Beside", prepared - began, floors["pinned_copy"])
                    answer = engine.agent.commit(version.digest)
                    committed = time.monotonic()
                    time.sleep(1.5)
                print(
                    f"worst gap between two tokens: {traffic.worst_gap(0, began):.4f} s before, "
                    f"{traffic.worst_gap(began, prepared):.4f} while preparing, "
                    f"{traffic.worst_gap(prepared, committed + 0.1):.4f} around the commit, "
                    f"{traffic.worst_gap(committed + 0.1):.4f} after it; {traffic.requests} "
                    f"requests, failed {traffic.failures}; memory {_memory()}",
                    flush=True,
                )
                if not isinstance(answer, frames.Committed):
                    raise SystemExit(f"the commit failed: {answer}")
                print(answer, flush=True)
                row("pause", "Beside", answer.pause_seconds, floors["device_copy"])
                if engine.vllm.greedy() == before:
                    raise SystemExit("it still serves what it did")
            for number in range(2):
                seconds = theirs(engine.vllm.url, made[number].dir)
                row("pause", "reload_weights", seconds, floors["device_copy"])
        except BaseException:
            print(engine.vllm.tail(), flush=True)
            raise
        finally:
            engine.stop()
    return {"card": floors["card"], "floors": floors, "rows": rows}


def _memory() -> str:
    """MiB in use on the card."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader"]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()


def _timed(what: str, work: Any) -> None:
    began = time.monotonic()
    work()
    print(f"{what}: {time.monotonic() - began:.1f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-models", action="store_true", help="write the models and end")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.only_models:
        checkpoints(arguments.gb)
        return 0
    found = measure(arguments.gb, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    table = Table("what", "way", "seconds", "floor", "ratio", title=found["card"])
    for item in found["rows"]:
        table.add_row(
            item["what"],
            item["way"],
            f"{item['seconds']:.3f}",
            f"{item['floor_seconds']:.3f}",
            f"{item['ratio']:.2f}",
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
