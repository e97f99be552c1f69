"""What several commands share: options, how they are interrupted, and progress on standard error."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason
from hotweights_storage.resolve import Progress as Report
from hotweights_storage.source_reads import REMEDY, SourceReads

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object for machines; errors too.")
]
JsonAnyway = Annotated[
    bool, typer.Option("--json", help="It prints JSON in any case; with this, errors too.")
]
CheckpointFolder = Annotated[
    Path,
    typer.Option(
        "--checkpoint", metavar="DIR", help="Folder with .safetensors, config and tokenizer files."
    ),
]

Stall = Annotated[
    float,
    typer.Option(
        "--stall-seconds",
        metavar="S",
        min=0.1,
        help="How long one read of the folder may take before it counts as hung; an archive that "
        "brings files back from tape needs more.",
    ),
]

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
    Path | None,
    typer.Option(metavar="FILE", help="File with the token (default: $HOTWEIGHTS_COORD_TOKEN)."),
]
Curve = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder with CURVE keys, see coord-keys.")
]


LOG_VARIABLE = "HOTWEIGHTS_LOG_LEVEL"
LOG_LEVELS = ("debug", "info", "warning", "error")
SILENT_SECONDS = 2.0  # then whoever sits there is told what is waited for


class Interrupted(HotweightsError):
    """Ctrl-C, where something was done already: the text says what, and how to undo it."""

    reason = Reason.INTERRUPTED


def counted(count: int, noun: str) -> str:
    """``1 bucket``, ``2 buckets``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@contextmanager
def interrupted_as(text: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C within leaves what ``text`` says at that moment. Raises `Interrupted`."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {text()}") from None


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Where this takes long, say so on standard error while a terminal is there to see it."""
    if not sys.stderr.isatty():
        yield
        return
    timer = threading.Timer(SILENT_SECONDS, typer.echo, [f"waiting for {what}"], {"err": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class BadLogLevel(HotweightsError):
    """The environment names a level that there is not."""

    reason = Reason.WRONG_USAGE


def log_to_stderr(default: str, layout: str) -> None:
    """Log what $HOTWEIGHTS_LOG_LEVEL says, else from level ``default`` on. Raises `BadLogLevel`."""
    level = os.environ.get(LOG_VARIABLE) or default
    if level.lower() not in LOG_LEVELS:
        raise BadLogLevel(f"${LOG_VARIABLE} is {level!r}; it may be {', '.join(LOG_LEVELS)}")
    logging.basicConfig(level=level.upper(), format=layout)


def source_reads(stall_seconds: float) -> SourceReads:
    """Reads that end with an error when one does not return: of a hard mount whose server is gone
    no signal would end them.
    """
    return SourceReads(stall_seconds, f"{REMEDY}; --stall-seconds allows more")


@contextmanager
def progress(what: str, nbytes: int) -> Iterator[Report]:
    """A bar of bytes on standard error while a terminal is there to see it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=nbytes)
        yield lambda done: bar.advance(task, done)
