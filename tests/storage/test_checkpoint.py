"""Checkpoint folders: which files count, and what about a folder is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hotweights_planner.errors import BadCheckpoint
from hotweights_storage.checkpoint import Checkpoint, read_checkpoint
from hotweights_storage.sources.file import open_folder


def shard(path: Path, **tensors: int) -> None:
    fields, end = {}, 0
    for name, nbytes in tensors.items():
        fields[name] = {"dtype": "U8", "shape": [nbytes], "data_offsets": [end, end + nbytes]}
        end += nbytes
    header = json.dumps(fields).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))


def index(folder: Path, **weight_map: str) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def read(folder: Path) -> Checkpoint:
    with open_folder(folder) as source:
        return read_checkpoint(source)


def refusal(folder: Path) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        read(folder)
    return str(caught.value)


A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    shard(tmp_path / B, c=3)
    shard(tmp_path / A, b=1, a=2)
    index(tmp_path, a=A, b=A, c=B)
    for name in (
        "config.json",
        "tokenizer.json",
        "merges.txt",
        "README.md",
        ".gitattributes",
        "hotweights.manifest.json",
    ):
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_shards_come_in_the_order_of_their_names_and_tensors_by_offset(sharded: Path) -> None:
    found = read(sharded)
    assert {file: [entry.name for entry in entries] for file, entries in found.headers.items()} == {
        A: ["b", "a"],
        B: ["c"],
    }
    assert list(found.headers) == [A, B]
    assert set(found.side_files) == {
        "config.json",
        "tokenizer.json",
        "merges.txt",
        "model.safetensors.index.json",
    }
    assert found.nbytes == 6


def test_without_an_index_the_numbering_counts(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert list(read(sharded).headers) == [A, B]
    (sharded / B).unlink()
    assert "shard 2 of 2 of model is not in the folder" in refusal(sharded)


def test_an_index_is_held_to_its_word(sharded: Path) -> None:
    index(sharded, a=A, b=A, c=B, d="model-3.safetensors")
    assert "names 'model-3.safetensors', which is not in the folder" in refusal(sharded)
    index(sharded, a=A, b=A, c=B, d=B)
    assert f"says that {B} has a tensor 'd'" in refusal(sharded)
    index(sharded, a=A, c=B)
    assert f"does not name tensor b of {A}" in refusal(sharded)
    index(sharded, a="../secret.safetensors", b=A, c=B)
    assert "names '../secret.safetensors', which is not in the folder" in refusal(sharded)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map":{},"weight_map":{}}', "[" * 99999],
)
def test_an_index_that_is_none_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(sharded)


def test_the_authors_own_layout_beside_the_shards_does_not_count(sharded: Path) -> None:
    shard(sharded / "consolidated.safetensors", x=1)
    assert list(read(sharded).headers) == [A, B]


def test_pickles_are_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pytorch_model.bin" in refusal(tmp_path)
    assert "save the model again with safetensors" in refusal(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "no .safetensors file" in refusal(tmp_path)


def test_one_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "a.safetensors", x=1)
    shard(tmp_path / "b.safetensors", x=1)
    assert "tensor x is in a.safetensors and in b.safetensors" in refusal(tmp_path)


def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "a.safetensors")
    assert "no tensor in any file" in refusal(tmp_path)


def test_a_header_of_a_gigabyte_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write((10**9).to_bytes(8, "little"))
        file.truncate(2 * 10**9)
    assert "a.safetensors: claims a header of 1000000000 bytes" in refusal(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "a.safetensors", x=1000)
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:-1])
    assert "truncated or out of range" in refusal(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(content[:20])
    assert "truncated" in refusal(tmp_path)


def test_a_huge_side_file_is_refused(sharded: Path) -> None:
    with (sharded / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)
    assert "1073741824 bytes for a side file" in refusal(sharded)
