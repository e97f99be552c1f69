"""``hotweights replicate``: one plan, once: stage it, verify it, and with ``--commit`` put the
version in place.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hotweights.commands.options import (
    Curve,
    Json,
    Stall,
    TokenFile,
    interrupted_as,
    log_to_stderr,
    progress,
    source_reads,
)
from hotweights.commands.worker import Device, Roots
from hotweights.home import home as default_home
from hotweights.replicate.world import World
from hotweights_common import sizes
from hotweights_common.errors import HotweightsError
from hotweights_storage.errors import TransferError
from hotweights_storage.source_reads import STALL_SECONDS, SourceReads

if TYPE_CHECKING:
    from hotweights.replicate.metrics import Metrics
    from hotweights.replicate.participant import Participant
    from hotweights.replicate.run import Base, Replicated
    from hotweights.replicate.version_store import VersionStore
    from hotweights_planner.plan import Plan
    from hotweights_storage.image import Image
    from hotweights_storage.sources.base import Sources

log = logging.getLogger(__name__)

DEFAULT_METRICS_PORT = 9097
DIRECT_VARIABLE = "HOTWEIGHTS_USE_GDS"

PlanFile = Annotated[
    Path, typer.Option("--plan", metavar="FILE", help="The plan, as `hotweights plan` writes it.")
]
Pinned = Annotated[
    bool, typer.Option("--pinned/--no-pinned", help="Onto a GPU through page-locked buffers.")
]
Ucx = Annotated[
    bool, typer.Option("--ucx", help="With WORLD_SIZE > 1: ranks pull from each other over UCX.")
]
Mpi = Annotated[bool, typer.Option("--mpi", help="With WORLD_SIZE > 1: rank 0 broadcasts by MPI.")]
Window = Annotated[
    int, typer.Option(metavar="N", min=1, max=64, help="Among ranks: buckets on their way at once.")
]


def replicate(
    plan: PlanFile,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the finished image once more and compare.")
    ] = False,
    commit: Annotated[
        bool,
        typer.Option("--commit", help="Put the version in place: by the coordinator, else here."),
    ] = False,
    device: Annotated[
        Device, typer.Option(help="Where to put it; without a GPU it stays in host memory.")
    ] = Device.CPU,
    mpi: Mpi = False,
    ucx: Ucx = False,
    pinned: Pinned = False,
    window: Window = 2,
    root: Roots = None,
    coord_endpoint: Annotated[
        str,
        typer.Option(
            "--coord-endpoint",
            "--endpoint",
            metavar="URI[,URI]",
            envvar="HOTWEIGHTS_COORD",
            help="With --commit: the coordinator that decides.",
        ),
    ] = "",
    home: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where this host keeps versions (default: $HOTWEIGHTS_HOME or "
            "~/.cache/hotweights).",
        ),
    ] = None,
    metrics_port: Annotated[
        int,
        typer.Option(
            metavar="PORT",
            min=0,
            max=65535,
            envvar="HOTWEIGHTS_CLIENT_METRICS_PORT",
            help="0: any.",
        ),
    ] = DEFAULT_METRICS_PORT,
    metrics_hold: Annotated[
        float,
        typer.Option(
            metavar="S",
            min=0.0,
            envvar="HOTWEIGHTS_METRICS_HOLD",
            help="Serve metrics so long after the end.",
        ),
    ] = 0.0,
    wait_timeout: Annotated[
        float,
        typer.Option(
            "--wait-timeout", metavar="S", min=0.0, help="How long other workers are waited for."
        ),
    ] = 600.0,
    stall_seconds: Stall = STALL_SECONDS,
    token_file: TokenFile = None,
    curve: Curve = None,
    as_json: Json = False,
) -> None:
    """Bring a plan's version into memory, verified chunk by chunk, and say how fast that was.

    What the version that was committed here before has already is not read again. The plan's source
    is only read below --root (default: the current folder). With --commit and a coordinator the
    coordinator's workers put it in place, this one among them; without a coordinator it becomes
    `current` in --home.

    Example: hotweights replicate --plan plan.json --verify --commit --device cpu
    """
    from hotweights.replicate import run
    from hotweights.replicate.metrics import Metrics
    from hotweights.replicate.version_store import VersionStore
    from hotweights.worker.allowed_sources import sources

    log_to_stderr("warning", "%(levelname)s %(message)s")
    world = World.read(os.environ, mpiexec=mpi)
    warn_if_alone(world, ucx=ucx, mpi=mpi)
    found = run.read_plan(plan)
    reads = source_reads(stall_seconds)
    allowed = reads.call(found.source, "looking for --root", lambda: sources(root or ()))
    replicator = run.replicator_for(world, ucx=ucx, mpi=mpi, window=window, reads=reads)
    store = VersionStore(home or default_home())
    stop, metrics = run.Stop(), Metrics()
    left = "nothing was written"
    with interrupted_as(lambda: left), ExitStack() as stack:
        port = stack.enter_context(metrics.served(metrics_port))
        participant = (
            _participant(stack, found, world, coord_endpoint, token_file, curve)
            if commit and coord_endpoint
            else None
        )
        if participant is not None:
            left = (
                f"the coordinator was told that this worker leaves the update to {found.version}; "
                "see `hotweights coord-status`"
            )
        stack.enter_context(participant.taking_part(stop) if participant else nullcontext())
        metrics.planned.set(found.manifest.nbytes)
        with _counted(metrics), progress("staging", found.manifest.nbytes) as report:
            done = stack.enter_context(
                run.replicated(
                    *(found, replicator, lambda: allowed.open(found.source, ""), world),
                    *(_base(store, found), report, stop),
                )
            )
        _count(metrics, done)
        where = _finish(found, done.image, allowed, device, pinned, verify)
        placed = (
            _commit(
                participant,
                wait_timeout,
                lambda: _put_in_place(store, found, done.image, allowed, reads),
            )
            if commit
            else None
        )
        left = f"{found.version} was brought here, and only the metrics end early"
        _show(found, world, done, where, verify, placed, port, as_json)
        time.sleep(metrics_hold)  # Prometheus comes only every so often


def warn_if_alone(world: World, *, ucx: bool, mpi: bool) -> None:
    """One rank has nobody to talk to, by whatever transport."""
    if world.size == 1 and (ucx or mpi):
        typer.echo(
            f"warning: {'--mpi' if mpi else '--ucx'} has no effect with one rank; set WORLD_SIZE, "
            "RANK and MASTER_ADDR for each of several",
            err=True,
        )


@contextmanager
def _counted(metrics: Metrics) -> Iterator[None]:
    result = "failed"
    try:
        yield
        result = "done"
    finally:
        metrics.runs.labels(result).inc()


def _count(metrics: Metrics, done: Replicated) -> None:
    measured = done.measured
    metrics.moved.labels(measured.transport).inc(measured.nbytes)
    metrics.reused.inc(done.reused_nbytes)
    metrics.seconds.set(measured.seconds)
    metrics.rate.set(measured.nbytes / measured.seconds if measured.seconds else 0.0)


def _base(store: VersionStore, plan: Plan) -> Base | None:
    """What was committed here last, of which unchanged chunks are taken; None: nothing, or nothing
    that can be read.
    """
    from hotweights.replicate.run import Base

    try:
        folder, manifest = store.current(), store.current_manifest()
    except HotweightsError as error:
        log.warning("what is current here is not reused: %s", error)
        return None
    return Base(folder, manifest) if folder is not None and manifest is not None else None


def _participant(
    stack: ExitStack,
    plan: Plan,
    world: World,
    endpoint: str,
    token_file: Path | None,
    curve: Path | None,
) -> Participant:
    from hotweights.replicate.participant import Participant
    from hotweights_coordinator.client.client import Client
    from hotweights_coordinator.wire import auth

    client = stack.enter_context(Client(endpoint, auth.read_token(token_file), curve))
    host = socket.gethostname()
    return Participant(
        client, plan, world, f"replicate-{host}-{os.getpid()}", host, uuid.uuid4().hex
    )


def _finish(
    plan: Plan, image: Image, allowed: Sources, device: Device, pinned: bool, verify: bool
) -> str:
    """Verify once more, and bring it onto the device; where it is now, in words."""
    from hotweights.replicate.image_check import verify_image
    from hotweights_storage import device as devices

    if verify:
        with progress("verifying", plan.manifest.nbytes) as report:
            verify_image(image, report)
    if device is Device.CPU:
        return "host memory"  # where it was staged: nothing is left to do
    folder = folder_of(plan, allowed)
    sample = folder / plan.manifest.tensors[0].file if folder else None
    direct = os.environ.get(DIRECT_VARIABLE, "") not in ("", "0")
    road = devices.choose("cuda", pinned=pinned, direct=direct, sample=sample)
    if road.name == "host":
        return f"host memory ({road.because})"
    with progress("to the GPU", plan.manifest.nbytes) as report:
        version = devices.to_device(image, road, folder, report)
    try:
        if verify:
            version.verify()
    finally:
        version.close()
    return f"GPU memory by {road.name} ({road.because})"


def folder_of(plan: Plan, allowed: Sources) -> Path | None:
    """The source as a folder, where it is one that may be read; None: it is not, or not there."""
    from urllib.parse import unquote, urlsplit

    try:
        allowed.open(plan.source, "").close()
    except TransferError:
        return None
    return Path(unquote(urlsplit(plan.source).path))


def _commit(participant: Participant | None, wait_seconds: float, here: Callable[[], Path]) -> str:
    """Put it in place, by the coordinator or ``here``; where, in words. Raises `CannotCommit`, or
    what `Participant.commit` raises.
    """
    from hotweights.replicate.participant import WaitLimits

    if participant is not None:
        participant.commit(WaitLimits(wait_seconds))
        return "by the coordinator"
    return str(here())


def _put_in_place(
    store: VersionStore, plan: Plan, image: Image, allowed: Sources, reads: SourceReads
) -> Path:
    """Into this host's store, with the headers and side files of the source; the folder."""
    with progress("committing", plan.manifest.nbytes) as report:
        return reads.read(
            plan.source,
            lambda: allowed.open(plan.source, ""),
            lambda source, _: store.commit(image, source, report),
        )


def _show(
    plan: Plan,
    world: World,
    done: Replicated,
    where: str,
    verified: bool,
    placed: str | None,
    port: int,
    as_json: bool,
) -> None:
    measured = done.measured
    rate = measured.nbytes / measured.seconds if measured.seconds else 0.0
    if as_json:
        shown: dict[str, Any] = {
            "model": plan.model_id,
            "version": plan.version,
            "digest": plan.manifest.digest,
            "rank": world.rank,
            "world_size": world.size,
            "transport": measured.transport,
            "nbytes": measured.nbytes,
            "reused_nbytes": done.reused_nbytes,
            "seconds": round(measured.seconds, 6),
            "bytes_per_second": round(rate),
            "image_digest": done.digest,
            "device": where,
            "verified": verified,
            "committed": placed,
            "metrics_port": port,
            "details": dict(measured.details),
        }
        print(json.dumps(shown), flush=True)
        return
    rank = f"rank {world.rank}: " if world.size > 1 else ""
    counts = (
        f"{sizes.decimal(measured.nbytes)} by {measured.transport} in {measured.seconds:.2f} "
        f"s ({rate / 1e9:.2f} GB/s)"
    )
    again = ", read again and equal" if verified else ""
    print(
        f"{rank}Staged {plan.model_id} {plan.version}: {counts}, "
        f"{sizes.decimal(done.reused_nbytes)} reused{again}"
    )
    for name, value in measured.details.items():
        print(f"{rank}{name}: {value}")
    print(f"{rank}in     {where}")
    print(f"{rank}image  {done.digest}", flush=True)
    if placed:
        print(f"{rank}committed {plan.version}: {placed}", flush=True)
