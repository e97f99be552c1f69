"""What several commands share: options, progress on standard error, and sizes for people."""

from __future__ import annotations

from collections.abc import Iterator
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

from hotweights_storage.resolve import Progress as Report
from hotweights_storage.source_reads import REMEDY, SourceReads

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object for machines; errors too.")
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
