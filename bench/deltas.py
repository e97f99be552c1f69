"""What a node and its engine come to hold when version follows version, each with some chunks
changed, anywhere.

    python bench/deltas.py [--versions 2000] [--chunks 1024] [--share 0.1] [--json FILE]
                           [--picture FILE.svg]

A real `Store` keeps the current version and the one before it, as an agent does; another process
maps each with the plugin's own code, the next one beside the current one, as an engine does. The
model is small, and its slabs and the mappings that it may take are small in proportion, as if it
had 100 GiB. All figures are the kernel's: pages of all memfds that either process has open or maps, mappings, descriptors and RSS.
*Needed* is what the distinct chunks of the two versions take. The first of them once more without
compacting show what it is for. *Between* is while three versions are here: the engine maps the old
and the new one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import socket
import statistics
import sys
import time
from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

from blake3 import blake3

from bench.curves import Curve, Panel, draw
from hotweights.adapters.vllm.rank.image import Image as MappedImage
from hotweights_agent.staging import compacting
from hotweights_agent.staging.store import Store
from hotweights_planner.compaction import MAX_MAPPINGS, Compaction, Limits
from hotweights_planner.header import TensorEntry
from hotweights_planner.manifest import Manifest, build

CHUNK_NBYTES = 16 << 10
CHUNKS_PER_TENSOR = 8
SLABS = 100  # as a model of 100 GiB has, and so many chunks of 4 MiB:
CHUNKS = 25_600
PROMISED = 1.25
WITHOUT = 300  # versions; it has long reached what it comes to
MIB = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """What was there once a version was served. Memory in bytes."""

    needed: int
    held: int
    between: int
    """Before the engine let go of the version before."""
    mappings: int
    """Of the engine's process while it maps both versions, for slabs alone."""
    descriptors: int
    """Of the agent's process."""
    agent_rss: int
    engine_rss: int
    """Without the slabs' pages, which count as held."""
    stage_seconds: float


class Versions:
    """A model whose chunks change."""

    def __init__(self, chunks: int, share: float) -> None:
        self._rng = random.Random(1)
        self._changed = max(1, round(chunks * share))
        self.content = [self._rng.randbytes(CHUNK_NBYTES) for _ in range(chunks)]
        self.digests = [blake3(piece).hexdigest() for piece in self.content]

    def change(self) -> None:
        """The next version."""
        for at in self._rng.sample(range(len(self.content)), self._changed):
            self.content[at] = self._rng.randbytes(CHUNK_NBYTES)
            self.digests[at] = blake3(self.content[at]).hexdigest()

    def manifest(self, version: str) -> Manifest:
        """The version as it is now."""
        entries, chunks, offset = [], {}, 0
        for at in range(0, len(self.digests), CHUNKS_PER_TENSOR):
            digests = self.digests[at : at + CHUNKS_PER_TENSOR]
            nbytes = len(digests) * CHUNK_NBYTES
            name = f"model.layers.{at // CHUNKS_PER_TENSOR}.weight"
            entries.append(TensorEntry(name, "U8", (nbytes,), nbytes, offset))
            chunks[name] = digests
            offset += nbytes
        return build("m", version, {"m.safetensors": entries}, chunks, chunk_nbytes=CHUNK_NBYTES)


class Engine:
    """A process that maps what it is given, and lets go of what it had when it is told to."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket = ours
        self._pipe, other = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_engine, args=(theirs, other), daemon=True)
        self._process.start()
        self.pid = self._process.pid or 0

    def prepare(self, fds: tuple[int, ...], digest: str) -> None:
        """Map it, beside what it serves."""
        pieces = [fds[at : at + 250] for at in range(0, len(fds), 250)]
        self._pipe.send((digest, len(pieces)))
        for piece in pieces:
            socket.send_fds(self._socket, [b"x"], piece)
            self._answered()

    def commit(self) -> None:
        """Let go of what it served before."""
        self._pipe.send(None)
        self._answered()

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._socket.close()
        self._pipe.close()

    def _answered(self) -> None:
        if not self._pipe.poll(60):
            raise SystemExit("the engine's process does not answer")
        self._pipe.recv()


def _engine(channel: socket.socket, pipe: Connection) -> None:
    images: list[MappedImage] = []
    while True:
        message = pipe.recv()
        if message is None:
            del images[:-1]
            pipe.send(None)
            continue
        digest, pieces = message
        fds: list[int] = []
        for piece in range(pieces):
            fds += socket.recv_fds(channel, 1, 250)[1]
            if piece == pieces - 1:
                images.append(MappedImage.open(fds, digest))
                for fd in fds:
                    os.close(fd)
            pipe.send(None)


def slabs_of(pid: int) -> tuple[int, int]:
    """Pages of every slab that this process has open or ``pid`` maps, in bytes, each once; and how
    many mappings of slabs ``pid`` has.
    """
    found: dict[int, int] = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            if "hotweights-slab" in str(link.readlink()):
                status = link.stat()
                found[status.st_ino] = status.st_blocks * 512
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    mappings = 0
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "hotweights-slab" in line:
            mappings += 1
            address, _, _, _, inode, *_ = line.split()
            if int(inode) not in found:
                nbytes = Path(f"/proc/{pid}/map_files/{address}").stat().st_blocks * 512
                found[int(inode)] = nbytes
    return sum(found.values()), mappings


def rss_of(pid: int) -> int:
    """Memory of the process itself, in bytes: without what it shares by memfds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/{pid}/status does not say RssAnon")


@contextmanager
def compacting_off() -> Iterator[None]:
    """Known chunks stay where they are, whatever that costs."""

    def stay(_manifest: object, known: list[dict], *_: object) -> Compaction:  # type: ignore[type-arg]
        return Compaction(ChainMap(*map(dict, known)), {}, frozenset(), 0)

    with mock.patch.object(compacting, "compact", stay):
        yield


def measure(versions: int, chunks: int, share: float) -> list[Row]:
    """One row for each version from the second on."""
    slab_nbytes = max(1, chunks // SLABS) * CHUNK_NBYTES
    model, engine, store, rows = Versions(chunks, share), Engine(), Store(), list[Row]()
    own, staged = os.getpid(), list[Manifest]()
    try:
        limits = partial(Limits, max_mappings=round(MAX_MAPPINGS * chunks / CHUNKS))
        with (
            mock.patch.object(compacting, "MAX_SLAB_NBYTES", slab_nbytes),
            mock.patch.object(compacting, "Limits", limits),
        ):
            for number in range(versions):
                if number:
                    model.change()
                staged.append(model.manifest(f"v{number}"))
                for old in staged[:-2]:  # the one before the last, in the turn that asks for more
                    store.release(old.digest)
                del staged[:-2]
                seconds = stage(
                    store, staged[-1], dict(zip(model.digests, model.content, strict=True))
                )
                with store.image(staged[-1].digest) as image:
                    engine.prepare(image.fds, staged[-1].digest)
                between, mappings = slabs_of(engine.pid)
                engine.commit()
                store.settle()
                digests = {d for m in staged for tensor in m.tensors for d in tensor.chunks}
                if number:
                    rows.append(
                        Row(
                            len(digests) * CHUNK_NBYTES,
                            slabs_of(engine.pid)[0],
                            between,
                            mappings,
                            len(os.listdir("/proc/self/fd")),  # noqa: PTH208
                            rss_of(own),
                            rss_of(engine.pid),
                            seconds,
                        )
                    )
    finally:
        engine.close()
        for old in staged:
            store.release(old.digest)
        store.settle()
    return rows


def stage(store: Store, manifest: Manifest, content: dict[str, bytes]) -> float:
    """Bring a version into the store; how long that took, in seconds."""
    began = time.monotonic()
    with store.begin(manifest) as staging:
        for digest in staging.builder.missing:
            staging.builder.put(digest, content[digest])
        staging.commit()
    return time.monotonic() - began


def picture(ours: list[Row], without: list[Row], caption: str) -> str:
    """Memory, mappings and descriptors, and the processes' own memory."""
    count = len(ours)
    return draw(
        [
            Panel(
                "slab memory, relative to what the two versions need",
                [
                    Curve("held", [row.held / row.needed for row in ours]),
                    Curve("without compacting", [row.held / row.needed for row in without]),
                ],
                PROMISED,
                f"promised: {PROMISED}",
            ),
            Panel(
                "mappings of an engine that maps two versions",
                [
                    Curve("mappings", [row.mappings for row in ours]),
                    Curve("without compacting", [row.mappings for row in without]),
                ],
            ),
            Panel("the agent's descriptors", [Curve("descriptors", [r.descriptors for r in ours])]),
            Panel(
                "own memory of the processes (RssAnon), MiB",
                [
                    Curve("agent", [row.agent_rss / MIB for row in ours]),
                    Curve("engine", [row.engine_rss / MIB for row in ours]),
                ],
            ),
        ],
        count + 1,  # the first version has none before it
        caption,
    )


def summary(rows: list[Row]) -> dict[str, float]:
    """What the rows come to."""
    last = rows[-1]
    return {
        "versions": len(rows),
        "held_worst": round(max(row.held / row.needed for row in rows), 3),
        "held_median": round(statistics.median(row.held / row.needed for row in rows), 3),
        "between_worst": round(max(row.between / row.needed for row in rows), 3),
        "mappings_most": max(row.mappings for row in rows),
        "descriptors_most": max(row.descriptors for row in rows),
        "agent_rss_mib_early": round(rows[len(rows) // 10].agent_rss / MIB, 1),
        "agent_rss_mib_last": round(last.agent_rss / MIB, 1),
        "engine_rss_mib_last": round(last.engine_rss / MIB, 1),
        "stage_seconds_median": round(statistics.median(r.stage_seconds for r in rows), 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", type=int, default=2000)
    parser.add_argument("--chunks", type=int, default=1024)
    parser.add_argument("--share", type=float, default=0.1, help="of the chunks, changed each time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    found = {}
    found["compacting"] = measure(arguments.versions, arguments.chunks, arguments.share)
    with compacting_off():
        count = min(WITHOUT, arguments.versions)
        found["without"] = measure(count, arguments.chunks, arguments.share)
    for name, rows in found.items():
        print(name, json.dumps(summary(rows)), flush=True)
    if arguments.json:
        body = {
            name: {"summary": summary(rows), "rows": [dataclasses.asdict(row) for row in rows]}
            for name, rows in found.items()
        }
        arguments.json.write_text(json.dumps(body) + "\n")
    if arguments.picture:
        caption = (
            f"{arguments.versions:,} versions of {arguments.chunks:,} chunks, "
            f"{arguments.share:.0%} of them changed each time; the worst of each step is drawn"
        )
        arguments.picture.write_text(picture(found["compacting"], found["without"], caption))
    worst = max(row.held / row.needed for row in found["compacting"])
    return 0 if worst <= PROMISED else 1


if __name__ == "__main__":
    sys.exit(main())
