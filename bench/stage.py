"""How fast a checkpoint becomes an image: from files that are in no cache to sealed, verified
memory.

The floor is measured in the same run, in turn with ours, because disks and neighbours have moods:
direct reads of the same files into memory that is thrown away, by ``fio`` where it is installed,
else by plain ``preadv``, with as many readers and reads as large as ours. What we do beyond that
(BLAKE3 of every byte, a copy, fresh pages, the table, the seals) is what the ratio shows. One round
of each goes ahead uncounted: memory that a virtual machine touches for the first time measures its
hypervisor.

    python bench/stage.py [--gigabytes 2] [--rounds 5] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import count
from pathlib import Path

from hotweights_planner.manifest import FILE_NAME, Manifest, parse
from hotweights_storage.image import ImageBuilder
from hotweights_storage.reader import SPAN_NBYTES, default_workers
from hotweights_storage.resolve import publish
from hotweights_storage.sources.file import open_folder
from hotweights_storage.stage import stage_from_source

SHARD_NBYTES = 512 << 20
TENSOR_NBYTES = (24 << 20) + 512  # whole chunks and a small rest, as in life


def write_checkpoint(folder: Path, nbytes: int) -> Manifest:
    """Shards of random bytes, written once and kept, with their manifest."""
    manifest_path = folder / FILE_NAME
    if manifest_path.exists():
        return parse(manifest_path.read_bytes())
    folder.mkdir(parents=True, exist_ok=True)
    numbers = count()
    shards = -(-nbytes // SHARD_NBYTES)
    for shard in range(1, shards + 1):
        size = min(SHARD_NBYTES, nbytes - (shard - 1) * SHARD_NBYTES)
        path = folder / f"model-{shard:05}-of-{shards:05}.safetensors"
        print(f"writing {path}", file=sys.stderr)
        _write_shard(
            path,
            [f"model.layers.{next(numbers)}.weight" for _ in range(-(-size // TENSOR_NBYTES))],
            size,
        )
    with open_folder(folder) as source:
        manifest = publish(source, "bench", "v0")
    manifest_path.write_bytes(manifest.canonical)
    return manifest


def _write_shard(path: Path, names: list[str], nbytes: int) -> None:
    fields = {}
    for index, name in enumerate(names):
        begin, end = index * TENSOR_NBYTES, min((index + 1) * TENSOR_NBYTES, nbytes)
        fields[name] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
    header = json.dumps(fields).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for begin in range(0, nbytes, 16 << 20):
            file.write(os.urandom(min(16 << 20, nbytes - begin)))
        file.flush()
        os.fsync(file.fileno())


def drop_cache(folder: Path) -> None:
    """Let go of the cached pages of every file, without being root."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def ours_seconds(folder: Path, manifest: Manifest, workers: int) -> float:
    """From nothing to the sealed image."""
    began = time.perf_counter()
    with open_folder(folder) as source, ImageBuilder(manifest) as builder:
        stage_from_source(source, builder, workers=workers)
        image = builder.finish()
    seconds = time.perf_counter() - began
    image.close()
    return seconds


def preadv_seconds(files: list[Path], workers: int) -> float:
    """Direct reads by as many threads, each into one buffer of its own."""
    work = iter(
        [(path, offset) for path in files for offset in range(0, path.stat().st_size, SPAN_NBYTES)]
    )
    descriptors = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in files}
    lock = threading.Lock()

    def read() -> None:
        buffer = memoryview(mmap.mmap(-1, SPAN_NBYTES))
        while True:
            with lock:
                piece = next(work, None)
            if piece is None:
                return
            os.preadv(descriptors[piece[0]], [buffer], piece[1])

    threads = [threading.Thread(target=read) for _ in range(workers)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    for fd in descriptors.values():
        os.close(fd)
    return seconds


def fio_seconds(files: list[Path], workers: int) -> float:
    """The same by fio; its own clock, so that its start does not count."""
    command = [
        "fio", "--name=floor", "--rw=read", "--direct=1", f"--bs={SPAN_NBYTES}", "--ioengine=psync", "--thread",
        f"--numjobs={workers}", "--group_reporting", "--output-format=json", "--readonly",
        f"--filename={':'.join(str(path) for path in files)}", f"--offset_increment={100 // workers}%",
        f"--size={100 // workers}%",
    ]  # fmt: skip
    report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["jobs"][0][
        "read"
    ]
    nbytes = sum(path.stat().st_size for path in files)
    return nbytes / float(report["bw_bytes"])


def main() -> None:
    """Measure, print, and write what ``--json`` asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--gigabytes", type=float, default=2.0, help="size of the checkpoint (10^9 bytes)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often both are measured, in turn"
    )
    parser.add_argument(
        "--workers", type=int, default=default_workers(), help="readers, of ours and of the floor"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the checkpoint is kept (default: a folder in the temporary one)",
    )
    parser.add_argument("--json", type=Path, help="write the three figures here")
    options = parser.parse_args()
    nbytes = int(options.gigabytes * 10**9)
    folder = options.folder or Path(tempfile.gettempdir()) / f"hotweights-bench-{nbytes}"
    manifest = write_checkpoint(folder, nbytes)
    files = sorted(folder.glob("*.safetensors"))
    floor = fio_seconds if shutil.which("fio") else preadv_seconds
    ours_rates, floor_rates = [], []
    for number in range(options.rounds + 1):
        drop_cache(folder)
        floor_rate = nbytes / floor(files, options.workers)
        drop_cache(folder)
        ours_rate = nbytes / ours_seconds(folder, manifest, options.workers)
        rates = f"floor {floor_rate / 1e9:.2f} GB/s, ours {ours_rate / 1e9:.2f} GB/s"
        print(
            f"round {number or 'ahead'}: {rates}, ratio {ours_rate / floor_rate:.2f}",
            file=sys.stderr,
        )
        if number:
            floor_rates.append(floor_rate)
            ours_rates.append(ours_rate)
    ours, least = statistics.median(ours_rates), statistics.median(floor_rates)
    print(
        f"ours   {ours / 1e9:.2f} GB/s (median of {options.rounds}; {nbytes} bytes, verified, "
        "sealed)"
    )
    print(
        f"floor  {least / 1e9:.2f} GB/s ({floor.__name__.removesuffix('_seconds')}, "
        f"{options.workers} readers)"
    )
    print(f"ratio  {ours / least:.2f}")
    if options.json:
        figures = {
            "ours_bytes_per_second": ours,
            "floor_bytes_per_second": least,
            "ratio": ours / least,
        }
        options.json.write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
