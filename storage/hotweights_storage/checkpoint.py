"""Reads a Hugging-Face-style checkpoint folder: what tensors its weights hold, and what else belongs
to it.

Only ``.safetensors`` are weights; a folder of pickles is refused, because reading one runs its
code. Which of them count, says `weight_files`. Load order is by file name, then by offset. What
nobody asks for may be unreadable: a link that leads nowhere is refused only where it is weights, or
a file that belongs to them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from hotweights_planner.errors import BadCheckpoint
from hotweights_planner.header import PREFIX_NBYTES, TensorEntry, header_nbytes, parse_header
from hotweights_planner.manifest import MAX_SIDE_FILE_NBYTES
from hotweights_storage import weight_files
from hotweights_storage.errors import SourceRefused, SourceUnavailable
from hotweights_storage.sources.base import Source, read_small

MAX_INDEX_NBYTES = 128 << 20  # a line of some hundred bytes for each of `MAX_TENSORS`

Entries = Mapping[str, int | SourceRefused | SourceUnavailable]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``headers`` by file in load order; ``side_files`` by name with their sizes; ``notes``: what
    of the folder was left out or overlooked, a sentence each.
    """

    headers: Mapping[str, tuple[TensorEntry, ...]]
    side_files: Mapping[str, int]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; headers and side files are not counted."""
        return sum(entry.nbytes for entries in self.headers.values() for entry in entries)


def read_checkpoint(
    source: Source, ignore: Sequence[str] = (), lenient: bool = False
) -> Checkpoint:
    """What is in the folder, after everything about it that can be checked without reading the
    weights. ``ignore`` are patterns (fnmatch) of names that do not count, ``lenient`` as
    `weight_files.check_tensors` says. Raises `BadCheckpoint`, and what the source does.
    """
    entries = source.entries()
    found = _without_ignored(entries, ignore, source.uri)
    if not any(map(weight_files.is_weights, found)) and any(map(weight_files.is_weights, entries)):
        raise BadCheckpoint(
            source.uri, "--ignore leaves no .safetensors file of it", "let the patterns fit fewer"
        )
    weight_files.check_some(found.keys(), source.uri)
    index = weight_files.counting_index(found.keys(), source.uri)
    where = f"{source.uri}/{index}" if index else source.uri
    listed = _weight_map(source, index, nbytes_of(found, index)) if index else None
    files, notes = weight_files.chosen(found.keys(), index, listed, where)
    headers = {file: read_header(source, file, nbytes_of(found, file)) for file in files}
    notes += weight_files.check_tensors(headers, listed, where, lenient)
    side_files = {name: nbytes_of(found, name) for name in found if weight_files.is_side_file(name)}
    for name, nbytes in side_files.items():
        if nbytes > MAX_SIDE_FILE_NBYTES:
            raise BadCheckpoint(
                f"{source.uri}/{name}",
                f"{nbytes} bytes for a side file",
                f"move it out of the folder, or --ignore {name}",
            )
    return Checkpoint(headers, side_files, tuple(notes))


def read_header(source: Source, file: str, file_nbytes: int) -> tuple[TensorEntry, ...]:
    """The tensors of one file by offset; only its header is read. Raises `BadCheckpoint`, and what
    the source does.
    """
    where = f"{source.uri}/{file}"
    nbytes = header_nbytes(read_small(source, file, PREFIX_NBYTES), file_nbytes, where)
    return parse_header(read_small(source, file, nbytes, PREFIX_NBYTES), file_nbytes, where)


def nbytes_of(entries: Entries, name: str) -> int:
    """The size of a file that is wanted. Raises what the source found instead of it."""
    found = entries[name]
    if isinstance(found, int):
        return found
    raise type(found)(
        f"{found}; if the model does not need it: hotweights publish --ignore {name}",
        found.reason,
    )


def _without_ignored(entries: Entries, ignore: Sequence[str], where: str) -> Entries:
    for pattern in ignore:
        if not any(fnmatchcase(name, pattern) for name in entries):
            raise BadCheckpoint(
                where, f"--ignore {pattern!a} fits no file in it", "correct the pattern, or drop it"
            )
    return {
        name: found
        for name, found in entries.items()
        if not any(fnmatchcase(name, pattern) for pattern in ignore)
    }


def _weight_map(source: Source, index: str, nbytes: int) -> dict[str, str]:
    where = f"{source.uri}/{index}"
    if nbytes > MAX_INDEX_NBYTES:
        raise BadCheckpoint(
            where, f"an index of {nbytes} bytes; at most {MAX_INDEX_NBYTES} are read"
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
