"""Which files of a checkpoint folder are the weights, by their names and the index.

A cold vLLM is the measure: with ``model.safetensors.index.json`` it reads the files that the index
names and no others, without one every ``.safetensors`` file (0.32: ``_prepare_weights`` in
``model_loader/default_loader.py``). What it would read twice, or read otherwise than the index says,
is refused by name. Folders that people have hold more than weights: what is left out is told, in
the notes of `chosen`.

It knows names and headers, and reads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from hotweights_planner.errors import BadCheckpoint
from hotweights_planner.header import MAX_TENSORS, TensorEntry

INDEX = "model.safetensors.index.json"
_CONSOLIDATED_INDEX = "consolidated.safetensors.index.json"
INDEX_ENDING = ".safetensors.index.json"
_SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
# as save_pretrained of transformers names shards
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
# as vLLM's ShardedStateLoader names them (DEFAULT_PATTERN)
_RANK_PART = re.compile(r"model-rank-\d+-part-\d+\.safetensors")
# what is no safetensors, by the endings that are usual: the first that is found is told
_OTHER_FORMATS = (
    (
        (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"),
        "the weights are pickles ({}), and reading a pickle runs code that is in it",
        "save the model again with safetensors (save_pretrained does)",
    ),
    (
        (".distcp",),
        "it is a distributed checkpoint of torch ({}), which no engine loads",
        "gather it into safetensors (save_pretrained of the gathered state)",
    ),
    (
        (".gguf",),
        "the weights are GGUF ({}), whose tensors have other names and layouts",
        "publish the safetensors that it was made from",
    ),
)


def is_weights(name: str) -> bool:
    """Whether a file of that name can hold weights."""
    return name.endswith(".safetensors") and name[0] != "."


def _is_usual(name: str) -> bool:
    """Whether save_pretrained gives a model's own weights such a name."""
    shard = _SHARD.fullmatch(name)
    return name == "model.safetensors" or bool(shard and shard[1] == "model")


def is_side_file(name: str) -> bool:
    """Whether a file of that name belongs to the version beside the weights. A manifest cannot be
    part of itself.
    """
    return name.endswith(_SIDE_FILES) and name[0] != "." and not name.endswith(".manifest.json")


def check_some(names: Collection[str], where: str) -> None:
    """Raise `BadCheckpoint` when no file of the folder can hold weights, with what it is instead."""
    if any(map(is_weights, names)):
        return
    for endings, what, remedy in _OTHER_FORMATS:
        if found := [name for name in names if name.endswith(endings)]:
            # three of them tell enough
            raise BadCheckpoint(where, what.format(", ".join(found[:3])), remedy)
    raise BadCheckpoint(
        where,
        "no .safetensors file in it",
        "name the folder that holds config.json and the weights",
    )


def counting_index(names: Collection[str], where: str) -> str | None:
    """The index that says which files count; None: there is none for them. Raises `BadCheckpoint`
    where two could be meant.
    """
    own_layout = not _plain(names)
    indices = [
        name
        for name in sorted(names)
        if name.endswith(INDEX_ENDING) and (own_layout or not _is_consolidated(name))
    ]
    usual = _CONSOLIDATED_INDEX if own_layout else INDEX
    if usual in indices:
        return usual
    if len(indices) > 1:
        text = f"two indices, {indices[0]} and {indices[1]}, and none is {usual}"
        raise BadCheckpoint(where, text, f"leave one out: --ignore {indices[1]}")
    return indices[0] if indices else None


def chosen(
    names: Collection[str], index: str | None, listed: Mapping[str, str] | None, where: str
) -> tuple[list[str], list[str]]:
    """The files that count, in load order, and notes on what does not; ``listed`` is the index's
    file by tensor. Raises `BadCheckpoint`.
    """
    weights = {name for name in names if is_weights(name)}
    files = _unlisted(weights, where) if listed is None else _listed(weights, index, listed, where)
    left_out = sorted(weights - set(files))
    notes = []
    if own := [name for name in left_out if _is_consolidated(name)]:
        # not silently: what vLLM boots from has other tensors' names than what is published
        notes.append(
            f"{_some(own)} left out: the same weights in their authors' layout. A vLLM with "
            "--load-format auto boots from these: start it with --load-format safetensors, or "
            "publish them with --ignore 'model*.safetensors*'"
        )
    if adapters := [name for name in left_out if _is_adapter(name)]:
        notes.append(f"{_some(adapters)} left out: an adapter is no part of the model")
    if others := [
        name for name in left_out if not _is_consolidated(name) and not _is_adapter(name)
    ]:
        notes.append(
            f"{_some(others)} left out: {index} does not name it, and vLLM reads what that names"
        )
    return files, notes


def check_tensors(
    headers: Mapping[str, Sequence[TensorEntry]],
    listed: Mapping[str, str] | None,
    where: str,
    lenient: bool = False,
) -> list[str]:
    """Raise `BadCheckpoint` where files contradict each other or their index. ``lenient``: where the
    index is wrong about single tensors, return notes, since vLLM reads the files' own headers.
    """
    file_of: dict[str, str] = {}
    for file, entries in headers.items():
        for entry in entries:
            if entry.name in file_of:
                other = file_of[entry.name]
                text = f"tensor {entry.name} is in {other} and in {file}"
                spare = other if _is_usual(file) else file
                raise BadCheckpoint(where, text, f"keep one of them, or --ignore {spare}")
            file_of[entry.name] = file
    if not file_of:
        raise BadCheckpoint(where, "no tensor in any file")
    if len(file_of) > MAX_TENSORS:
        raise BadCheckpoint(
            where,
            f"{len(file_of)} tensors; at most {MAX_TENSORS} a version",
            "save the experts' weights stacked, one tensor a layer",
        )
    notes = []
    for what, tensors in _contradictions(file_of, listed or {}):
        more = f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""
        if not lenient:
            remedy = "mend the index, or publish what the files hold with --lenient"
            raise BadCheckpoint(where, what + more, remedy)
        notes.append(f"{where}: {what}{more}; what the files hold counts")
    return notes


def _contradictions(
    file_of: Mapping[str, str], listed: Mapping[str, str]
) -> list[tuple[str, list[str]]]:
    """In which the index and the headers disagree: a sentence about the first tensor, and all."""
    found = []
    if wrong := [tensor for tensor, file in listed.items() if file_of.get(tensor) != file]:
        text = f"says that {listed[wrong[0]]} has a tensor {wrong[0][:512]!a}; it does not"
        found.append((text, wrong))
    if listed and (unnamed := [tensor for tensor in file_of if tensor not in listed]):
        text = f"does not name tensor {unnamed[0]} of {file_of[unnamed[0]]}"
        found.append((text, unnamed))
    return found


def _listed(
    weights: set[str], index: str | None, listed: Mapping[str, str], where: str
) -> list[str]:
    named = set(listed.values())
    for name in sorted(named - weights):
        raise BadCheckpoint(
            where, f"names {name[:255]!a}, which is not in the folder", "copy the missing shard"
        )
    if index not in (INDEX, _CONSOLIDATED_INDEX):
        # vLLM does not look at such an index, and reads every file
        for name in sorted(_plain(weights - named)):
            raise BadCheckpoint(
                where,
                f"does not name {name}, which is in the folder; vLLM reads it, for it goes by "
                f"{INDEX} alone",
                f"delete the file, index it, or --ignore {name}",
            )
    return sorted(named)


def _unlisted(weights: set[str], where: str) -> list[str]:
    for name in sorted(weights):
        if _RANK_PART.fullmatch(name):
            text = f"{name} is one rank's piece (vLLM's sharded_state), not whole tensors"
            raise BadCheckpoint(where, text, "publish the checkpoint that it was made from")
    files = _plain(weights) or sorted(name for name in weights if not _is_adapter(name))
    if not files:
        raise BadCheckpoint(
            where,
            f"only an adapter, {min(weights)}; versions are whole models",
            "merge it into its base (merge_and_unload) and save that",
        )
    _check_numbering(files, where)
    return files


def _check_numbering(names: list[str], where: str) -> None:
    """Without an index, the shards' own numbering says whether one is missing."""
    shards = [found for name in names if (found := _SHARD.fullmatch(name))]
    present = {(found[1], int(found[2])) for found in shards}
    for found in shards:
        missing = (
            number for number in range(1, int(found[3]) + 1) if (found[1], number) not in present
        )
        if (number := next(missing, 0)) > 0:
            text = f"shard {number} of {int(found[3])} of {found[1]} is not in the folder"
            raise BadCheckpoint(where, text, "copy the missing shard and the index")


def _plain(names: Collection[str]) -> list[str]:
    return sorted(
        name
        for name in names
        if is_weights(name) and not _is_consolidated(name) and not _is_adapter(name)
    )


def _is_consolidated(name: str) -> bool:
    return name.startswith("consolidated")  # Mistral's name for it


def _is_adapter(name: str) -> bool:
    return name.startswith("adapter_model")  # as PEFT saves them


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
