"""What a broadcast of a plan costs beyond MPI itself: two or more ranks on this host, from a source
in the page cache into verified images.

The floor is measured in the same run, in turn with ours: a plain ``Bcast`` by mpi4py under mpiexec,
buckets of the same size between buffers that exist already, with nothing read, hashed or stored.
All ranks share this host's cores, so the ratio says what the processors do, not what a network
would carry.

    python bench/mpi.py [--gigabytes 1] [--ranks 2] [--rounds 3] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from hotweights_planner.buckets import DEFAULT_BUCKET_NBYTES
from hotweights_planner.header import PREFIX_NBYTES
from hotweights_planner.plan import Plan, build
from hotweights_storage.resolve import publish
from hotweights_storage.sources.file import open_folder
from hotweights_transports.broadcast.hydra import SETTINGS, find

TENSOR_NBYTES = 24 << 20
LIMIT_SECONDS = 300

PLAIN = """
import sys, time
from mpi4py import MPI
nbytes, count = int(sys.argv[1]), int(sys.argv[2])
world = MPI.COMM_WORLD
buffer = bytearray(bytes([1]) * nbytes)
world.Bcast(buffer)
world.Barrier()
began = time.monotonic()
for _ in range(count):
    world.Bcast(buffer)
world.Barrier()
if world.rank == 0:
    print(nbytes * count / (time.monotonic() - began) / 1e9)
"""


def write_plan(folder: Path, nbytes: int) -> Plan:
    """A checkpoint of random bytes, and the plan from nothing to it."""
    count = max(1, nbytes // TENSOR_NBYTES)
    header = {
        f"model.layers.{number}.w": {
            "dtype": "U8",
            "shape": [TENSOR_NBYTES],
            "data_offsets": [number * TENSOR_NBYTES, (number + 1) * TENSOR_NBYTES],
        }
        for number in range(count)
    }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(PREFIX_NBYTES, "little") + text)
        for _ in range(count):
            file.write(os.urandom(TENSOR_NBYTES))
    (folder / "config.json").write_text("{}")
    with open_folder(folder) as source:
        return build(publish(source, "bench", "v1"), None, source.uri)


def plain(ranks: int, plan: Plan) -> float:
    """GB/s of Bcast alone."""
    settings = [
        word
        for name, value in SETTINGS.items()
        for word in ("-genv", name.replace("IBCAST", "BCAST"), value)
    ]
    settings[2] = "pipelined_tree"  # what Ibcast calls tsp_tree
    sizes = [str(DEFAULT_BUCKET_NBYTES), str(max(1, plan.total_nbytes // DEFAULT_BUCKET_NBYTES))]
    arguments = [find().mpiexec, *settings, "-n", str(ranks), sys.executable, "-c", PLAIN, *sizes]
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=True, timeout=LIMIT_SECONDS
    )
    return float(done.stdout)


def broadcast(ranks: int, plan_file: Path, folder: Path) -> float:
    """GB/s of the slowest rank of a replication."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    hotweights = str(Path(sys.executable).parent / "hotweights")
    command = [
        hotweights,
        "replicate",
        "--plan",
        str(plan_file),
        "--mpi",
        "--window",
        "3",
        "--json",
    ]
    command += ["--root", str(folder), "--metrics-port", "0"]
    running = [
        subprocess.Popen(
            [*command, "--home", str(plan_file.parent / f"home.{rank}")],
            env=dict(os.environ)
            | {"WORLD_SIZE": str(ranks), "RANK": str(rank), "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    found = [json.loads(process.communicate(timeout=LIMIT_SECONDS)[0]) for process in running]
    for result in found:
        if "error" in result:
            raise SystemExit(result["error"]["message"])
    return min(float(result["nbytes"]) / float(result["seconds"]) for result in found) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="where to write the checkpoint (default: a temporary one)",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name) / "checkpoint"
        folder.mkdir()
        plan = write_plan(folder, int(arguments.gigabytes * 1e9))
        plan_file = Path(name) / "plan.json"
        plan_file.write_bytes(plan.text())
        floors, ours = [], []
        for number in range(arguments.rounds):
            floors.append(plain(arguments.ranks, plan))
            ours.append(rate := broadcast(arguments.ranks, plan_file, folder))
            print(
                f"round {number + 1}: plain Bcast {floors[-1]:.2f} GB/s, replicated and "
                f"verified {rate:.2f} GB/s",
                flush=True,
            )
        floor, rate = statistics.median(floors), statistics.median(ours)
        print(
            f"{arguments.ranks} ranks, {plan.total_nbytes / 1e9:.2f} GB: plain {floor:.2f}, ours "
            f"{rate:.2f} GB/s, ratio {rate / floor:.2f}"
        )


if __name__ == "__main__":
    main()
