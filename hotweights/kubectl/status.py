"""``kubectl hotweights status``: wait for the end of a rollout, for scripts and pipelines."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from typing import Annotated

import typer

from hotweights.kubectl import live, options
from hotweights.kubectl.options import Exit, Failed, Place
from hotweights.kubectl.views.verdict import Outcome, Verdict, verdict
from hotweights_common.reasons import Reason
from hotweights_operator.model.objects import Rollout
from hotweights_operator.runtime import observe

CODES: dict[Outcome, Exit] = {
    "Complete": Exit.DONE,
    "RolledBack": Exit.NOT_SO,
    "Aborted": Exit.NOT_SO,
    "Degraded": Exit.NOT_SO,
}
TIMEOUT_SECONDS = 600.0


def status(
    rollout: options.Rollout,
    timeout: Annotated[
        float, typer.Option(metavar="S", min=0.0, help="How long to wait; 0: say how it is now.")
    ] = TIMEOUT_SECONDS,
    namespace: options.Namespace = "",
    context: options.Context = "",
    kubeconfig: options.Kubeconfig = None,
    as_json: options.Json = False,
) -> None:
    """Wait until the rollout has come to an end, with a line for each change.

    With --json the lines go to standard error, and the end to standard output. Exit codes: 0 complete; 1 degraded, aborted or rolled back; 2 wrong usage, or there is
    no such rollout; 3 not within --timeout; 4 the cluster could not be asked; 130 Ctrl-C. A pause is
    no end: it is waited for.

    Example: kubectl hotweights status tiny-llama --timeout 900
    """
    options.run(_status(Place(namespace, context, kubeconfig), rollout, timeout, as_json=as_json))


async def _status(place: Place, name: str, timeout: float, *, as_json: bool) -> int:
    seen: tuple[Rollout, Verdict] | None = None
    async with place.connected() as (api, namespace):
        # one moment at least: whoever asks how it is now waits for the answer
        seconds = timeout or options.REQUEST_SECONDS
        try:
            async with aclosing(live.moments(api, name, namespace, seconds)) as bodies:
                async for body in bodies:
                    if body is None:
                        text = f"WeightRollout {name} was deleted while it was waited for"
                        raise Failed(text, Exit.NOT_SO, "Deleted")
                    rollout = observe.rollout(body)
                    found = verdict(rollout)
                    if seen is None or found.line != seen[1].line:
                        # at once: a pipeline's log is read while it waits
                        print(found.line, file=sys.stderr if as_json else sys.stdout, flush=True)
                    seen = rollout, found
                    if found.outcome in CODES or not timeout:
                        break
        except asyncio.CancelledError:
            text = f"interrupted; {name} goes on without you"
            raise Failed(text, Exit.INTERRUPTED, Reason.INTERRUPTED) from None
    if seen is None:
        text = f"nothing was heard of WeightRollout {name} within {seconds:g} s"
        raise Failed(text, Exit.TIMEOUT, Reason.TIMEOUT)
    rollout, found = seen
    code = CODES.get(found.outcome, Exit.TIMEOUT)
    if as_json:
        options.tell({**found.to_dict(rollout), "exitCode": int(code)})
    elif code == Exit.TIMEOUT and timeout:
        print(f"error: not complete within {timeout:g} s: {found.line}", file=sys.stderr)
    return code
