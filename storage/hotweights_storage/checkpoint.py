"""Reads a Hugging-Face-style checkpoint folder: which files are weights, what tensors they hold,
what else belongs to it.

Only ``.safetensors`` are weights; a folder of pickles is refused, because reading one runs its
code. The index, where there is one, decides which files count and is held to its word in both
directions: a tensor or shard too many is as wrong as one too few, for an engine would load
something else than what was published. Load order is by file name, then by offset.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hotweights_planner.errors import BadCheckpoint
from hotweights_planner.header import (
    MAX_HEADER_NBYTES,
    MAX_TENSORS,
    PREFIX_NBYTES,
    TensorEntry,
    header_nbytes,
    parse_header,
)
from hotweights_planner.manifest import MAX_SIDE_FILE_NBYTES
from hotweights_storage.sources.base import Source, read_small

# what torch.save writes, by the endings that are usual
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
# as save_pretrained of transformers names shards and their index
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``headers`` by file in load order; ``side_files`` by name with their sizes."""

    headers: Mapping[str, tuple[TensorEntry, ...]]
    side_files: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; headers and side files are not counted."""
        return sum(entry.nbytes for entries in self.headers.values() for entry in entries)


def read_checkpoint(source: Source) -> Checkpoint:
    """What is in the folder, after everything about it that can be checked without reading the
    weights. Raises `BadCheckpoint`, and what the source does.
    """
    sizes = source.files()
    weights = {
        name: nbytes
        for name, nbytes in sizes.items()
        if name.endswith(".safetensors") and name[0] != "."
    }
    if not weights:
        raise BadCheckpoint(source.uri, *_no_weights(sizes))
    indices = [name for name in sizes if name.endswith(_INDEX)]
    if len(indices) > 1:
        raise BadCheckpoint(
            source.uri, f"two indices, {indices[0]} and {indices[1]}", "keep the one that counts"
        )
    where = f"{source.uri}/{indices[0]}" if indices else source.uri
    listed = _weight_map(source, indices[0], sizes[indices[0]]) if indices else None
    chosen = _chosen(weights, listed, where)
    headers = {name: read_header(source, name, weights[name]) for name in chosen}
    _check_tensors(headers, listed, where)
    side_files = {name: nbytes for name, nbytes in sizes.items() if _is_side_file(name)}
    for name, nbytes in side_files.items():
        if nbytes > MAX_SIDE_FILE_NBYTES:
            raise BadCheckpoint(
                f"{source.uri}/{name}",
                f"{nbytes} bytes for a side file",
                "move it out of the folder",
            )
    return Checkpoint(headers, side_files)


def read_header(source: Source, file: str, file_nbytes: int) -> tuple[TensorEntry, ...]:
    """The tensors of one file by offset; only its header is read. Raises `BadCheckpoint`, and what
    the source does.
    """
    where = f"{source.uri}/{file}"
    nbytes = header_nbytes(read_small(source, file, PREFIX_NBYTES), file_nbytes, where)
    return parse_header(read_small(source, file, nbytes, PREFIX_NBYTES), file_nbytes, where)


def _no_weights(sizes: Mapping[str, int]) -> tuple[str, str]:
    pickles = [name for name in sizes if name.endswith(_PICKLES)]
    if pickles:  # three of them tell enough
        what = (
            f"the weights are pickles ({', '.join(pickles[:3])}), and reading a pickle runs code "
            "that is in it"
        )
        return what, "save the model again with safetensors (save_pretrained does)"
    return "no .safetensors file in it", "name the folder that holds config.json and the weights"


def _is_side_file(name: str) -> bool:
    # a manifest cannot be part of itself
    return name.endswith(_SIDE_FILES) and name[0] != "." and not name.endswith(".manifest.json")


def _weight_map(source: Source, index: str, nbytes: int) -> dict[str, str]:
    where = f"{source.uri}/{index}"
    # it says of each tensor less than a header does
    if nbytes > MAX_HEADER_NBYTES:
        raise BadCheckpoint(
            where, f"an index of {nbytes} bytes; at most {MAX_HEADER_NBYTES} are read"
        )
    try:
        document = json.loads(read_small(source, index, nbytes), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(where, f"not JSON: {error}") from error
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise BadCheckpoint(where, "has no weight_map from tensor to file")
    return weight_map


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice")
    return fields


def _chosen(weights: Mapping[str, int], listed: Mapping[str, str] | None, where: str) -> list[str]:
    """The files that count, in load order."""
    if listed is None:
        # consolidated files are the same weights once more, unless there is nothing else
        names = sorted(name for name in weights if not name.startswith("consolidated")) or sorted(
            weights
        )
        _check_numbering(names, where)
        return names
    named = set(listed.values())
    for name in sorted(named - weights.keys()):
        raise BadCheckpoint(
            where, f"names {name[:255]!a}, which is not in the folder", "copy the missing shard"
        )
    for name in sorted(weights.keys() - named):
        # the same weights once more, in the layout of their authors
        if not name.startswith("consolidated"):
            raise BadCheckpoint(
                where,
                f"does not name {name}, which is in the folder",
                "delete the file, or index it",
            )
    return sorted(named)


def _check_numbering(names: list[str], where: str) -> None:
    """Without an index, the shards' own numbering says whether one is missing."""
    shards = [found for name in names if (found := _SHARD.fullmatch(name))]
    present = {(found[1], int(found[2])) for found in shards}
    for found in shards:
        missing = (
            number for number in range(1, int(found[3]) + 1) if (found[1], number) not in present
        )
        if (number := next(missing, 0)) > 0:
            text = f"shard {number} of {found[3]} of {found[1]} is not in the folder"
            raise BadCheckpoint(where, text, "copy the missing shard and the index")


def _check_tensors(
    headers: Mapping[str, tuple[TensorEntry, ...]], listed: Mapping[str, str] | None, where: str
) -> None:
    file_of: dict[str, str] = {}
    for file, entries in headers.items():
        for entry in entries:
            if entry.name in file_of:
                text = f"tensor {entry.name} is in {file_of[entry.name]} and in {file}"
                raise BadCheckpoint(where, text, "keep one of them")
            file_of[entry.name] = file
    if not file_of:
        raise BadCheckpoint(where, "no tensor in any file")
    if len(file_of) > MAX_TENSORS:
        raise BadCheckpoint(where, f"{len(file_of)} tensors; at most {MAX_TENSORS} a version")
    for tensor, file in (listed or {}).items():
        if file_of.get(tensor) != file:
            raise BadCheckpoint(
                where, f"says that {file} has a tensor {tensor[:512]!a}; it does not"
            )
    if listed is not None:
        for tensor, file in file_of.items():
            if tensor not in listed:
                raise BadCheckpoint(where, f"does not name tensor {tensor} of {file}")
