"""How long preparing and committing a version takes, by how much of it changed, beside the floor
and vLLM's own way.

    python bench/commit.py [--gb 8] [--changed 0.001,0.01,0.1,1] [--rounds 3] [--json FILE]

One real vLLM serves v0 under traffic, on a GPU with CUDA graphs or, where there is none, on the
CPU. It is given versions that differ from v0 in a share of their weights, and v0 again after each,
by the agent's own handoff; then it reloads whole folders by vLLM's own endpoints (``/pause``,
``reload_weights``, ``/resume``). The floor of a pause is a copy of as many changed bytes within the
device; that of preparing is a copy of them onto it from page-locked memory. All in one run. Rows:
``what, way, changed, seconds, floor_seconds, ratio, bytes``, of which ``changed`` is the share of
the weights' bytes and ``bytes`` what differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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
from hotweights_storage.image import Image
from hotweights_transports.handoff import frames
from localvllm import build, models

HIDDEN = {"cuda": 4096, "cpu": 1024}  # on a CPU, so that a GB has layers enough for small shares
FLOORS = """
import json, sys, time, torch
device, nbytes = sys.argv[1], int(sys.argv[2])
def seconds(work):
    times = []
    for _ in range(6):
        if device == "cpu":
            begin = time.perf_counter(); work(); times.append(time.perf_counter() - begin)
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(); work(); end.record(); end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times[1:])[2]
torch.set_num_threads(1)
part = min(nbytes, 1 << 30)
one = torch.ones(part, dtype=torch.uint8, device=device); two = torch.ones_like(one)
host = torch.ones(part, dtype=torch.uint8)
host = host.pin_memory() if device == "cuda" else host
print(json.dumps({
    "device_copy": seconds(lambda: two.copy_(one)) / part,
    "pinned_copy": seconds(lambda: one.copy_(host, non_blocking=True)) / part,
    "card": torch.cuda.get_device_name() if device == "cuda" else "",
}))
"""


def checkpoints(gb: float, device: str) -> list[models.Model]:
    """Two versions of one model, made once."""
    hidden = HIDDEN[device]
    layer_nbytes = int((302 << 20) * (hidden / 4096) ** 2)  # in bfloat16
    layers = max(1, round(gb * 1e9 / layer_nbytes))
    # the name of the first ones, which machines may have
    name = f"commit-{layers}" if hidden == HIDDEN["cuda"] else f"commit-{hidden}-{layers}"
    folder = build.cache() / "models" / name
    made = [
        models.Model(folder / f"v{seed}", "llama", seed, 1, "bfloat16", layers, hidden)
        for seed in (0, 1)
    ]
    began = time.monotonic()
    models.make_models(made)
    print(f"writing models: {time.monotonic() - began:.1f} s", flush=True)
    return made


def changes(old: Image, new: Image, shares: list[float]) -> Iterator[tuple[int, Image]]:
    """Versions that differ from the old one in so large a part of its bytes, from the last layer
    on: the bytes that differ, and the version.
    """
    last = sorted(
        (tensor for tensor in old.manifest.tensors if ".layers." in tensor.name),
        key=lambda tensor: (int(tensor.name.split(".layers.")[1].split(".")[0]), tensor.nbytes),
        reverse=True,
    )
    for share in shares:
        nbytes, names = 0, set()
        for tensor in last if share < 1 else old.manifest.tensors:
            # the first one too, if it is not much too large
            if nbytes + tensor.nbytes <= 1.2 * share * old.manifest.nbytes or share >= 1:
                nbytes += tensor.nbytes
                names.add(tensor.name)
        yield nbytes, images.combine(old, new, names, f"changed-{share:g}")


class Rows:
    """What was measured; printed as it comes."""

    def __init__(self, floors: dict[str, Any], nbytes: int) -> None:
        self.floors, self.nbytes = floors, nbytes
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, way: str, seconds: float, floor: str, changed: int) -> None:
        """``changed``: bytes that differ; ``floor``: which copy of them."""
        least = self.floors[floor] * changed
        share = changed / self.nbytes
        self.rows.append(
            {"what": what, "way": way, "changed": share, "seconds": seconds}
            | {"floor_seconds": least, "ratio": seconds / least, "bytes": changed}
        )
        print(self.rows[-1], flush=True)


def swap(engine: Engine, rows: Rows, version: Image, changed: int, device: str) -> frames.Committed:
    """Prepare and commit it under traffic."""
    before = engine.vllm.greedy()
    with Traffic([engine.vllm.address], plain=1, streams=2, max_tokens=100) as traffic:
        time.sleep(1.5)
        began = time.monotonic()
        (prepared,) = engine.agent.prepare(images.handed(version))
        if not isinstance(prepared, frames.Prepared):
            raise SystemExit(f"it was refused: {prepared}")
        done = time.monotonic()
        rows.add("prepare", "Beside", done - began, "pinned_copy", changed)
        answer = engine.agent.commit(version.manifest.digest)
        committed = time.monotonic()
        time.sleep(1.5)
    print(
        f"worst gap between two tokens: {traffic.worst_gap(0, began):.4f} s before, "
        f"{traffic.worst_gap(began, done):.4f} while preparing, "
        f"{traffic.worst_gap(done, committed + 0.1):.4f} around the commit, "
        f"{traffic.worst_gap(committed + 0.1):.4f} after it; {traffic.requests} "
        f"requests, failed {traffic.failures}; memory {_memory(device)}",
        flush=True,
    )
    if not isinstance(answer, frames.Committed):
        raise SystemExit(f"the commit failed: {answer}")
    print(answer, flush=True)
    rows.add("pause", "Beside", answer.pause_seconds, "device_copy", changed)
    if engine.vllm.greedy() == before:
        raise SystemExit("it still serves what it did")
    return answer


def measure(gb: float, shares: list[float], rounds: int, device: str) -> dict[str, Any]:
    """All rows, and what was measured on."""
    made = checkpoints(gb, device)
    began = time.monotonic()
    old, new = (images.stage(model.dir, model.dir.name) for model in made)
    staged = (time.monotonic() - began) / 2
    nbytes = old.manifest.nbytes
    command = [str(localvllm.python()), "-c", FLOORS, device, str(nbytes)]
    # the last line: importing torch may say something before it
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = Rows(json.loads(said.splitlines()[-1]), nbytes)
    print(rows.floors, nbytes, flush=True)
    rows.add("publish and stage", "file", staged, "pinned_copy", nbytes)
    arguments = ["--dtype", "bfloat16", "--max-num-seqs", "8"]
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    if device == "cuda":
        arguments += ["--gpu-memory-utilization", "0.4"]
        arguments += ["--compilation-config", json.dumps(FULL_GRAPHS)]
        environment |= GPU
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "engine"
        engine = Engine(made[0].dir, folder, "keep", arguments, 1, **environment)
        try:
            rows.add("restart", "vllm", engine.vllm.ready(600), "pinned_copy", nbytes)
            engine.connected()
            print("memory", _memory(device), flush=True)
            # what an engine booted from has no name; from here on every version is a change of one
            for version in (new, old):
                swap(engine, rows, version, nbytes, device)
            for changed, version in changes(old, new, shares):
                for _ in range(rounds):
                    swap(engine, rows, version, changed, device)
                    swap(engine, rows, old, changed, device)
            for number in (1, 0):
                seconds = theirs(engine.vllm.url, made[number].dir)
                rows.add("pause", "reload_weights", seconds, "device_copy", nbytes)
        except BaseException:
            print(engine.vllm.tail(), flush=True)
            raise
        finally:
            engine.stop()
    return {"device": rows.floors["card"] or _cpu(), "floors": rows.floors, "rows": rows.rows}


def _memory(device: str) -> str:
    """In use on the card."""
    if device == "cpu":
        return "not looked at"
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader"]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()


def _device() -> str:
    try:
        subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return "cpu"
    return "cuda"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def show(found: dict[str, Any]) -> None:
    """The medians, one line for each kind of row."""
    table = Table("what", "way", "changed", "seconds", "floor", "ratio", title=found["device"])
    kinds = dict.fromkeys((row["what"], row["way"], row["changed"]) for row in found["rows"])
    for what, way, changed in kinds:
        of_kind = [
            row
            for row in found["rows"]
            if (row["what"], row["way"], row["changed"]) == (what, way, changed)
        ]
        seconds = statistics.median(row["seconds"] for row in of_kind)
        floor = of_kind[0]["floor_seconds"]
        table.add_row(
            what, way, f"{changed:.2%}", f"{seconds:.4f}", f"{floor:.4f}", f"{seconds / floor:.2f}"
        )
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=8.0)
    parser.add_argument("--changed", default="0.001,0.01,0.1,1", metavar="SHARES")
    parser.add_argument("--rounds", type=int, default=3, help="there and back again, of each share")
    parser.add_argument("--only-models", action="store_true", help="write the models and end")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    shares = [float(share) for share in arguments.changed.split(",")]
    device = _device()
    if arguments.only_models:
        checkpoints(arguments.gb, device)
        return 0
    found = measure(arguments.gb, shares, arguments.rounds, device)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
