"""``hotweights verify-plan``: whether a plan is one, and whether it fits the ranks and the version
that it is meant for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hotweights.commands.options import Json
from hotweights.commands.ranks import TpGroups, WorldSize, read_groups
from hotweights.files import read_bounded
from hotweights.published import read_published
from hotweights_common import sizes
from hotweights_planner import plan as plans
from hotweights_planner.errors import BadPlan
from hotweights_planner.plan import Plan
from hotweights_planner.plan_document import MAX_PLAN_NBYTES
from hotweights_planner.verification import verify

MOST_SHOWN = 20  # problems: one mistake may be in every bucket


def verify_plan(
    plan: Annotated[Path, typer.Option(metavar="FILE", help="The plan.")],
    prev: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Hold it against this previous manifest too."),
    ] = None,
    world_size: WorldSize = None,
    tp_groups: TpGroups = None,
    require_consumers: Annotated[
        bool, typer.Option("--require-consumers", help="Every bucket must say which ranks need it.")
    ] = False,
    enforce_tp_superset: Annotated[
        bool,
        typer.Option(
            "--enforce-tp-superset", help="A bucket goes to whole tensor-parallel groups only."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a plan: every byte of it, and whether its ranks fit; exit code 1 if something is
    wrong.
    """
    groups = read_groups(tp_groups)
    if enforce_tp_superset and groups is None:
        raise typer.BadParameter(
            "needs the groups; name them with --tp-groups", param_hint="--enforce-tp-superset"
        )
    found = read_plan(plan)
    base = read_published(prev).manifest if prev else None
    report = verify(found, base, world_size, groups, require_consumers, enforce_tp_superset)
    if as_json:
        print(json.dumps({"ok": not report.problems, **report.document()}))
    else:
        for problem in report.problems[:MOST_SHOWN]:
            bucket = f"bucket {problem['bucket_id']} " if "bucket_id" in problem else ""
            typer.echo(f"error: {plan}: {bucket}{problem['error']}", err=True)
        if len(report.problems) > MOST_SHOWN:
            typer.echo(f"error: and {len(report.problems) - MOST_SHOWN} more", err=True)
        for warning in report.warnings:
            typer.echo(f"warning: {warning['warning']}", err=True)
        if not report.problems:
            size = (
                f"{report.items} items in {report.buckets} buckets, "
                f"{sizes.decimal(found.total_nbytes)}"
            )
            print(
                f"{plan} leads to {found.model_id} {found.version} from "
                f"{found.base_version or 'nothing'}: {size}"
            )
            print(f"digest {found.digest}")
    if report.problems:
        raise typer.Exit(1)


def read_plan(path: Path) -> Plan:
    """The plan of a file, checked; raises `BadPlan` or `SourceUnavailable`."""
    text = read_bounded(
        path, MAX_PLAN_NBYTES, "write it with `hotweights plan`, or name another file"
    )
    if not text.strip():
        raise BadPlan(str(path), "it is empty")
    return plans.parse(text, str(path))
