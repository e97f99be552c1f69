"""``hotweights publish``: a checkpoint folder becomes a version.

It hashes the folder and writes the manifest, whose digest is the version's identity; with
``--emit`` it prints the WeightVersion that pins it. With ``--record-probes`` a vLLM, in whatever
environment has one, answers a few prompts from a cold load first; engines are held to these tokens
when they switch. Folders are as people have them: what does not count is left out with a word, and
what is wrong with the weights is said before any node reads them. It talks to no cluster.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
import yaml

from hotweights.commands.options import (
    CheckpointFolder,
    Json,
    Stall,
    counted,
    progress,
    source_reads,
)
from hotweights.commands.record_probes import PROBE_SECONDS, VLLM_PYTHON, Recorder
from hotweights.files import write_whole
from hotweights_common import sizes
from hotweights_crds.base import API_VERSION, LABEL_VALUE_PATTERN
from hotweights_crds.weightversion import SOURCE_PREFIXES
from hotweights_planner.compaction import MAX_MAPPINGS
from hotweights_planner.errors import BadCheckpoint
from hotweights_planner.layout import lay_out
from hotweights_planner.manifest import FILE_NAME, Manifest
from hotweights_planner.published import published_text
from hotweights_storage import saves
from hotweights_storage.checkpoint import read_checkpoint
from hotweights_storage.reader import Limits
from hotweights_storage.resolve import publish as publish_source
from hotweights_storage.source_reads import STALL_SECONDS
from hotweights_storage.sources.base import Source
from hotweights_storage.sources.file import open_folder
from hotweights_storage.weight_values import NotFinite, all_zero

NAMESPACE_PATTERN = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
MOST_SHOWN = 20  # tensors with strange values: where one layer is NaN, most are


def publish(
    checkpoint: CheckpointFolder,
    version: Annotated[
        str, typer.Option(metavar="V", help="Name of the version; pods will carry it as a label.")
    ],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Name of the model (default: the folder's name).")
    ] = "",
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"The manifest (default: {FILE_NAME} in the folder)."),
    ] = None,
    emit: Annotated[
        bool, typer.Option("--emit", help="Print the WeightVersion to apply, digest pinned.")
    ] = False,
    source_uri: Annotated[
        str,
        typer.Option(
            metavar="URI",
            help="Where the nodes find the folder, for --emit and for a manifest elsewhere "
            "(default: file:// and its path).",
        ),
    ] = "",
    namespace: Annotated[
        str, typer.Option(metavar="NS", help="With --emit: the WeightVersion's namespace.")
    ] = "",
    record_probes: Annotated[
        bool,
        typer.Option(
            "--record-probes",
            help=f"Record golden tokens with vLLM, run by the Python of ${VLLM_PYTHON}.",
        ),
    ] = False,
    probe_dtype: Annotated[
        str, typer.Option(metavar="T", help="With --record-probes: the pods' --dtype.")
    ] = "auto",
    probe_timeout: Annotated[
        float,
        typer.Option(
            metavar="S", min=0.1, help="With --record-probes: how long vLLM may take for them."
        ),
    ] = PROBE_SECONDS,
    probe_tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="GAP",
            min=0.0,
            help="With --record-probes: a prompt's tokens end before the first that leads the second "
            "best by less than this in logits, for other machines may answer otherwise there "
            "(default: 0.001 in float32, 0.02 in float16, 0.15 in bfloat16).",
        ),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Refuse unless this file, which the trainer writes last, is in the folder.",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Files of the folder that are no part of the version."),
    ] = None,
    lenient: Annotated[
        bool,
        typer.Option(
            "--lenient",
            help="Tell, and do not refuse: NaN, infinities, matrices of zeros, an index that is "
            "wrong about single tensors, a --require that is older than the weights.",
        ),
    ] = False,
    stall_seconds: Stall = STALL_SECONDS,
    as_json: Json = False,
) -> None:
    """Hash a checkpoint folder and write the manifest that makes it a version.

    Example: hotweights publish --checkpoint ./ckpt --model demo --version v1 --emit | kubectl apply
    -f -
    """
    reads = source_reads(stall_seconds)
    place = reads.call(str(checkpoint), "looking for it", checkpoint.resolve)
    model = model or place.name
    _check_names(model, version)
    if emit:
        _check_for_cluster(source_uri, namespace)
    target = output or checkpoint / FILE_NAME
    beside = reads.call(
        str(target), "looking for its folder", lambda: _is_beside(target, place, output is not None)
    )
    if emit and not beside and (ignore or lenient or record_probes):
        # agents hash a folder that has no manifest, and know nothing of these options
        raise typer.BadParameter(
            "with --emit and --ignore, --lenient or --record-probes the manifest has to lie in the "
            "folder; leave it out",
            param_hint="--output",
        )
    began = time.perf_counter()
    recorder = (
        Recorder(checkpoint, probe_dtype, probe_timeout, probe_tolerance) if record_probes else None
    )
    folder = reads.call(str(place), "looking for it", lambda: open_folder(checkpoint))

    def read(source: Source, limits: Limits) -> tuple[Manifest, list[str], list[str]]:
        found = read_checkpoint(source, ignore or (), lenient)

        def times_and_modes() -> list[str]:
            saves.check_finished(folder, found, require or (), lenient)
            return [*found.notes, *saves.notes(folder, found)]

        notes = reads.call(folder.uri, "looking at its files", times_and_modes)
        if not as_json:
            _warn(notes)
        # before the hashing, which may take long: a vLLM that is missing is heard of at once
        probes = recorder.record(found, reads, limits.stop) if recorder is not None else None
        values = NotFinite(found.headers)
        with progress("hashing", found.nbytes) as report:
            manifest = publish_source(
                source, model, version, found, probes, report, limits, values.look
            )
        return manifest, notes, [*values.faults(), *all_zero(manifest)]

    manifest, notes, faults = reads.read(folder.uri, lambda: folder, read)
    if faults and not lenient:
        raise BadCheckpoint(
            str(checkpoint),
            faults[0] + (f" (and {len(faults) - 1} more tensors)" if len(faults) > 1 else ""),
            "look into the training; --lenient publishes it all the same",
        )
    seen = [*pieces(manifest), *faults]  # what only the hashes show
    uri = source_uri or "file://" + quote(str(place))
    content = manifest.canonical if beside else published_text(manifest, uri)
    reads.call(str(target), "writing it", lambda: write_whole(target, content, "the manifest"))
    seconds = time.perf_counter() - began
    custom_resource = weight_version(manifest, uri, namespace) if emit else None
    if as_json:
        print(
            json.dumps(
                _summary(manifest, target, seconds, [*notes, *seen])
                | ({"weightVersion": custom_resource} if emit else {})
            )
        )
        return
    _warn(seen)
    rate = (
        f"{sizes.decimal(manifest.nbytes)} in {seconds:.1f} s "
        f"({sizes.decimal(manifest.nbytes / seconds)}/s)"
    )
    counts = (
        f"{counted(len(manifest.tensors), 'tensor')}, {counted(manifest.chunk_count, 'chunk')}, "
        f"{counted(len(manifest.files), 'side file')}"
    )
    typer.echo(f"Published {model} {version}: {counts}, {rate}", err=True)
    typer.echo(f"manifest {target}\ndigest   {manifest.digest}", err=True)
    if custom_resource is not None:
        print(yaml.safe_dump(custom_resource, sort_keys=False), end="")


def weight_version(manifest: Manifest, uri: str, namespace: str = "") -> dict[str, Any]:
    """The WeightVersion of a manifest, with its digest pinned."""
    metadata = {"name": object_name(manifest.model, manifest.version)} | (
        {"namespace": namespace} if namespace else {}
    )
    return {
        "apiVersion": API_VERSION,
        "kind": "WeightVersion",
        "metadata": metadata,
        "spec": {
            "model": manifest.model,
            "version": manifest.version,
            "source": {"uri": uri},
            "manifest": {"digest": manifest.digest},
        },
    }


def object_name(model: str, version: str) -> str:
    """``<model>-<version>`` as a Kubernetes name: lower case, and '-' for what may not stand
    there.
    """
    name = re.sub(r"[^a-z0-9.]+", "-", f"{model}-{version}".lower())
    # each part between dots has to begin and end with a letter or a digit
    return re.sub(r"-*\.[-.]*", ".", name).strip("-.")


def pieces(manifest: Manifest) -> list[str]:
    """A warning if engines may be unable to map the version for the number of its pieces: chunks
    that occur again within larger tensors are stored once, and each use is a mapping of its own.
    """
    count = lay_out(manifest, {}).mapping_count
    if count <= MAX_MAPPINGS:
        return []
    return [
        f"in memory it lies in {count} pieces, and engines, which map two versions, may refuse it "
        f"(InsufficientMemory): raise vm.max_map_count on the nodes to {6 * count} or more"
    ]


def _check_names(model: str, version: str) -> None:
    for option, value in (("--model", model), ("--version", version)):
        if not re.fullmatch(LABEL_VALUE_PATTERN, value):
            rule = (
                "at most 63 letters, digits, '.', '_' or '-', beginning and ending with a letter "
                "or digit"
            )
            raise typer.BadParameter(f"{value!r} is no label value; give {rule}", param_hint=option)


def _check_for_cluster(uri: str, namespace: str) -> None:
    """What the WeightVersion's own schema would refuse, said before anything is hashed."""
    if uri and not uri.startswith(SOURCE_PREFIXES):
        raise typer.BadParameter(
            f"{uri!r} is nothing that nodes can read; write file:///absolute/path or "
            "pvc://claim/path",
            param_hint="--source-uri",
        )
    if namespace and not re.fullmatch(NAMESPACE_PATTERN, namespace):
        rule = "at most 63 small letters, digits or '-', beginning and ending with no '-'"
        raise typer.BadParameter(
            f"{namespace!r} is no namespace; give {rule}", param_hint="--namespace"
        )


def _is_beside(target: Path, place: Path, named: bool) -> bool:
    """Whether the manifest is to lie in the checkpoint's folder ``place``; one that was ``named``
    may not become a file of the checkpoint there.
    """
    beside = target.resolve().parent == place
    if not named:
        return beside
    if beside and not target.name.endswith(".manifest.json"):
        text = (
            "it would become a file of the checkpoint; let its name end with .manifest.json, or "
            "write it elsewhere"
        )
        raise typer.BadParameter(
            f"{target} is in the checkpoint's folder, where {text}", param_hint="--output"
        )
    if not target.parent.is_dir():
        raise typer.BadParameter(
            f"the folder {target.parent} does not exist; make it first", param_hint="--output"
        )
    return beside


def _warn(texts: list[str]) -> None:
    for text in texts[:MOST_SHOWN]:
        typer.echo(f"warning: {text}", err=True)
    if len(texts) > MOST_SHOWN:
        typer.echo(f"warning: and {len(texts) - MOST_SHOWN} more", err=True)


def _summary(
    manifest: Manifest, target: Path, seconds: float, warnings: list[str]
) -> dict[str, Any]:
    return {
        "model": manifest.model,
        "version": manifest.version,
        "digest": manifest.digest,
        "manifest": str(target),
        "nbytes": manifest.nbytes,
        "tensors": len(manifest.tensors),
        "chunks": manifest.chunk_count,
        "files": len(manifest.files),
        "probes": len(manifest.probes or ()),
        "seconds": round(seconds, 3),
        "warnings": warnings,
    }
