"""``hotweights tp-groups``, ``verify-tp`` and ``bucket-suggest``: calculators for who needs what,
and how much at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hotweights.commands.options import Json, JsonAnyway
from hotweights.device_memory import free_memory, suggested_bucket_nbytes
from hotweights.files import read_bounded, write_whole
from hotweights_common import sizes
from hotweights_planner.consumers import Groups, check_groups, contiguous_groups, parse_groups

MAX_GROUPS_NBYTES = 16 << 20  # room for the 1 << 20 ranks that --world-size allows at most

WorldSize = Annotated[
    int | None, typer.Option(metavar="N", min=1, max=1 << 20, help="How many ranks there are.")
]
TpGroups = Annotated[
    str | None,
    typer.Option(
        metavar="JSON|FILE",
        envvar="HOTWEIGHTS_TP_GROUPS",
        help='Groups of ranks: {"0": [0, 1], "1": [2, 3]}.',
    ),
]


def tp_groups(
    world_size: Annotated[
        int, typer.Option(metavar="N", min=1, max=1 << 20, help="How many ranks there are.")
    ],
    tp: Annotated[int, typer.Option(metavar="N", min=1, help="Ranks in a group.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write them there (default: print them).")
    ] = None,
    as_json: JsonAnyway = False,
) -> None:
    """Divide ranks into tensor-parallel groups of neighbours, as JSON."""
    del as_json
    text = json.dumps(contiguous_groups(world_size, tp))
    if output is None:
        print(text)
    else:
        write_whole(output, text.encode() + b"\n", "the groups")


def verify_tp(
    tp_groups: Annotated[
        str,
        typer.Option(metavar="JSON|FILE", envvar="HOTWEIGHTS_TP_GROUPS", help="Groups of ranks."),
    ],
    world_size: Annotated[
        int, typer.Option(metavar="N", min=1, max=1 << 20, help="How many ranks there are.")
    ],
    as_json: Json = False,
) -> None:
    """Check that every rank is in exactly one tensor-parallel group; exit code 1 if not."""
    groups = read_groups(tp_groups) or {}
    report = check_groups(groups, world_size)
    if as_json:
        document = {"ok": not report.problems, "groups": groups, "world_size": world_size}
        print(json.dumps(document | {"problems": report.problems, "warnings": report.warnings}))
    else:
        for problem in report.problems:
            typer.echo(f"error: {problem}", err=True)
        for warning in report.warnings:
            typer.echo(f"warning: {warning}", err=True)
        if not report.problems:
            print(f"{len(groups)} groups cover the ranks 0 to {world_size - 1}, each once")
    if report.problems:
        raise typer.Exit(1)


def bucket_suggest(
    alpha: Annotated[
        float, typer.Option(metavar="A", min=0.001, max=1.0, help="Part of the free memory.")
    ] = 0.25,
    as_json: Json = False,
) -> None:
    """Print a bucket size in MiB for `plan --bucket-mb`: a part of what the smallest device has
    free.
    """
    free = free_memory()
    nbytes = suggested_bucket_nbytes(alpha, free)
    if as_json:
        print(
            json.dumps(
                {
                    "bucketMb": nbytes >> 20,
                    "freeBytes": free.nbytes,
                    "device": free.device,
                    "alpha": alpha,
                }
            )
        )
        return
    print(nbytes >> 20)
    typer.echo(
        f"{alpha:g} of the {sizes.decimal(free.nbytes)} that {free.device} has free, 1 MiB to "
        "1 GiB",
        err=True,
    )


def read_groups(given: str | None) -> Groups | None:
    """Groups as an option or a variable gives them: JSON, or a file that has it; None where nothing
    is given. Raises `SourceUnavailable`, and what `parse_groups` raises.
    """
    if not given:
        return None
    if given.lstrip().startswith("{"):
        return parse_groups(given, "tensor-parallel groups")
    return parse_groups(
        read_bounded(Path(given), MAX_GROUPS_NBYTES, "name a JSON file, or give the JSON itself"),
        given,
    )
