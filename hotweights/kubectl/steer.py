"""What somebody asks of a rollout beside its spec: promote, abort, retry, rollback, pause, resume.

A command is the annotation ``hotweights.dev/command``, and the operator's answer is
``status.lastCommand``; nothing here decides whether it can be done. It names the revision that its
author sees, and an ID of its own, so that the same command can be given again. Writes are fenced by
the object's resourceVersion. A command that is not answered in time, or whose author presses Ctrl-C,
is withdrawn: the operator's answer is fenced too, so what was withdrawn is not done later.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated

import typer

from hotweights.kubectl import live, options
from hotweights.kubectl.options import Exit, Failed, Place
from hotweights_common.reasons import Reason
from hotweights_crds.weightrollout import CommandStatus
from hotweights_kube.client import Api
from hotweights_kube.errors import Conflict, Invalid, KubeError
from hotweights_kube.resources import WEIGHT_ROLLOUTS, Body
from hotweights_operator.model.objects import COMMAND_ANNOTATION
from hotweights_operator.runtime import observe

ANSWER_SECONDS = 30.0
TRIES = 8
"""Of a write that another one came before: a rollout's status changes several times a second."""
_POINTER = "/metadata/annotations/" + COMMAND_ANNOTATION.replace("/", "~1")  # RFC 6901

Timeout = Annotated[
    float, typer.Option(metavar="S", min=0.1, help="How long to wait for the operator's answer.")
]
NoWait = Annotated[
    bool, typer.Option("--no-wait", help="Do not wait for the answer: it stands in the status.")
]
Revision = Annotated[
    int,
    typer.Option(metavar="N", min=0, help="The revision that is meant (default: the current one)."),
]


@dataclass(frozen=True, slots=True)
class Order:
    """One command as it is given. ``revision`` 0: the current one."""

    verb: str  # with its @argument
    rollout: str
    revision: int = 0
    timeout_seconds: float = ANSWER_SECONDS
    waits: bool = True
    as_json: bool = False


def promote(
    rollout: options.Rollout,
    full: Annotated[
        bool, typer.Option("--full", help="Skip all remaining steps, not only this pause.")
    ] = False,
    revision: Revision = 0,
    timeout: Timeout = ANSWER_SECONDS,
    no_wait: NoWait = False,
    namespace: options.Namespace = "",
    context: options.Context = "",
    kubeconfig: options.Kubeconfig = None,
    as_json: options.Json = False,
) -> None:
    """End the pause that a canary is in; with --full all pods may change.

    Example: kubectl hotweights promote tiny-llama
    """
    verb = "promote-full" if full else "promote"
    order = Order(verb, rollout, revision, timeout, not no_wait, as_json)
    options.run(_give(Place(namespace, context, kubeconfig), order))


def rollback(
    rollout: options.Rollout,
    to: Annotated[
        str, typer.Option(metavar="VERSION", help="Where to (default: what was complete before).")
    ] = "",
    revision: Revision = 0,
    timeout: Timeout = ANSWER_SECONDS,
    no_wait: NoWait = False,
    namespace: options.Namespace = "",
    context: options.Context = "",
    kubeconfig: options.Kubeconfig = None,
    as_json: options.Json = False,
) -> None:
    """Lead all pods back, at once and without canary steps.

    spec.versionRef stays as it is; the way back ends when it names another version, or with a
    retry.

    Example: kubectl hotweights rollback tiny-llama --to v1
    """
    if to and not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", to):
        raise options.wrong_usage(f"--to {to!r} is no name of a version")
    verb = f"rollback@{to}" if to else "rollback"
    order = Order(verb, rollout, revision, timeout, not no_wait, as_json)
    options.run(_give(Place(namespace, context, kubeconfig), order))


PLAIN = {
    "pause": "Activate nothing further, until a resume or another revision.",
    "resume": "End what pause began; after a rollback, try the version of the spec again.",
    "abort": "Give the revision up: every pod keeps what it serves.",
    "retry": "Try the version of the spec once more, in a new revision.",
    "restart-failed": "Ask the pods that failed once more, in a new revision; as retry does.",
}
"""Verbs without an argument, and what they do."""


def plain(verb: str) -> Callable[..., None]:
    """The command of a verb without an argument."""

    def command(
        rollout: options.Rollout,
        revision: Revision = 0,
        timeout: Timeout = ANSWER_SECONDS,
        no_wait: NoWait = False,
        namespace: options.Namespace = "",
        context: options.Context = "",
        kubeconfig: options.Kubeconfig = None,
        as_json: options.Json = False,
    ) -> None:
        order = Order(verb, rollout, revision, timeout, not no_wait, as_json)
        options.run(_give(Place(namespace, context, kubeconfig), order))

    command.__doc__ = PLAIN[verb]
    return command


async def _give(place: Place, order: Order) -> int:
    """Give the command, and wait for the answer."""
    async with place.connected() as (api, namespace):
        name = f"{namespace}/{order.rollout}"
        text = await _written(api, namespace, order)
        if not order.waits:
            _say(order, {"command": text, "outcome": "", "message": ""}, f"{name}: {text}: given")
            return Exit.DONE
        try:
            answer = await _answer(api, namespace, order, text)
        except asyncio.CancelledError:
            answer = await _withdrawn(api, namespace, order, text)
            if answer is None:
                end = f"interrupted; the command {text!r} was withdrawn, nothing was done"
                raise Failed(end, Exit.INTERRUPTED, Reason.INTERRUPTED) from None
        if answer is None:
            answer = await _withdrawn(api, namespace, order, text)
        if answer is None:
            raise Failed(
                f"no answer to {text!r} within {order.timeout_seconds:g} s, so it was withdrawn and "
                "nothing was done: is the operator running? `kubectl hotweights doctor` tells",
                Exit.TIMEOUT,
                Reason.TIMEOUT,
            )
    if answer.outcome != "Done":
        raise Failed(f"{name}: {answer.message}", Exit.NOT_SO, Reason.REFUSED)
    told = {"command": text, "outcome": answer.outcome, "message": answer.message}
    _say(order, told, f"{name}: {answer.message}")
    return Exit.DONE


def _say(order: Order, told: dict[str, str], line: str) -> None:
    if order.as_json:
        options.tell(told)
    else:
        print(line)


async def _written(api: Api, namespace: str | None, order: Order) -> str:
    """Write the annotation; the command's text. Raises `KubeError`, `Failed`."""
    for _ in range(TRIES):
        body = await api.get(WEIGHT_ROLLOUTS, order.rollout, namespace)
        rollout = observe.rollout(body)
        revision = order.revision or rollout.status.revision
        text = f"{order.verb} {revision} {secrets.token_hex(3)}"
        patch: Body = {"metadata": {"annotations": {COMMAND_ANNOTATION: text}}}
        try:
            await api.merge_patch(
                WEIGHT_ROLLOUTS,
                order.rollout,
                patch,
                namespace=namespace,
                resource_version=rollout.resource_version,
                manager="kubectl-hotweights",
            )
        except Conflict:
            continue  # the revision may be another one now
        return text
    raise Failed(
        f"WeightRollout {order.rollout} changes faster than it can be written to: try again",
        Exit.NOT_ASKED,
        "Conflict",
    )


async def _answer(api: Api, namespace: str | None, order: Order, text: str) -> CommandStatus | None:
    """What the operator answered; None: nothing in time. Raises `Failed` when another command came
    before the answer.
    """
    moments = live.moments(api, order.rollout, namespace, order.timeout_seconds)
    async with aclosing(moments) as bodies:
        async for body in bodies:
            if body is None:
                text = f"WeightRollout {order.rollout} was deleted before it answered"
                raise Failed(text, Exit.NOT_SO, "Deleted")
            rollout = observe.rollout(body)
            if rollout.status.last_command.text == text:
                return rollout.status.last_command
            if rollout.command != text:
                raise Failed(
                    f"another command, {rollout.command!r}, came before {text!r} was answered: see "
                    "what came of it, and give yours again",
                    Exit.NOT_SO,
                    "Superseded",
                )
    return None


async def _withdrawn(
    api: Api, namespace: str | None, order: Order, text: str
) -> CommandStatus | None:
    """Take the annotation away again; the answer, should it have come after all."""
    same: Body = {"op": "test", "path": _POINTER, "value": text}
    try:
        body = await api.json_patch(
            WEIGHT_ROLLOUTS,
            order.rollout,
            [same, {"op": "remove", "path": _POINTER}],
            namespace=namespace,
            manager="kubectl-hotweights",
        )
    except Invalid:  # another one stands there by now
        body = await api.get(WEIGHT_ROLLOUTS, order.rollout, namespace)
    except KubeError as error:
        raise Failed(
            f"the command {text!r} could not be withdrawn and may still be done ({error}); `kubectl "
            f"annotate weightrollout {order.rollout} {COMMAND_ANNOTATION}-` withdraws it",
            Exit.NOT_ASKED,
            type(error).__name__,
        ) from error
    answer = observe.rollout(body).status.last_command
    return answer if answer.text == text else None
