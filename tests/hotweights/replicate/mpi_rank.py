"""One rank of a test, a program: replicates a plan over MPI and prints its image's digest and what
it measured.

Usage: ``mpi_rank.py PLAN [GATE] [HIDE_SOURCE]`` with WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

from blake3 import blake3

from hotweights.replicate.mpi import replicator
from hotweights.replicate.world import World
from hotweights_planner.plan import parse
from hotweights_storage.errors import SourceRefused, SourceUnavailable, TransferError
from hotweights_storage.image import Image, ImageBuilder
from hotweights_storage.sources.base import Source
from hotweights_storage.sources.file import open_folder
from hotweights_transports.broadcast.group import GroupTimeouts
from hotweights_transports.peers.base import PeerError


class Gated:
    """A source whose last bytes are not read before a file is there, so that something can happen
    meanwhile.
    """

    def __init__(self, source: Source, gate: Path, after_nbytes: int) -> None:
        self.uri = source.uri
        self._source = source
        self._gate = gate
        self._after_nbytes = after_nbytes

    def entries(self) -> Mapping[str, int | SourceRefused | SourceUnavailable]:
        return self._source.entries()

    def files(self) -> Mapping[str, int]:
        return self._source.files()

    def read_into(self, file: str, offset: int, into: memoryview) -> int:
        while offset > self._after_nbytes and not self._gate.exists():
            time.sleep(0.02)
        return self._source.read_into(file, offset, into)

    def check_unchanged(self) -> None:
        self._source.check_unchanged()

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def digest_of(image: Image) -> str:
    hasher = blake3(image.table_json)
    for slab in image.slabs:
        hasher.update(os.pread(slab.fd, slab.nbytes, 0))
    return hasher.hexdigest()


def main() -> int:
    plan = parse(Path(sys.argv[1]).read_bytes())
    gate = sys.argv[2] if len(sys.argv) > 2 else ""
    hidden = len(sys.argv) > 3 and sys.argv[3] != ""
    world = World.read(os.environ, mpiexec=True)

    def source() -> Source:
        if hidden and world.rank:
            raise SourceUnavailable(f"{plan.source}: not mounted at rank {world.rank}")
        found = open_folder(Path(unquote(urlsplit(plan.source).path)))
        return Gated(found, Path(gate), plan.manifest.nbytes // 2) if gate else found

    came = 0

    def progress(nbytes: int) -> None:
        nonlocal came
        came += nbytes
        print(f"came {came}", flush=True)

    patience = GroupTimeouts(
        join_seconds=float(os.environ.get("JOIN_SECONDS", "120")),
        message_seconds=30.0,
        stall_seconds=float(os.environ.get("STALL_SECONDS", "60")),
    )
    print("here", flush=True)
    with ImageBuilder(plan.manifest) as builder:
        try:
            measured = replicator(window=3, patience=patience).run(
                plan, builder, source, world, progress
            )
        except (TransferError, PeerError) as error:
            print(json.dumps({"error": error.reason, "message": str(error)}), flush=True)
            return 1
        image = builder.finish()
        details = {"nbytes": measured.nbytes, "seconds": measured.seconds} | dict(measured.details)
        print(json.dumps({"digest": digest_of(image)} | details), flush=True)
        image.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
