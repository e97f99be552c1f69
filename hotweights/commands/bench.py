"""``hotweights bench``: how fast a plan's version comes into memory here, verified."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from hotweights.commands.options import Json, progress
from hotweights.commands.replicate import (
    DIRECT_VARIABLE,
    Mpi,
    Pinned,
    PlanFile,
    Ucx,
    Window,
    folder_of,
    warn_if_alone,
)
from hotweights.commands.worker import Device, Roots
from hotweights.replicate.world import World
from hotweights_common import sizes


def bench(
    plan: PlanFile,
    repeat: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="How often.")] = 3,
    device: Annotated[
        Device, typer.Option(help="Where to put it; without a GPU it stays in host memory.")
    ] = Device.CPU,
    cold: Annotated[
        bool,
        typer.Option("--cold", help="Let the kernel forget the source's files before each round."),
    ] = False,
    mpi: Mpi = False,
    ucx: Ucx = False,
    pinned: Pinned = False,
    window: Window = 2,
    root: Roots = None,
    as_json: Json = False,
) -> None:
    """Measure a replication several times; nothing is committed. Of all rounds the median counts.

    Example: hotweights bench --plan plan.json --repeat 3
    """
    from hotweights.replicate import run
    from hotweights.replicate.bench import Round, median_rate, rounds
    from hotweights.worker.allowed_sources import sources
    from hotweights_storage import device as devices

    world = World.read(os.environ, mpiexec=mpi)
    warn_if_alone(world, ucx=ucx, mpi=mpi)
    found = run.read_plan(plan)
    allowed = sources(root or ())
    replicator = run.replicator_for(world, ucx=ucx, mpi=mpi, window=window)
    folder = folder_of(found, allowed)
    # any file will do: whether GPUDirect works depends on the file system that they are all on
    sample = folder / found.manifest.tensors[0].file if folder else None
    direct = os.environ.get(DIRECT_VARIABLE, "") not in ("", "0")
    road = devices.choose(device.value, pinned=pinned, direct=direct, sample=sample)
    done: list[Round] = []
    with progress("measuring", repeat * found.manifest.nbytes) as report:
        going = rounds(
            *(
                found,
                replicator,
                lambda: allowed.open(found.source, ""),
                world,
                repeat,
                road,
                folder,
            ),
            cold=cold,
        )
        for number, one in enumerate(going, 1):
            done.append(one)
            report(found.manifest.nbytes)
            if not as_json:
                nbytes, seconds = one.measured.nbytes, one.measured.seconds
                onto = f", {one.device_seconds:.2f} s onto the GPU" if one.device_seconds else ""
                print(
                    f"round {number}: {sizes.decimal(nbytes)} in {seconds:.3f} s "
                    f"({one.bytes_per_second / 1e9:.2f} GB/s){onto}"
                )
    rate = median_rate(done)
    if as_json:
        shown = {
            "version": found.version,
            # of every round the same, as the image's digest is
            "nbytes": done[0].measured.nbytes,
            "buckets": len(found.buckets),
            "transport": done[0].measured.transport,
            "rank": world.rank,
            "world_size": world.size,
            "seconds": [round(one.measured.seconds, 6) for one in done],
            "device_seconds": [round(one.device_seconds, 6) for one in done],
            "bytes_per_second": round(rate),
            "image_digest": done[0].image_digest,
            "device": {"road": road.name, "because": road.because},
        }
        print(json.dumps(shown))
        return
    print(
        f"median {rate / 1e9:.2f} GB/s by {done[0].measured.transport}, verified, in "
        f"{road.name} memory ({road.because})"
    )
