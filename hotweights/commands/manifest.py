"""``hotweights manifest``: what can be asked of a manifest."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hotweights.commands.options import Json, Stall, progress, source_reads
from hotweights.published import read_published
from hotweights_common import sizes
from hotweights_planner.manifest import FILE_NAME, Manifest
from hotweights_storage.reader import Limits
from hotweights_storage.resolve import Difference, beside
from hotweights_storage.resolve import verify as verify_source
from hotweights_storage.source_reads import STALL_SECONDS
from hotweights_storage.sources.base import Source
from hotweights_storage.sources.file import open_folder

MOST_SHOWN = 20  # differences: a folder of another version differs in every chunk

app = typer.Typer(help="Check manifests.", no_args_is_help=True)


@app.callback()
def manifests() -> None:
    """Check manifests."""


@app.command("verify")
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The checkpoint's folder.")],
    manifest: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"The manifest (default: {FILE_NAME} in the folder)."),
    ] = None,
    stall_seconds: Stall = STALL_SECONDS,
    as_json: Json = False,
) -> None:
    """Hold every byte of a checkpoint folder against its manifest; exit code 1 if one differs."""
    path = manifest or folder / FILE_NAME
    reads = source_reads(stall_seconds)

    def read(source: Source, limits: Limits) -> tuple[Manifest, list[Difference], list[str]]:
        expected = reads.call(str(path), "reading it", lambda: read_published(path).manifest)
        with progress("verifying", expected.nbytes) as report:
            differences = verify_source(source, expected, report, limits)
        return expected, differences, beside(source, expected)

    expected, differences, more = reads.read(str(folder), lambda: open_folder(folder), read)
    if as_json:
        shown = [asdict(difference) for difference in differences]
        print(
            json.dumps(
                {
                    "ok": not differences,
                    "digest": expected.digest,
                    "differences": shown,
                    "beside": more,
                }
            )
        )
    elif differences:
        for difference in differences[:MOST_SHOWN]:
            typer.echo(f"error: {difference.message}", err=True)
        if len(differences) > MOST_SHOWN:
            typer.echo(f"error: and {len(differences) - MOST_SHOWN} more", err=True)
    else:
        if more:
            typer.echo(
                f"warning: {', '.join(more[:MOST_SHOWN])} in the folder: no part of the version, but "
                "a vLLM that starts from the folder reads it",
                err=True,
            )
        print(
            f"{folder} is {expected.model} {expected.version} ({sizes.decimal(expected.nbytes)}, "
            f"{expected.digest})"
        )
    if differences:
        raise typer.Exit(1)
