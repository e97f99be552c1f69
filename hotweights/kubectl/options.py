"""What all commands of the plugin share: where the cluster is, how a command ends, and what it
raises.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason
from hotweights_kube.client import Api
from hotweights_kube.errors import KubeError, NotFound
from hotweights_operator.runtime.observe import Malformed

REQUEST_SECONDS = 15.0


class Exit(IntEnum):
    """Exit codes: what a script may rely on."""

    DONE = 0
    """It is so: the rollout is complete, the command was done, nothing is wrong."""
    NOT_SO = 1
    """It is not so, and will not be by waiting: degraded, rolled back, refused, found wrong."""
    USAGE = 2
    """Wrong usage; also a rollout or a version that there is not."""
    TIMEOUT = 3
    """It was not so within the time given."""
    NOT_ASKED = 4
    """The cluster could not be asked: no kubeconfig, nobody answers, no right to."""
    INTERRUPTED = 130
    """Ctrl-C."""


class Failed(HotweightsError):
    """A command ends so. The text says what is, and what to do."""

    def __init__(self, message: str, code: Exit, reason: str) -> None:
        super().__init__(message, reason)
        self.code = code


def not_found(what: str) -> Failed:
    """Something was named that there is not."""
    return Failed(what, Exit.USAGE, "NotFound")


Rollout = Annotated[str, typer.Argument(metavar="ROLLOUT", help="Name of the WeightRollout.")]
Namespace = Annotated[
    str,
    typer.Option("--namespace", "-n", metavar="NAME", help="Default: that of the context."),
]
AllNamespaces = Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of all namespaces.")]
Context = Annotated[
    str, typer.Option("--context", metavar="NAME", help="Of the kubeconfig (default: its current).")
]
Kubeconfig = Annotated[
    Path | None,
    typer.Option("--kubeconfig", metavar="FILE", help="Default: $KUBECONFIG, then ~/.kube/config."),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object for machines; errors too.")
]


@dataclass(frozen=True, slots=True)
class Place:
    """Which cluster, by whose kubeconfig, and which namespace; empty: the context's."""

    namespace: str = ""
    context: str = ""
    kubeconfig: Path | None = None
    everywhere: bool = False

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[Api, str | None]]:
        """The API and the namespace (None: all). Raises `Failed` for what goes wrong within."""
        try:
            async with await Api.connect(
                self.kubeconfig,
                context=self.context or None,
                timeout_seconds=REQUEST_SECONDS,
                user_agent="kubectl-hotweights",
            ) as api:
                yield api, None if self.everywhere else self.namespace or api.namespace
        except NotFound as error:
            raise not_found(str(error)) from error
        except Malformed as error:
            raise Failed(str(error), Exit.NOT_ASKED, "Malformed") from error
        except KubeError as error:
            # true of what runs for ever, not of us
            text = str(error).removesuffix(". It is tried again")
            raise Failed(text, Exit.NOT_ASKED, type(error).__name__) from error


def run(command: Coroutine[Any, Any, int]) -> None:
    """A command, to its end. Raises `typer.Exit` with its exit code."""
    raise typer.Exit(asyncio.run(command))


def tell(value: Any) -> None:
    """One JSON object on one line, at once: whoever reads a pipe waits for it."""
    print(json.dumps(value), flush=True)


def wrong_usage(message: str) -> Failed:
    """Options that do not go together."""
    return Failed(message, Exit.USAGE, Reason.WRONG_USAGE)
