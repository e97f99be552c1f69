"""``hotweights coord-serve``: the coordinator itself, until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
from typing import Annotated, Any

import typer

from hotweights.commands.options import Curve, Json, TokenFile, log_to_stderr
from hotweights_common.errors import HotweightsError
from hotweights_coordinator.wire.address import DEFAULT_ENDPOINT

BACKEND_VARIABLE = "HOTWEIGHTS_COORD_BACKEND"


def serve(
    endpoint: Annotated[
        str, typer.Option(metavar="URI", help="Where calls come in; port 0: any.")
    ] = DEFAULT_ENDPOINT,
    pub_endpoint: Annotated[
        str, typer.Option(metavar="URI", help="Where events go out (default: the next port).")
    ] = "",
    advertise: Annotated[
        str,
        typer.Option(
            metavar="URI",
            help="How others reach it, if not by --endpoint (for several coordinators).",
        ),
    ] = "",
    backend: Annotated[
        str,
        typer.Option(
            metavar="memory|redis|auto",
            envvar=BACKEND_VARIABLE,
            help="What keeps the state; auto: memory.",
        ),
    ] = "auto",
    redis_url: Annotated[
        str,
        typer.Option(metavar="URL", envvar="HOTWEIGHTS_REDIS_URL", help="With redis: where it is."),
    ] = "",
    instance_id: Annotated[
        str, typer.Option(metavar="ID", help="This coordinator's name (default: host and pid).")
    ] = "",
    token_file: TokenFile = None,
    curve: Curve = None,
    metrics_port: Annotated[
        int,
        typer.Option(
            metavar="PORT", envvar="HOTWEIGHTS_COORD_METRICS_PORT", min=0, max=65535, help="0: any."
        ),
    ] = 9100,
    worker_ttl: Annotated[
        float,
        typer.Option(
            metavar="S",
            min=0.2,
            max=3600.0,
            help="Seconds a worker may be silent before it is dropped.",
        ),
    ] = 15.0,
    origin_readers: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Workers that read the source at the same time; others pull from them.",
        ),
    ] = 1,
    as_json: Json = False,
) -> None:
    """Run a coordinator until Ctrl-C or SIGTERM.

    Without a token or keys it listens on this host only.

    Example: hotweights coord-serve --endpoint tcp://127.0.0.1:5555
    """
    from hotweights_coordinator.server.settings import ServeSettings
    from hotweights_coordinator.wire import auth

    log_to_stderr("info", "%(asctime)s %(levelname)s %(message)s")
    settings = ServeSettings(
        endpoint=endpoint,
        events_endpoint=pub_endpoint,
        advertise=advertise,
        instance_id=instance_id or f"{socket.gethostname()}-{os.getpid()}",
        token=auth.read_token(token_file),
        curve=curve,
        metrics_port=metrics_port,
        worker_ttl_seconds=worker_ttl,
        origin_readers=origin_readers,
    )
    asyncio.run(_serve(settings, backend, redis_url, as_json))


async def _serve(settings: Any, backend_name: str, redis_url: str, as_json: bool) -> None:
    from hotweights_coordinator.server.server import Server

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    backend = _backend(backend_name, redis_url)
    # from here on the backend has connections to close, and a started server has sockets
    try:
        server = Server(settings, backend)
    except HotweightsError:
        await backend.close()
        raise
    try:
        await server.start()
    except HotweightsError:
        server.close()
        await backend.close()
        raise
    # What is loaded by now is never garbage; looking through all of it would stop a busy
    # coordinator for tens of milliseconds.
    gc.collect()
    gc.freeze()
    guarded = " and ".join(
        filter(None, ["token" if settings.token else "", "curve" if settings.curve else ""])
    )
    shown = {
        "endpoint": server.sockets.endpoint,
        "pub_endpoint": server.sockets.events_endpoint,
        "metrics_port": server.web.port,
        "backend": backend.name,
        "auth": guarded or "none",
        "instance_id": settings.instance_id,
        "leads": server.leads,
    }
    if as_json:
        print(json.dumps(shown), flush=True)
    else:
        events, port = server.sockets.events_endpoint, server.web.port
        role = "leading" if server.leads else "standing by"
        text = (
            f"Coordinator {settings.instance_id} serves at {server.sockets.endpoint}, events at "
            f"{events}, metrics at"
        )
        print(
            f"{text} port {port}; backend {backend.name}, auth {shown['auth']}, {role}", flush=True
        )
    await server.run(stop)


def _backend(name: str, redis_url: str) -> Any:
    if name == "redis":
        from dataclasses import replace

        from hotweights_coordinator.backends.redis import RedisBackend, RedisSettings

        settings = RedisSettings.read()
        return RedisBackend(replace(settings, url=redis_url) if redis_url else settings)
    if name not in ("memory", "auto", ""):
        raise typer.BadParameter(
            f"{name!r} keeps nothing; give memory or redis", param_hint="--backend"
        )
    from hotweights_coordinator.backends.memory import MemoryBackend

    return MemoryBackend()
