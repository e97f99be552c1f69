"""What becomes of folders that people really have: `folder_shapes` is the table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hotweights_common.errors import HotweightsError
from hotweights_planner.errors import BadCheckpoint
from hotweights_planner.manifest import FILE_NAME, Manifest
from hotweights_storage.checkpoint import read_checkpoint
from hotweights_storage.errors import SourceUnavailable
from hotweights_storage.resolve import publish, resolve, verify
from hotweights_storage.sources.file import open_folder
from hotweights_storage.sources.folder import FileSource
from tests.storage import folder_shapes
from tests.storage.folder_shapes import SHAPES, Shape
from tests.storage.folder_table import PAGE, opened, page


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "snapshot"
    folder.mkdir(parents=True)
    return folder


def version(source: FileSource, shape: Shape) -> tuple[Manifest, str]:
    found = read_checkpoint(source, shape.ignore, shape.lenient)
    return publish(source, "m", "v1", found), "; ".join(found.notes)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.tensors], ids=lambda shape: shape.name)
def test_a_folder_that_is_taken(folder: Path, shape: Shape) -> None:
    shape.build(folder)
    with opened(shape, folder) as source:
        manifest, told = version(source, shape)
        assert "".join(sorted(tensor.name for tensor in manifest.tensors)) == shape.tensors
        assert shape.told in told
        assert bool(shape.told) == bool(told)
        # agents know no options: they go by the manifest
        (folder / FILE_NAME).write_bytes(manifest.canonical)
        assert resolve(source, "m", "v1") == manifest
        assert verify(source, manifest) == []


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.refused], ids=lambda shape: shape.name)
def test_a_folder_that_is_refused(folder: Path, shape: Shape) -> None:
    shape.build(folder)
    with opened(shape, folder) as source, pytest.raises(HotweightsError) as caught:
        version(source, shape)
    assert re.search(shape.refused, str(caught.value)), str(caught.value)
    assert "; " in str(caught.value), "it says what to do"


def test_the_table_is_one_of_many_kinds() -> None:
    assert len(SHAPES) >= 25
    assert len({shape.kind for shape in SHAPES}) >= 6
    assert all(bool(shape.tensors) != bool(shape.refused) for shape in SHAPES)


def test_the_page_says_what_publish_says_today() -> None:
    assert PAGE.read_text() == page(), "write it anew: python -m tests.storage.folder_table"


def test_the_number_of_tensors_has_a_bound_with_a_way_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_shapes.weights(folder / "model.safetensors", "abc")
    monkeypatch.setattr("hotweights_storage.weight_files.MAX_TENSORS", 2)
    with (
        open_folder(folder) as source,
        pytest.raises(BadCheckpoint, match="experts' weights stacked"),
    ):
        read_checkpoint(source)


def test_a_manifest_that_cannot_be_read_is_not_passed_over(folder: Path) -> None:
    """Without it the folder would be hashed: another version, without probes."""
    folder_shapes.weights(folder / "model.safetensors", "a")
    (folder / FILE_NAME).symlink_to("nowhere")
    with open_folder(folder) as source, pytest.raises(SourceUnavailable, match=FILE_NAME):
        resolve(source, "m", "v1")


def test_a_folder_saved_over_with_another_index_is_not_what_its_manifest_says(folder: Path) -> None:
    folder_shapes.weights(folder / "a.safetensors", "a")
    folder_shapes.index(folder / folder_shapes.INDEX, a="a.safetensors")
    with open_folder(folder) as source:
        (folder / FILE_NAME).write_bytes(publish(source, "m", "v1").canonical)
    folder_shapes.weights(folder / "b.safetensors", "b")
    folder_shapes.index(folder / folder_shapes.INDEX, a="a.safetensors", b="b.safetensors")
    with open_folder(folder) as source, pytest.raises(BadCheckpoint, match="is not what was publi"):
        resolve(source, "m", "v1")
    with (folder / folder_shapes.INDEX).open("ab") as file:
        file.truncate(1 << 40)  # nobody reads that into memory
    with open_folder(folder) as source, pytest.raises(BadCheckpoint, match="is not what was publi"):
        resolve(source, "m", "v1")
