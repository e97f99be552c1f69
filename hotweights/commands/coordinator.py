"""``hotweights coord-*``, ``begin``, ``precommit``, ``commit``, ``abort``, ``status``: the coordinator, and what is asked of it.

Each of them is one call, shown for people or, with ``--json``, as it came. What the coordinator refuses, and a coordinator that
does not answer, is one line and exit code 1. The coordinator itself runs until it is told to stop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hotweights.commands.options import Json, size_text
from hotweights.files import read_bounded
from hotweights.published import read_published
from hotweights_transports.errors import TransferError

BACKEND_VARIABLE = "HOTWEIGHTS_COORD_BACKEND"
EVENTS_VARIABLE = "HOTWEIGHTS_COORD_PUB"
POLL_SECONDS = 0.2
MOST_WORKERS_SHOWN = 20

Endpoint = Annotated[
    str,
    typer.Option(
        "--endpoint",
        metavar="URI[,URI]",
        envvar="HOTWEIGHTS_COORD",
        help="Where the coordinator is; several with commas, whoever leads is found.",
    ),
]
TokenFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File with the token (default: $HOTWEIGHTS_COORD_TOKEN).")
]
Curve = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with CURVE keys, see coord-keys.")]
Timeout = Annotated[float, typer.Option("--timeout", metavar="S", min=0.05, help="Seconds to wait for an answer.")]
Version = Annotated[str, typer.Option("--version", metavar="V", help="Name of the version.")]

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"


class CommandFailed(TransferError):
    """What was asked for did not come about."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for name, command in (
        ("coord-serve", serve),
        ("coord-submit-plan", submit_plan),
        ("coord-status", status_page),
        ("coord-set-current", set_current),
        ("coord-sub", subscribe),
        ("coord-keys", keys),
        ("begin", begin),
        ("precommit", precommit),
        ("commit", commit),
        ("abort", abort),
        ("status", status),
    ):
        app.command(name)(command)


def serve(
    endpoint: Annotated[str, typer.Option(metavar="URI", help="Where calls come in; port 0: any.")] = DEFAULT_ENDPOINT,
    pub_endpoint: Annotated[
        str, typer.Option(metavar="URI", help="Where events go out (default: the next port).")
    ] = "",
    advertise: Annotated[
        str, typer.Option(metavar="URI", help="How others reach it, if not by --endpoint (for several coordinators).")
    ] = "",
    backend: Annotated[
        str,
        typer.Option(metavar="memory|redis|auto", envvar=BACKEND_VARIABLE, help="What keeps the state; auto: memory."),
    ] = "auto",
    redis_url: Annotated[
        str, typer.Option(metavar="URL", envvar="HOTWEIGHTS_REDIS_URL", help="With redis: where it is.")
    ] = "",
    instance_id: Annotated[
        str, typer.Option(metavar="ID", help="This coordinator's name (default: host and pid).")
    ] = "",
    token_file: TokenFile = None,
    curve: Curve = None,
    metrics_port: Annotated[
        int,
        typer.Option(metavar="PORT", envvar="HOTWEIGHTS_COORD_METRICS_PORT", min=0, max=65535, help="0: any."),
    ] = 9100,
    worker_ttl: Annotated[
        float,
        typer.Option(metavar="S", min=0.2, max=3600.0, help="Seconds a worker may be silent before it is dropped."),
    ] = 15.0,
    origin_readers: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Workers that read the source at the same time; others pull from them."),
    ] = 1,
    as_json: Json = False,
) -> None:
    """Run a coordinator until Ctrl-C or SIGTERM.

    Without a token or keys it listens on this host only.

    Example: hotweights coord-serve --endpoint tcp://127.0.0.1:5555
    """
    from hotweights.coordinator import auth
    from hotweights.coordinator.server import ServeSettings

    logging.basicConfig(
        level=os.environ.get("HOTWEIGHTS_LOG_LEVEL", "INFO").upper(), format="%(asctime)s %(levelname)s %(message)s"
    )
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
    from hotweights.coordinator.server import Server

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    backend = _backend(backend_name, redis_url)
    try:
        server = Server(settings, backend)
    except TransferError:
        await backend.close()
        raise
    try:
        await server.start()
    except TransferError:
        server.close()
        await backend.close()
        raise
    guarded = " and ".join(filter(None, ["token" if settings.token else "", "curve" if settings.curve else ""]))
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
        text = f"Coordinator {settings.instance_id} serves at {server.sockets.endpoint}, events at {events}, metrics at"
        print(f"{text} port {port}; backend {backend.name}, auth {shown['auth']}, {role}", flush=True)
    await server.run(stop)


def _backend(name: str, redis_url: str) -> Any:
    if name == "redis":
        from dataclasses import replace

        from hotweights.coordinator.redis import RedisBackend, RedisSettings

        settings = RedisSettings.read()
        return RedisBackend(replace(settings, url=redis_url) if redis_url else settings)
    if name not in ("memory", "auto", ""):
        raise typer.BadParameter(f"{name!r} keeps nothing; give memory or redis", param_hint="--backend")
    from hotweights.coordinator.memory import MemoryBackend

    return MemoryBackend()


def submit_plan(
    plan: Annotated[Path, typer.Option(metavar="FILE", help="The plan, as `hotweights plan` writes it.")],
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Give the coordinator the plan that the next begin is about."""
    from hotweights.coordinator.messages import MAX_BINARY_NBYTES

    content = read_bounded(plan, MAX_BINARY_NBYTES, "write it with `hotweights plan`, or name another file")
    with _client(endpoint, token_file, curve, timeout) as client:
        result = client.call("submit_plan", binary=content).result
    _show(result, as_json, f"Plan of {result['version']} submitted ({size_text(len(content))}, {result['digest']})")


def begin(
    version: Version,
    digest: Annotated[
        str, typer.Option(metavar="D", help="Digest that the version's manifest or plan must have.")
    ] = "",
    deadline: Annotated[
        float, typer.Option(metavar="S", min=0.1, max=7 * 86400.0, help="Aborted if it is not committed by then.")
    ] = 3600.0,
    commit_when_ready: Annotated[
        bool, typer.Option("--commit-when-ready", help="Commit as soon as all workers have prepared it.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until it is precommitted; with --commit-when-ready until it is applied.")
    ] = False,
    wait_timeout: Annotated[float, typer.Option("--wait-timeout", metavar="S", help="How long to wait.")] = 600.0,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 5.0,
    as_json: Json = False,
) -> None:
    """Open an update: workers stage the version and prepare it, and go on serving the old one.

    Example: hotweights begin --version v1 --commit-when-ready --wait
    """
    with _client(endpoint, token_file, curve, timeout) as client:
        args = {"version": version, "deadline_seconds": deadline, "commit_when_ready": commit_when_ready}
        result = client.call("begin", **args, **({"digest": digest} if digest else {})).result
        if wait:
            result |= _waited(client, result["token"], commit_when_ready, wait_timeout)
    _show(result, as_json, f"{version} is {result['state']} (token {result['token']})")


def precommit(
    worker_id: Annotated[str, typer.Option(metavar="ID", help="The worker that has prepared the version.")],
    attempt: Annotated[
        int | None, typer.Option("--token", metavar="N", help="The attempt's token (default: the one that is open).")
    ] = None,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 5.0,
    as_json: Json = False,
) -> None:
    """Say for a worker that it could commit at once. Workers do it by themselves."""
    with _client(endpoint, token_file, curve, timeout) as client:
        token = client.call("status").result["token"] if attempt is None else attempt
        result = client.call("precommit", worker_id=worker_id, token=token).result
    _show(result, as_json, f"{worker_id} has precommitted token {token}: {result['state']}")


def commit(
    version: Version,
    attempt: Annotated[int | None, typer.Option("--token", metavar="N", help="The attempt's token.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until every worker has applied it.")] = False,
    wait_timeout: Annotated[float, typer.Option("--wait-timeout", metavar="S", help="How long to wait.")] = 600.0,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 5.0,
    as_json: Json = False,
) -> None:
    """Make the version that all workers have prepared the one that is served."""
    with _client(endpoint, token_file, curve, timeout) as client:
        result = client.call("commit", version=version, **({} if attempt is None else {"token": attempt})).result
        if wait:
            result |= _waited(client, result["token"], True, wait_timeout)
    _show(result, as_json, f"{version} is {result['state']} (token {result['token']})")


def abort(
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; workers and events carry it.")] = "operator abort",
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 5.0,
    as_json: Json = False,
) -> None:
    """Give the open update up; what is served stays."""
    with _client(endpoint, token_file, curve, timeout) as client:
        result = client.call("abort", reason=reason).result
    _show(result, as_json, f"{result['version']} is aborted (token {result['token']})")


def set_current(
    manifest: Annotated[Path, typer.Option(metavar="FILE", help="The manifest of what is served now.")],
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Tell the coordinator which manifest `plan` starts from; a commit does it too."""
    content = read_published(manifest).manifest.canonical
    with _client(endpoint, token_file, curve, timeout) as client:
        result = client.call("set_current_manifest", binary=content).result
    _show(result, as_json, f"{result['version']} counts as current ({result['digest']})")


def status(
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 5.0,
    as_json: Json = False,
) -> None:
    """Say in one line what holds."""
    with _client(endpoint, token_file, curve, timeout) as client:
        result = client.call("status").result
    _show(result, as_json, _summary(result))


def status_page(
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 5.0,
    as_json: Json = False,
) -> None:
    """Show what holds, who takes part, what is waited for, and what happened last."""
    with _client(endpoint, token_file, curve, timeout) as client:
        result = client.call("status").result
        workers = client.call("list_workers").result["workers"]
    _show(result, as_json, "\n".join(_page(result, workers)))


def subscribe(
    pub_endpoint: Annotated[
        str,
        typer.Option(
            metavar="URI", envvar=EVENTS_VARIABLE, help="Where events go out (default: --endpoint's next port)."
        ),
    ] = "",
    topics: Annotated[
        list[str] | None, typer.Option(metavar="T", help="Only these topics; may be given several times.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--for", metavar="S", min=0.0, help="How long to listen (default: until Ctrl-C).")
    ] = None,
    print_last: Annotated[bool, typer.Option("--print-last", help="The latest events first.")] = False,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 5.0,
    as_json: Json = False,
) -> None:
    """Print events as they happen, one a line, until Ctrl-C."""
    from hotweights.coordinator import address
    from hotweights.coordinator.client import Subscriber

    where = pub_endpoint or address.events_endpoint(address.split(endpoint)[0])
    with Subscriber(where, topics or (), curve) as events:
        if print_last:
            with _client(endpoint, token_file, curve, timeout) as client:
                for event in client.call("status").result["last_events"]:
                    _show(event, as_json, _event_line(event))
        until = time.monotonic() + seconds if seconds is not None else float("inf")
        while (left := until - time.monotonic()) > 0:
            heard = events.next(min(left, POLL_SECONDS))
            if heard is not None:
                _show(heard[1], as_json, _event_line(heard[1]))


def keys(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write the keys to.")]) -> None:
    """Write CURVE keys for a coordinator and its clients.

    A client needs server.key and client.key_secret of the folder; the coordinator needs the whole folder.
    """
    from hotweights.coordinator import auth

    auth.write_keys(folder)
    print(f"Wrote keys to {folder}: coord-serve --curve {folder}; give clients server.key and client.key_secret")


def _client(endpoint: str, token_file: Path | None, curve: Path | None, timeout: float) -> Any:
    from hotweights.coordinator import auth
    from hotweights.coordinator.client import Client

    return Client(endpoint, auth.read_token(token_file), curve, timeout_seconds=timeout)


def _waited(client: Any, token: int, until_applied: bool, seconds: float) -> dict[str, Any]:
    """Ask until it has come about. Raises `CommandFailed` where it will not, or not in time."""
    until = time.monotonic() + seconds
    while True:
        now = client.call("status").result
        if now["state"] == "aborted" or now["token"] != token:
            what = f"{now['version']} is {now['state']}: {now['reason']}" if now["reason"] else "another attempt began"
            raise CommandFailed(what, "Aborted")
        done = now["state"] == "committed" and not now["waiting_for"] if until_applied else now["state"] != "begun"
        if done:
            return {"state": now["state"], "applied": now["applied"], "precommitted": now["precommitted"]}
        if time.monotonic() > until:
            waiting = ", ".join(now["waiting_for"][:5]) or "a first worker"
            text = f"{now['version']} is still {now['state']} after {seconds:g} s, waiting for {waiting}"
            raise CommandFailed(f"{text}; see `hotweights coord-status`, or end it with `hotweights abort`", "Timeout")
        time.sleep(POLL_SECONDS)


def _show(result: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(result) if as_json else text, flush=True)


def _summary(result: dict[str, Any]) -> str:
    what = f"{result['version']} is {result['state']}" if result["version"] else "idle"
    parts = [f"{what} (token {result['token']})", f"{len(result['workers'])} workers"]
    if result["waiting_for"]:
        parts.append(f"waiting for {_names(result['waiting_for'])}")
    if result["reason"]:
        parts.append(result["reason"])
    current = result["current"]
    parts.append(f"current {current['version']}" if current else "nothing is current")
    return "; ".join(parts)


def _page(result: dict[str, Any], workers: list[dict[str, Any]]) -> list[str]:
    current, role = result["current"], "leads" if result["leads"] else f"follows {result['leader'] or 'nobody'}"
    submitted = result["submitted"]
    lines = [
        f"coordinator  {result['instance_id']} {role}, backend {result['backend']}, up {_age(result['uptime_seconds'])}",
        f"state        {result['state']}"
        + (f" {result['version']}, token {result['token']}" if result["version"] else ""),
        f"current      {current['version']} {current['digest']}, token {current['token']}"
        if current
        else "current      none",
        f"plan         {submitted['version']} {submitted['digest']}" if submitted else "plan         none",
    ]
    if result["reason"]:
        lines.append(f"reason       {result['reason']}")
    if result["deadline_seconds"] is not None:
        lines.append(f"deadline     in {_age(result['deadline_seconds'])}")
    if result["waiting_for"]:
        lines.append(f"waiting for  {_names(result['waiting_for'])}")
    counts = f"{len(result['precommitted'])} precommitted, {len(result['applied'])} applied"
    lines.append(f"workers      {len(workers)}, {counts}")
    applied = set(result["applied"])
    for worker in workers[:MOST_WORKERS_SHOWN]:
        name = worker["worker_id"]
        marks = ["precommitted"] if worker["precommitted"] else []
        marks += ["applied"] if name in applied else []
        marks += [f"failed: {worker['failure']['reason']}"] if worker["failure"] else []
        said = f"heard {_age(worker['silence_seconds'])} ago"
        lines.append(f"  {name:<24} {worker['host']:<20} {said:<16} {', '.join(marks)}".rstrip())
    if len(workers) > MOST_WORKERS_SHOWN:
        lines.append(f"  and {len(workers) - MOST_WORKERS_SHOWN} more; --json lists all")
    lines.append("last events")
    lines += [
        f"  {_age(event['age_seconds']):>8} ago  {event['topic']:<10} {event['text']}"
        for event in result["last_events"]
    ]
    return lines


def _event_line(event: dict[str, Any]) -> str:
    return f"{time.strftime('%H:%M:%S', time.localtime(event['at']))}  {event['topic']:<10} {event['text']}"


def _names(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
