"""``hotweights plan``: what has to move from the version that is there to the next one.

It reads two manifests and writes the plan that workers and ranks follow. Where no previous manifest
is named, the coordinator's counts, then the one that the last commit on this host left, then
nothing: a plan for everything. No weights are read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

import typer

from hotweights.commands.options import Curve, Json, TokenFile, counted, waiting
from hotweights.commands.ranks import MAX_GROUPS_NBYTES, read_groups
from hotweights.device_memory import free_memory, suggested_bucket_nbytes
from hotweights.files import read_bounded, write_whole
from hotweights.home import CURRENT_MANIFEST, home
from hotweights.published import read_published, read_text
from hotweights_common import sizes
from hotweights_common.reasons import Reason
from hotweights_planner import plan as plans
from hotweights_planner.consumers import GroupMap, parse_group_map
from hotweights_planner.errors import BadManifest, BadPlan
from hotweights_planner.manifest import Manifest
from hotweights_planner.plan import Plan
from hotweights_planner.published import Published, parse_published
from hotweights_planner.verification import Report, verify
from hotweights_storage.errors import SourceUnavailable

COORDINATOR_SECONDS = 10.0  # for the answer; a manifest may have many MB


class Previous(NamedTuple):
    """What the plan starts from; ``published`` None: from nothing, and ``why``."""

    published: Published | None
    where: str
    why: str = "has no tensors"


def plan(
    following: Annotated[
        Path, typer.Option("--next", metavar="FILE", help="The next version's manifest.")
    ],
    prev: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The previous version's manifest (default: the coordinator's, then this host's "
            "last one, then nothing).",
        ),
    ] = None,
    bucket_mb: Annotated[
        int, typer.Option(metavar="MIB", min=1, max=1 << 20, help="Largest bucket.")
    ] = 64,
    auto: Annotated[
        bool, typer.Option("--auto", help="Choose the bucket's size by free memory instead.")
    ] = False,
    alpha: Annotated[
        float,
        typer.Option(
            metavar="A",
            min=0.001,
            max=1.0,
            help="With --auto: this part of the smallest device's, 1 GiB at most.",
        ),
    ] = 0.25,
    group_map: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="HOTWEIGHTS_GROUP_MAP",
            help="JSON: tensor patterns and the ranks that need them.",
        ),
    ] = None,
    coord_endpoint: Annotated[
        str,
        typer.Option(
            "--coord-endpoint",
            "--endpoint",
            metavar="URI[,URI]",
            envvar="HOTWEIGHTS_COORD",
            help="Whose current manifest is the previous one.",
        ),
    ] = "",
    token_file: TokenFile = None,
    curve: Curve = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Write no verification into the plan.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Let warnings fail.")] = False,
    source: Annotated[
        str,
        typer.Option(
            metavar="URI",
            help="Where the next version's folder is (default: what its manifest says).",
        ),
    ] = "",
    output: Annotated[Path, typer.Option(metavar="FILE", help="The plan.")] = Path(plans.FILE_NAME),
    as_json: Json = False,
) -> None:
    """Work out what has to move to get from one version to the next, and write it as a plan.

    Example: hotweights plan --prev m_prev.json --next m_next.json --bucket-mb 64 --output plan.json
    """
    if not output.parent.is_dir():
        raise typer.BadParameter(
            f"the folder {output.parent} does not exist; make it first", param_hint="--output"
        )
    published = read_published(following)
    uri = source or published.source or _folder_of(following, published.manifest)
    previous = _named_previous(prev, coord_endpoint, token_file, curve) or _hosts_previous(
        published
    )
    base = previous.published.manifest if previous.published else None
    free = free_memory() if auto else None
    bucket_nbytes = suggested_bucket_nbytes(alpha, free) if free else bucket_mb << 20
    renamed = previous.published is not None and _are_not_told_apart(previous.published, published)
    made = plans.build(published.manifest, base, uri, bucket_nbytes, _group_map(group_map), renamed)
    # --strict is about what verifying finds, so it asks for it in any case
    report = None if no_verify and not strict else verify(made, base)
    if report is not None:
        _check(report, strict, as_json)
    verification = report.document() if report is not None and not no_verify else None
    write_whole(output, made.text(verification), "the plan")
    if as_json:
        print(json.dumps(_summary(made, output, previous, report)))
        return
    chosen = (
        f" ({alpha:g} of what {free.device} has free: {sizes.decimal(free.nbytes)}; 1 GiB at most)"
        if free
        else ""
    )
    print(f"Planned {made.model_id} {made.version} {_from(made, previous)}: {_counts(made)}")
    print(
        f"plan   {output} ({counted(len(made.buckets), 'bucket')} of at most {made.bucket_nbytes >> 20} "
        f"MiB{chosen})"
    )
    print(f"digest {made.digest}")


def _named_previous(
    prev: Path | None, endpoint: str, token_file: Path | None, curve: Path | None
) -> Previous | None:
    if prev is not None:
        return Previous(_published_or_nothing(read_text(prev), str(prev)), str(prev))
    if endpoint:
        where = f"the coordinator at {endpoint}"
        text = _coordinators_manifest(endpoint, token_file, curve)
        return Previous(_published_or_nothing(text, where) if text else None, where)
    return None


def _hosts_previous(published: Published) -> Previous:
    """What this host committed last, where that is of the same model: nobody named it."""
    current = home() / CURRENT_MANIFEST
    if not current.exists():
        return Previous(None, "")
    found = _published_or_nothing(read_text(current), str(current))
    if (
        found is None
        or found.manifest.model == published.manifest.model
        or _are_not_told_apart(found, published)
    ):
        return Previous(found, str(current))
    return Previous(None, str(current), f"is of another model, {found.manifest.model}")


def _published_or_nothing(text: bytes, where: str) -> Published | None:
    """None for a document without tensors: nothing was there before."""
    if not text.strip():
        remedy = "leave --prev away, or write [] into it, to plan from nothing"
        raise BadManifest(where, "the previous manifest is an empty file", remedy)
    # what says "nothing" is short; a whole manifest is not to be read twice
    if len(text) < 4096:
        try:
            document = json.loads(text)
        except ValueError:  # the manifest's own reader says it better
            document = None
        if (
            document == []
            or document == {}
            or (isinstance(document, dict) and document.get("tensors") == [])
        ):
            return None
    return parse_published(text, where)


def _coordinators_manifest(
    endpoint: str, token_file: Path | None, curve: Path | None
) -> bytes | None:
    from hotweights_coordinator.client.client import Client  # zmq is needed for this alone
    from hotweights_coordinator.wire import auth
    from hotweights_coordinator.wire.messages import CallRefused

    with (
        Client(
            endpoint, auth.read_token(token_file), curve, timeout_seconds=COORDINATOR_SECONDS
        ) as client,
        waiting(f"the coordinator at {endpoint}"),
    ):
        try:
            return client.call("get_current_manifest").binary
        except CallRefused as error:
            if error.reason != Reason.NO_MANIFEST:
                raise
            return None


def _folder_of(path: Path, manifest: Manifest) -> str:
    """The URI of the folder beside a manifest without a source: it lies beside its weights, or
    nobody knows where they are. Raises `SourceUnavailable`.
    """
    folder = path.resolve().parent
    if not all((folder / file).is_file() for file in {tensor.file for tensor in manifest.tensors}):
        text = f"{path} does not say where its checkpoint is, and the files are not beside it"
        raise SourceUnavailable(f"{text}; name the folder with --source file:///…")
    return "file://" + quote(str(folder))


def _named_after_folder(published: Published) -> bool:
    """Whether the model's name is only what `publish` makes up without --model; it then tells no
    models apart.
    """
    folder = unquote(urlsplit(published.source or "").path).rstrip("/").rpartition("/")[2]
    return folder == published.manifest.model


def _are_not_told_apart(one: Published, other: Published) -> bool:
    return _named_after_folder(one) and _named_after_folder(other)


def _group_map(path: Path | None) -> GroupMap | None:
    if path is None:
        return None
    return parse_group_map(
        read_bounded(path, MAX_GROUPS_NBYTES, "name a JSON file with --group-map"),
        str(path),
        read_groups(os.environ.get("HOTWEIGHTS_TP_GROUPS")),
    )


def _check(report: Report, strict: bool, as_json: bool) -> None:
    errors = [problem["error"] for problem in report.problems]
    warnings = [warning["warning"] for warning in report.warnings]
    if strict:
        errors += warnings
    elif not as_json:
        for warning in warnings:
            typer.echo(f"warning: {warning}", err=True)
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        remedy = "look at it, and leave --strict away if it is meant" if strict else ""
        raise BadPlan("plan", errors[0] + more, remedy)


def _from(made: Plan, previous: Previous) -> str:
    if previous.published is not None:
        return f"from {made.base_version} ({previous.where})"
    return (
        f"from nothing ({previous.where} {previous.why})"
        if previous.where
        else "from nothing (no previous manifest)"
    )


def _counts(made: Plan) -> str:
    chunks = sum(len(chunks) for chunks in made.chunks_in_order())
    moved = f"{chunks} of {made.manifest.chunk_count} chunks, {sizes.decimal(made.total_nbytes)}"
    gone = f", {counted(len(made.removed), 'tensor')} gone" if made.removed else ""
    return f"{moved} to move, {sizes.decimal(made.unchanged_nbytes)} unchanged{gone}"


def _summary(made: Plan, output: Path, previous: Previous, report: Report | None) -> dict[str, Any]:
    return {
        "plan": str(output),
        "digest": made.digest,
        "model": made.model_id,
        "version": made.version,
        "baseVersion": made.base_version,
        "previous": previous.where or None,
        "source": made.source,
        "buckets": len(made.buckets),
        "items": made.item_count,
        "bucketBytes": made.bucket_nbytes,
        "totalBytes": made.total_nbytes,
        "unchangedBytes": made.unchanged_nbytes,
        "removed": list(made.removed),
        "warnings": [warning["warning"] for warning in report.warnings] if report else [],
    }
