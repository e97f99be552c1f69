"""``hotweights coord-*``, ``begin``, ``precommit``, ``commit``, ``abort``, ``status``: the
coordinator, and what is asked of it.

Each of them is one call, shown for people or, with ``--json``, as it came. What the coordinator
refuses, and a coordinator that does not answer, is one line and exit code 1. The coordinator itself
is `coord_serve`, what a status looks like `status_text`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from hotweights.commands import coord_serve, status_text
from hotweights.commands.options import (
    Curve,
    Endpoint,
    Json,
    TokenFile,
    interrupted_as,
    waiting,
)
from hotweights.files import read_bounded
from hotweights.published import read_published
from hotweights_common import sizes
from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason
from hotweights_coordinator.wire.address import DEFAULT_ENDPOINT
from hotweights_crds.base import DIGEST_PATTERN

EVENTS_VARIABLE = "HOTWEIGHTS_COORD_PUB"
SEE = "see `hotweights coord-status`"
POLL_SECONDS = 0.2  # between two questions, and how soon Ctrl-C or --for ends a wait for events

Timeout = Annotated[
    float, typer.Option("--timeout", metavar="S", min=0.05, help="Seconds to wait for an answer.")
]
Version = Annotated[str, typer.Option("--version", metavar="V", help="Name of the version.")]
OpenAttempt = Annotated[
    int | None,
    typer.Option(
        "--token", metavar="N", help="The attempt's token (default: the one that is open)."
    ),
]


class CommandFailed(HotweightsError):
    """What was asked for did not come about."""


def register(app: typer.Typer) -> None:
    """Add the coordinator's commands to ``app``, under the names that people type."""
    for name, command in (
        ("coord-serve", coord_serve.serve),
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


def submit_plan(
    plan: Annotated[
        Path, typer.Option(metavar="FILE", help="The plan, as `hotweights plan` writes it.")
    ],
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Give the coordinator the plan that the next begin is about."""
    from hotweights_coordinator.wire.messages import MAX_BINARY_NBYTES

    content = read_bounded(
        plan, MAX_BINARY_NBYTES, "write it with `hotweights plan`, or name another file"
    )
    with (
        interrupted_as(lambda: f"whether the plan was submitted is not known; {SEE}"),
        _client(endpoint, token_file, curve, timeout) as client,
    ):
        result = client.call("submit_plan", binary=content).result
    _show(
        result,
        as_json,
        f"Plan of {result['version']} submitted ({sizes.decimal(len(content))}, "
        f"{result['digest']})",
    )


def begin(
    version: Version,
    digest: Annotated[
        str, typer.Option(metavar="D", help="Digest that the version's manifest or plan must have.")
    ] = "",
    deadline: Annotated[
        float,
        typer.Option(
            metavar="S", min=0.1, max=7 * 86400.0, help="Aborted if it is not committed by then."
        ),
    ] = 3600.0,
    commit_when_ready: Annotated[
        bool,
        typer.Option("--commit-when-ready", help="Commit as soon as all workers have prepared it."),
    ] = False,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait", help="Until it is precommitted; with --commit-when-ready until it is applied."
        ),
    ] = False,
    wait_timeout: Annotated[
        float, typer.Option("--wait-timeout", metavar="S", min=0.0, help="How long to wait.")
    ] = 600.0,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 5.0,
    as_json: Json = False,
) -> None:
    """Open an update: workers stage the version and prepare it, and go on serving the old one.

    Example: hotweights begin --version v1 --commit-when-ready --wait
    """
    if digest and not re.fullmatch(DIGEST_PATTERN, digest):
        raise typer.BadParameter(
            f"{digest!r} is no digest; give sha256: and 64 hexadecimal digits, as `hotweights "
            "publish` prints them",
            param_hint="--digest",
        )
    args = {
        "version": version,
        "deadline_seconds": deadline,
        "commit_when_ready": commit_when_ready,
    }
    left = f"whether {version} was begun is not known; {SEE}"
    with interrupted_as(lambda: left):
        with _client(endpoint, token_file, curve, timeout) as client:
            result = client.call("begin", **args, **({"digest": digest} if digest else {})).result
        left = (
            f"the update to {version} goes on (token {result['token']}); {SEE}, or end it with "
            "`hotweights abort`"
        )
        if wait:
            what = f"workers to prepare {version}; `hotweights coord-status` shows for whom"
            with _client(endpoint, token_file, curve, timeout, what) as client:
                result |= _waited(client, result["token"], commit_when_ready, wait_timeout)
    _show(result, as_json, _attempt_text(version, result))


def precommit(
    worker_id: Annotated[
        str, typer.Option(metavar="ID", help="The worker that has prepared the version.")
    ],
    attempt: OpenAttempt = None,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 5.0,
    as_json: Json = False,
) -> None:
    """Say for a worker that it could commit at once. Workers do it by themselves."""
    with (
        interrupted_as(lambda: f"whether {worker_id} has precommitted is not known; {SEE}"),
        _client(endpoint, token_file, curve, timeout) as client,
    ):
        token = _open_attempt(client) if attempt is None else attempt
        result = client.call("precommit", worker_id=worker_id, token=token).result
    _show(result, as_json, f"{worker_id} has precommitted token {token}: {result['state']}")


def commit(
    version: Version,
    attempt: Annotated[
        int | None, typer.Option("--token", metavar="N", help="The attempt's token.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until every worker has applied it.")
    ] = False,
    wait_timeout: Annotated[
        float, typer.Option("--wait-timeout", metavar="S", min=0.0, help="How long to wait.")
    ] = 600.0,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 5.0,
    as_json: Json = False,
) -> None:
    """Make the version that all workers have prepared the one that is served."""
    left = f"whether {version} was committed is not known; {SEE}"
    with interrupted_as(lambda: left):
        with _client(endpoint, token_file, curve, timeout) as client:
            result = client.call(
                "commit", version=version, **({} if attempt is None else {"token": attempt})
            ).result
        left = f"{version} is committed (token {result['token']}), and workers go on to it; {SEE}"
        if wait:
            what = f"workers to apply {version}; `hotweights coord-status` shows for whom"
            with _client(endpoint, token_file, curve, timeout, what) as client:
                result |= _waited(client, result["token"], True, wait_timeout)
    _show(result, as_json, _attempt_text(version, result))


def abort(
    reason: Annotated[
        str, typer.Option(metavar="TEXT", help="Why; workers and events carry it.")
    ] = "operator abort",
    attempt: OpenAttempt = None,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 5.0,
    as_json: Json = False,
) -> None:
    """Give the open update up; what is served stays."""
    with (
        interrupted_as(lambda: f"whether it was aborted is not known; {SEE}"),
        _client(endpoint, token_file, curve, timeout) as client,
    ):
        token = _open_attempt(client) if attempt is None else attempt
        result = client.call("abort", reason=reason, token=token).result
    _show(result, as_json, f"{result['version']} is aborted (token {result['token']})")


def set_current(
    manifest: Annotated[
        Path, typer.Option(metavar="FILE", help="The manifest of what is served now.")
    ],
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Tell the coordinator which manifest `plan` starts from; a commit does it too."""
    content = read_published(manifest).manifest.canonical
    with (
        interrupted_as(lambda: f"whether it was set is not known; {SEE}"),
        _client(endpoint, token_file, curve, timeout) as client,
    ):
        result = client.call("set_current_manifest", binary=content).result
    text = (
        f"plans start from {result['version']} ({result['digest']}); what workers serve stays as "
        "it is"
    )
    _show(result, as_json, text)


def status(
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 5.0,
    as_json: Json = False,
) -> None:
    """Say in one line what holds."""
    several = "," in endpoint
    with _client(endpoint, token_file, curve, timeout, prefers_leader=several) as client:
        result = _status(client, again=several)
    _show(result, as_json, status_text.summary(result))


def status_page(
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 5.0,
    as_json: Json = False,
) -> None:
    """Show what holds, who takes part, what is waited for, and what happened last."""
    several = "," in endpoint
    with _client(endpoint, token_file, curve, timeout, prefers_leader=several) as client:
        result = _status(client, again=several)
        workers = client.call("list_workers").result["workers"]
    text = "\n".join(status_text.page(result, workers))
    _show(result | {"worker_details": workers}, as_json, text)


def subscribe(
    pub_endpoint: Annotated[
        str,
        typer.Option(
            metavar="URI",
            envvar=EVENTS_VARIABLE,
            help="Where events go out (default: --endpoint's next port).",
        ),
    ] = "",
    topics: Annotated[
        list[str] | None,
        typer.Option(metavar="T", help="Only these topics; may be given several times."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--for", metavar="S", min=0.0, help="How long to listen (default: until Ctrl-C)."
        ),
    ] = None,
    print_last: Annotated[
        bool, typer.Option("--print-last", help="The latest events first.")
    ] = False,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    token_file: TokenFile = None,
    curve: Curve = None,
    timeout: Timeout = 5.0,
    as_json: Json = False,
) -> None:
    """Print events as they happen, one a line, until Ctrl-C."""
    from hotweights_coordinator.client.client import Subscriber
    from hotweights_coordinator.wire import address, auth

    where = pub_endpoint or address.events_endpoint(address.split(endpoint)[0])
    # heard before the latest are asked for: what happens in between is shown, twice at worst
    with (
        suppress(KeyboardInterrupt),  # how it is meant to end
        Subscriber(
            where, topics or (), curve, auth.read_token(token_file), connect_seconds=timeout
        ) as events,
    ):
        if print_last:
            with _client(endpoint, token_file, curve, timeout) as client:
                for event in client.call("status").result["last_events"]:
                    _show(event, as_json, status_text.event_line(event))
        until = time.monotonic() + seconds if seconds is not None else float("inf")
        while (left := until - time.monotonic()) > 0:
            heard = events.next(min(left, POLL_SECONDS))
            if heard is not None:
                _show(heard[1], as_json, status_text.event_line(heard[1]))


def keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write the keys to.")],
    as_json: Json = False,
) -> None:
    """Write CURVE keys for a coordinator and its clients.

    A client needs server.key and client.key_secret of the folder; the coordinator needs the whole
    folder.
    """
    from hotweights_coordinator.wire import auth

    auth.write_keys(folder)
    text = (
        f"Wrote keys to {folder}: coord-serve --curve {folder}; give clients server.key and "
        "client.key_secret"
    )
    _show({"folder": str(folder)}, as_json, text)


def _open_attempt(client: Any) -> int:
    """The token that holds now: asked again with it, a call is about no later attempt."""
    token: int = client.call("status").result["token"]
    return token


@contextmanager
def _client(
    endpoint: str,
    token_file: Path | None,
    curve: Path | None,
    timeout: float,
    what: str = "",
    *,
    prefers_leader: bool = True,
) -> Iterator[Any]:
    """Calls to the coordinator; where they take long it is said ``what`` is waited for."""
    from hotweights_coordinator.client.client import Client
    from hotweights_coordinator.wire import auth

    with (
        Client(
            endpoint,
            auth.read_token(token_file),
            curve,
            timeout_seconds=timeout,
            prefers_leader=prefers_leader,
        ) as client,
        waiting(what or f"the coordinator at {endpoint}"),
    ):
        yield client


def _status(client: Any, *, again: bool) -> dict[str, Any]:
    """What the coordinator says; ``again``: what the leader says, if it answers. A single one that
    is named is looked at itself.
    """
    result: dict[str, Any] = client.call("status").result
    if again and not result["leads"] and result["leader"]:
        result = client.call("status").result  # the client has followed to the leader
    return result


def _waited(client: Any, token: int, until_applied: bool, seconds: float) -> dict[str, Any]:
    """Ask until it has come about. Raises `CommandFailed` where it will not, or not in time."""
    until = time.monotonic() + seconds
    while True:
        now = client.call("status").result
        if now["state"] == "aborted" or now["token"] != token:
            what = (
                f"{now['version']} is {now['state']}: {now['reason']}"
                if now["reason"]
                else "another attempt began"
            )
            raise CommandFailed(what, Reason.ABORTED)
        done = (
            now["state"] == "committed" and now["waiting_for"] == []
            if until_applied
            else now["state"] != "begun"
        )
        if done:
            workers = client.call("list_workers").result["workers"]
            return {
                "state": now["state"],
                "applied": now["applied"],
                "precommitted": now["precommitted"],
                "engines": status_text.engines_of(workers),  # in words: not known is an answer
            }
        if time.monotonic() > until:
            # five are enough to see who; there may be thousands
            waiting = (
                "what only its leader knows"
                if now["waiting_for"] is None
                else ", ".join(now["waiting_for"][:5]) or "a first worker"
            )
            text = (
                f"{now['version']} is still {now['state']} after {seconds:g} s, waiting for "
                f"{waiting}"
            )
            raise CommandFailed(
                f"{text}; see `hotweights coord-status`, or end it with `hotweights abort`",
                Reason.TIMEOUT,
            )
        time.sleep(POLL_SECONDS)


def _attempt_text(version: str, result: dict[str, Any]) -> str:
    engines = f", {result['engines']}" if "engines" in result else ""
    return f"{version} is {result['state']} (token {result['token']}){engines}"


def _show(result: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(result) if as_json else text, flush=True)
