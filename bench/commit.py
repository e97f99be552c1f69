"""How long preparing and committing a version takes, by how much of it changed and by the way in
which it waits, beside the floor, vLLM's own way and a restart.

    python bench/commit.py [--gb 8] [--changed 0.001,0.01,0.1,1] [--ways Beside,Host,InPause]
        [--rounds 3] [--no-restart] [--json FILE]

One real vLLM serves v0 under traffic, on a GPU with CUDA graphs or, where there is none, on the
CPU. It is given versions that differ from v0 in a share of their weights, and v0 again after each,
by the agent's own handoff; then it reloads whole folders by vLLM's own endpoints (``/pause``,
``reload_weights``, ``/resume``), and is ended and started anew until it answers. A way that the
rank refuses, as ``Host`` on a CPU, is a row with its words and without seconds.

The floor of a pause is a copy of as many changed bytes within the device; that of preparing is a
copy of them onto it from page-locked memory. All in one run. Rows: ``what, way, changed, seconds,
floor_seconds, ratio, bytes``, of which ``changed`` is the share of the weights' bytes and ``bytes``
what differs. A ``pause`` is also taken apart: ``stop`` (the scheduler), ``copy`` (and loading, where
it is InPause), ``probe``, ``resume``; of these only the copy has a floor.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.commit_figures import Rows, claims, floors, kinds, processor, show
from bench.pause import theirs
from e2e.engine import images
from e2e.engine.conftest import Engine
from e2e.engine.launch import FULL_GRAPHS, GPU
from e2e.harness.traffic import Traffic
from hotweights_storage.image import Image
from hotweights_transports.handoff import frames
from localvllm import build, models

HIDDEN = {"cuda": 4096, "cpu": 1024}  # on a CPU, so that a GB has layers enough for small shares
WAYS = ("Beside", "Host", "InPause")
LOADING_SECONDS = 100.0  # that a pause may take in which a version is loaded
STEPS = {"pause": "stop", "copy": "copy", "probe": "probe", "resume": "resume"}
"""What a commit's answer calls the parts of a pause, and what the rows do."""
PROMPT = tuple(range(30, 70))


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


@dataclass(slots=True)
class Bench:
    """One engine, and what is measured of it."""

    engine: Engine
    rows: Rows
    device: str
    answers: dict[str, list[list[int]]] = field(default_factory=dict)
    """Of each version that was served: its greedy tokens."""
    failures: list[str] = field(default_factory=list)

    def swap(self, version: Image, changed: int, way: str = "") -> bool:
        """Prepare and commit it under traffic; False where the rank refuses that way. Raises
        SystemExit where a commit fails or changes nothing.
        """
        agent, vllm = self.engine.agent, self.engine.vllm
        wish: dict[str, Any] = {"memory": way or "Auto"}
        if way == "InPause":
            wish["max_pause_seconds"] = LOADING_SECONDS
        before = vllm.greedy()
        with self._traffic() as traffic:
            time.sleep(1.5)
            began = time.monotonic()
            (prepared,) = agent.prepare(images.handed(version), 600.0, **wish)
            done = time.monotonic()
            if not isinstance(prepared, frames.Prepared):
                note = getattr(prepared, "message", str(prepared))
                self.rows.add("prepare", way, None, changed, "pinned_copy", note)
                return False
            self.rows.add("prepare", prepared.way, done - began, changed, "pinned_copy")
            answer = agent.commit(version.manifest.digest, deadline_seconds=LOADING_SECONDS)
            committed = time.monotonic()
            time.sleep(1.5)
        print(
            f"worst gap between two tokens: {traffic.worst_gap(0, began):.4f} s before, "
            f"{traffic.worst_gap(began, done):.4f} while preparing, "
            f"{traffic.worst_gap(done, committed + 0.1):.4f} around the commit, "
            f"{traffic.worst_gap(committed + 0.1):.4f} after it; {traffic.requests} "
            f"requests, failed {traffic.failures}; memory {_memory(self.device)}",
            flush=True,
        )
        if not isinstance(answer, frames.Committed):
            raise SystemExit(f"the commit failed: {answer}")
        self.rows.add("pause", prepared.way, answer.pause_seconds, changed, "device_copy")
        for step, seconds in answer.timings.items():
            floor = "device_copy" if step == "copy" else ""
            self.rows.add(STEPS.get(step, step), prepared.way, seconds, changed, floor)
        self.answers[version.manifest.digest] = vllm.greedy()
        if self.answers[version.manifest.digest] == before:
            raise SystemExit("it still serves what it did")
        return True

    def reload(self, folder: Path, digest: str) -> None:
        """vLLM's own way to what ours brought before, under the same traffic."""
        with self._traffic():
            time.sleep(1.5)
            seconds = theirs(self.engine.vllm.url, folder)
        same = self.engine.vllm.greedy() == self.answers[digest]
        note = "" if same else "other answers than after our commit of the same version"
        self.rows.add("pause", "reload_weights", seconds, self.rows.nbytes, "device_copy", note)

    @contextmanager
    def _traffic(self) -> Iterator[Traffic]:
        with Traffic([self.engine.vllm.address], plain=1, streams=2, max_tokens=100) as traffic:
            yield traffic
        self.failures += traffic.failures


def measure(
    gb: float, shares: list[float], ways: list[str], rounds: int, device: str, *, restart: bool
) -> dict[str, Any]:
    """All rows, and what was measured on."""
    made = checkpoints(gb, device)
    began = time.monotonic()
    old, new = (images.stage(model.dir, model.dir.name) for model in made)
    staged = (time.monotonic() - began) / 2
    nbytes = old.manifest.nbytes
    rows = Rows(floors(device, nbytes), nbytes)
    print(rows.floors, nbytes, flush=True)
    rows.add("publish and stage", "file", staged, nbytes, "pinned_copy")
    with tempfile.TemporaryDirectory() as scratch:

        def start(name: str) -> Engine:
            return _engine(made[0].dir, Path(scratch) / name, device)

        engine = start("engine")
        bench = Bench(engine, rows, device)
        try:
            rows.add("start", "vllm", engine.vllm.ready(600), nbytes, "pinned_copy")
            engine.connected()
            print("memory", _memory(device), flush=True)
            # what an engine booted from has no name; from here on every version is a change of one
            for version in (new, old):
                bench.swap(version, nbytes)
            for way in ways:
                for changed, version in changes(old, new, shares):
                    for _ in range(rounds):
                        if bench.swap(version, changed, way):
                            bench.swap(old, changed, way)
            for number, version in ((1, new), (0, old)):
                bench.reload(made[number].dir, version.manifest.digest)
            if restart:
                began = time.monotonic()
                engine.stop()
                engine = start("again")
                engine.vllm.ready(600)
                engine.vllm.complete(PROMPT, 1)
                rows.add("restart", "vllm", time.monotonic() - began, nbytes, "pinned_copy")
        except BaseException:
            print(engine.vllm.tail(), flush=True)
            raise
        finally:
            engine.stop()
    return {
        "device": rows.floors["card"] or processor(),
        "floors": rows.floors,
        "rows": rows.rows,
        "failures": bench.failures,
    }


def _engine(model: Path, folder: Path, device: str) -> Engine:
    arguments = ["--dtype", "bfloat16", "--max-num-seqs", "8"]
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    if device == "cuda":
        arguments += ["--gpu-memory-utilization", "0.4"]
        arguments += ["--compilation-config", json.dumps(FULL_GRAPHS)]
        environment |= GPU
    return Engine(model, folder, "keep", arguments, 1, **environment)


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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=8.0)
    parser.add_argument("--changed", default="0.001,0.01,0.1,1", metavar="SHARES")
    parser.add_argument("--ways", default=",".join(WAYS), metavar="WAYS")
    parser.add_argument("--rounds", type=int, default=3, help="there and back again, of each share")
    parser.add_argument("--restart", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only-models", action="store_true", help="write the models and end")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else vLLM would outlive this
    shares = [float(share) for share in arguments.changed.split(",")]
    ways = arguments.ways.split(",")
    if unknown := set(ways) - set(WAYS):
        parser.error(f"--ways: {', '.join(sorted(unknown))} is none of {', '.join(WAYS)}")
    device = _device()
    if arguments.only_models:
        checkpoints(arguments.gb, device)
        return 0
    found = measure(arguments.gb, shares, ways, arguments.rounds, device, restart=arguments.restart)
    measured = kinds(found["rows"])
    expected = claims(measured)
    found["claims"] = [{**asdict(claim), "held": claim.held} for claim in expected]
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    show(found["device"], measured, expected)
    for failure in found["failures"]:
        print(f"a request failed: {failure}")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
