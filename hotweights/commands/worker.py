"""``hotweights worker``: this host follows a coordinator, and its engines with it, until it is told
to stop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hotweights.commands.coordinator import EVENTS_VARIABLE
from hotweights.commands.options import Curve, Endpoint, Json, TokenFile, log_to_stderr
from hotweights.home import ROOTS_VARIABLE, home
from hotweights_coordinator.wire.address import DEFAULT_ENDPOINT

if TYPE_CHECKING:
    from hotweights.worker.service import Running, WorkerSettings

log = logging.getLogger(__name__)

Roots = Annotated[
    list[Path] | None,
    typer.Option(
        "--root",
        metavar="DIR",
        envvar=ROOTS_VARIABLE,
        help=f"A folder that plans may have this host read; several times (or ${ROOTS_VARIABLE} "
        "with ':'). Default: the current one.",
    ),
]


class Device(StrEnum):
    """Where engines want a version in the end."""

    CPU = "cpu"
    CUDA = "cuda"


class TransportChoice(StrEnum):
    """How workers talk to each other, as --transport names it; its help says what each means."""

    AUTO = "auto"
    TCP = "tcp"
    UCX = "ucx"


def worker(
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    root: Roots = None,
    device: Annotated[
        Device, typer.Option(help="Where engines want the weights; they copy them there.")
    ] = Device.CPU,
    worker_id: Annotated[
        str,
        typer.Option(
            metavar="ID", envvar="WORKER_ID", help="This worker's name (default: host and pid)."
        ),
    ] = "",
    listen: Annotated[
        str,
        typer.Option(
            metavar="URI", help="Where other workers connect; beyond this host only with a secret."
        ),
    ] = "tcp://127.0.0.1:0",
    advertise: Annotated[
        str,
        typer.Option(metavar="HOST", help="How they reach it (default: the address of --listen)."),
    ] = "",
    transport: Annotated[
        TransportChoice,
        typer.Option(help="How workers talk; auto: TCP, and UCX where others want it."),
    ] = TransportChoice.AUTO,
    ucx: Annotated[bool, typer.Option("--ucx", help="As --transport ucx.")] = False,
    zone: Annotated[
        str,
        typer.Option(
            metavar="Z",
            envvar="HOTWEIGHTS_ZONE",
            help="The neighbourhood (default: the address's /24).",
        ),
    ] = "",
    socket_folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the engines' socket and token are (default: worker in $HOTWEIGHTS_HOME).",
        ),
    ] = None,
    concurrency: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=64,
            envvar="HOTWEIGHTS_P2P_CONCURRENCY",
            help="Donors at a time.",
        ),
    ] = 8,
    pinned: Annotated[
        bool,
        typer.Option("--pinned/--no-pinned", help="For engines with a GPU: page-locked copies."),
    ] = False,
    no_mpi: Annotated[
        bool, typer.Option("--no-mpi/--mpi", help="Workers talk pairwise; MPI is for replicate.")
    ] = True,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Has no effect: every chunk is always verified.")
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="End when one version was applied.")] = False,
    wait: Annotated[
        float,
        typer.Option(
            metavar="S", min=0.1, help="How long a coordinator is looked for at the start."
        ),
    ] = 30.0,
    pub_endpoint: Annotated[
        str,
        typer.Option(
            metavar="URI",
            envvar=EVENTS_VARIABLE,
            help="Where events go out (default: the next port).",
        ),
    ] = "",
    metrics_port: Annotated[
        int,
        typer.Option(
            metavar="PORT", min=0, max=65535, envvar="HOTWEIGHTS_METRICS_PORT", help="0: any."
        ),
    ] = 9099,
    token_file: TokenFile = None,
    curve: Curve = None,
    as_json: Json = False,
) -> None:
    """Follow a coordinator: stage what it begins, have this host's engines prepare it, switch them
    when it is committed.

    Engines are the processes that connect to the socket with the token beside it: set
    HOTWEIGHTS_SOCKET and HOTWEIGHTS_TOKEN_FILE for vLLM to what is printed here. Ends with Ctrl-C
    or SIGTERM; engines go on serving.

    Example: hotweights worker --endpoint tcp://127.0.0.1:5555 --root /models
    """
    from hotweights.worker.service import WorkerSettings
    from hotweights.worker.sync import HeartbeatTiming
    from hotweights_agent.settings import StagingSettings
    from hotweights_coordinator.wire import auth

    log_to_stderr("info", "%(asctime)s %(levelname)s %(message)s")
    if no_verify:
        log.warning("--no-verify has no effect: every chunk is verified before anybody sees it")
    if not no_mpi:
        log.warning(
            "--mpi has no effect: workers talk pairwise; `hotweights replicate --mpi` moves a "
            "plan by MPI"
        )
    if device is Device.CUDA:
        log.info("versions are staged in host memory; %s", _transport(pinned))
    for folder in root or ():
        if not folder.is_dir():
            log.warning("--root %s is no folder: no plan below it can be read here", folder)
    defaults = WorkerSettings(endpoint)
    settings = WorkerSettings(
        endpoints=endpoint,
        roots=tuple(root or ()),
        worker_id=worker_id,
        listen=listen,
        advertise=advertise,
        transport="ucx" if ucx else transport.value,
        zone=zone,
        folder=socket_folder or home() / "worker",
        folder_is_named=socket_folder is not None,
        token=auth.read_token(token_file),
        curve=curve,
        events_endpoint=pub_endpoint,
        metrics_port=metrics_port,
        staging=StagingSettings(
            patience_seconds=defaults.staging.patience_seconds, donors_at_once=concurrency
        ),
        timing=HeartbeatTiming(first_seconds=wait),
    )
    asyncio.run(_run(settings, once, as_json))


def _transport(pinned: bool) -> str:
    from hotweights_storage import device

    road = device.choose("cuda", pinned=pinned)
    return f"engines copy them to their GPU ({road.name}: {road.because})"


async def _run(settings: WorkerSettings, once: bool, as_json: bool) -> None:
    from hotweights.worker import service
    from hotweights_agent.__main__ import version

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await service.run(
        settings, version(), stop, once=once, started=lambda running: _show(running, as_json)
    )


def _show(running: Running, as_json: bool) -> None:
    if as_json:
        shown = {
            "worker_id": running.worker_id,
            "socket": str(running.socket.absolute()),  # for processes of other folders
            "token_file": str(running.token_file.absolute()),
            "endpoints": list(running.endpoints),
            "metrics_port": running.metrics_port,
        }
        print(json.dumps(shown), flush=True)
        return
    print(
        f"Worker {running.worker_id}: peers at {', '.join(running.endpoints)}, metrics at "
        f"port {running.metrics_port}"
    )
    print(
        f"engines: HOTWEIGHTS_SOCKET={running.socket.absolute()} "
        f"HOTWEIGHTS_TOKEN_FILE={running.token_file.absolute()}",
        flush=True,
    )
