"""From a real folder to an image and to a manifest: whole, or refused with file, chunk and
tensor.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from hotweights_planner.errors import BadCheckpoint, BadManifest
from hotweights_planner.manifest import CHUNK_NBYTES, FILE_NAME, Chunk, Manifest
from hotweights_storage.errors import Cancelled, ChecksumMismatch, SourceUnavailable, TransferError
from hotweights_storage.image import ImageBuilder
from hotweights_storage.reader import Limits, read_chunks, spans
from hotweights_storage.resolve import publish, resolve, verify
from hotweights_storage.sources.file import open_folder
from hotweights_storage.stage import stage_from_source

safetensors = pytest.importorskip("safetensors.numpy")
numpy = pytest.importorskip("numpy")

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = numpy.random.default_rng(0)
    tensors = {
        "embed": random.integers(0, 255, 2 * CHUNK_NBYTES + 12345, dtype=numpy.uint8),
        "layers.0.norm": random.random(33, dtype=numpy.float32),
        "layers.0.w": random.random((100, 77), dtype=numpy.float32),
        "empty": numpy.zeros((0, 4), dtype=numpy.float32),
    }
    safetensors.save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def published(folder: Path, version: str = "v1") -> Manifest:
    with open_folder(folder) as source:
        return publish(source, "demo", version)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def offset_of(manifest: Manifest, tensor: str) -> int:
    return next(found.offset for found in manifest.tensors if found.name == tensor)


def test_the_image_holds_what_the_library_reads(folder: Path) -> None:
    manifest = published(folder)
    heard: list[str] = []
    with open_folder(folder) as source, ImageBuilder(manifest, on_chunk=heard.append) as builder:
        stage_from_source(source, builder)
        image = builder.finish()
    assert sorted(heard) == sorted(image.chunks)
    expected = safetensors.load_file(folder / WEIGHTS)
    for tensor in json.loads(image.table_json)["tensors"]:
        content = b"".join(
            os.pread(image.fds[1 + slab], nbytes, at) for slab, at, nbytes in tensor["extents"]
        )
        assert content == expected.pop(tensor["name"]).tobytes()
    assert not expected
    image.close()


def test_only_what_is_wanted_is_read(folder: Path) -> None:
    manifest = published(folder)
    with open_folder(folder) as source, ImageBuilder(manifest) as builder:
        wanted = builder.missing[1:3]
        stage_from_source(source, builder, wanted)
        assert all(builder.has(digest) for digest in wanted)
        assert builder.missing_count == manifest.chunk_count - 2
        stage_from_source(source, builder)
        builder.finish().close()


def test_a_flipped_byte_is_named(folder: Path) -> None:
    manifest = published(folder)
    flip(folder / WEIGHTS, offset_of(manifest, "embed") + CHUNK_NBYTES + 7)
    with open_folder(folder) as source, ImageBuilder(manifest) as builder:
        with pytest.raises(
            ChecksumMismatch, match=rf"{WEIGHTS}: chunk 1 of tensor embed"
        ) as caught:
            stage_from_source(source, builder)
        assert (caught.value.chunk.file, caught.value.chunk.tensor, caught.value.chunk.number) == (
            WEIGHTS,
            "embed",
            1,
        )
        assert builder.missing_count >= 1
    with open_folder(folder) as source:
        differences = verify(source, manifest)
    assert [(found.file, found.tensor, found.chunk) for found in differences] == [
        (WEIGHTS, "embed", 1)
    ]


def test_a_file_cut_short_is_named(folder: Path) -> None:
    manifest = published(folder)
    os.truncate(folder / WEIGHTS, 1000)
    with open_folder(folder) as source, ImageBuilder(manifest) as builder:
        with pytest.raises(SourceUnavailable, match=f"{WEIGHTS} ends before byte") as caught:
            stage_from_source(source, builder)
        assert caught.value.reason == "SourceTruncated"


def test_staging_can_be_cancelled_and_has_a_deadline(folder: Path) -> None:
    stopped = Limits()
    stopped.stop.set()
    late = Limits(deadline=time.monotonic() - 1)
    for limits, reason in ((stopped, "Cancelled"), (late, "DeadlineExceeded")):
        with open_folder(folder) as source, ImageBuilder(published(folder)) as builder:
            with pytest.raises(Cancelled) as caught:
                stage_from_source(source, builder, limits=limits)
            assert caught.value.reason == reason
            assert builder.missing_count == 5


def test_the_first_error_of_a_thread_ends_all(folder: Path) -> None:
    def refuse(chunk: Chunk, data: memoryview) -> None:
        raise TransferError(chunk.tensor)

    before = set(threading.enumerate())
    with open_folder(folder) as source, pytest.raises(TransferError):
        read_chunks(source, published(folder).chunks(), refuse)
    assert not set(threading.enumerate()) - before


def test_neighbours_are_read_together() -> None:
    chunks = [
        Chunk("", 100, "a", 0, "t", 0),
        Chunk("", 100, "a", 150, "t", 1),  # a gap that is quicker read than left out
        Chunk("", 100, "a", 1 << 20, "t", 2),
        Chunk("", 100, "b", (1 << 20) + 100, "t", 3),
        Chunk("", 20 << 20, "b", (1 << 20) + 200, "t", 4),
        Chunk("", 100, "b", 0, "t", 5),
    ]
    found = [(span.file, span.offset, span.nbytes) for span in spans(chunks)]
    assert found == [
        ("a", 0, 250), ("a", 1 << 20, 100), ("b", (1 << 20) + 100, 100), ("b", (1 << 20) + 200, 20 << 20), ("b", 0, 100),
    ]  # fmt: skip


def test_publishing_and_resolving_give_the_same_bytes(folder: Path) -> None:
    manifest = published(folder)
    with open_folder(folder) as source:
        assert resolve(source, "demo", "v1").canonical == manifest.canonical
    (folder / FILE_NAME).write_bytes(manifest.canonical)
    assert published(folder) == manifest  # the manifest is no part of the checkpoint
    flip(folder / WEIGHTS, offset_of(manifest, "embed"))
    with open_folder(folder) as source:
        # the weights are not read: staging verifies them
        assert resolve(source, "demo", "v1") == manifest


def test_a_manifest_of_something_else_is_refused(folder: Path) -> None:
    manifest = published(folder)
    (folder / FILE_NAME).write_bytes(manifest.canonical)
    with (
        open_folder(folder) as source,
        pytest.raises(BadManifest, match="it is of version v1 of model demo"),
    ):
        resolve(source, "demo", "v2")
    safetensors.save_file({"embed": numpy.zeros(3, dtype=numpy.uint8)}, folder / WEIGHTS)
    with (
        open_folder(folder) as source,
        pytest.raises(
            BadCheckpoint,
            match=r"tensor \w+ of the manifest is not in " + WEIGHTS,
        ),
    ):
        resolve(source, "demo", "v1")
    (folder / FILE_NAME).write_bytes(b"{}")
    with open_folder(folder) as source, pytest.raises(BadManifest, match="model: Field required"):
        resolve(source, "demo", "v1")


def test_side_files_are_verified_too(folder: Path) -> None:
    manifest = published(folder)
    (folder / "config.json").write_text("{ }")
    with open_folder(folder) as source:
        assert [found.file for found in verify(source, manifest)] == ["config.json"]
    (folder / "config.json").unlink()
    with open_folder(folder) as source:
        assert "config.json is missing" in verify(source, manifest)[0].message


def test_progress_adds_up(folder: Path) -> None:
    done: list[int] = []
    with open_folder(folder) as source:
        manifest = publish(source, "demo", "v1", progress=done.append)
    assert sum(done) == manifest.nbytes


def test_a_checkpoint_that_is_written_meanwhile_is_not_published(folder: Path) -> None:
    def touch(_: int) -> None:
        os.utime(folder / WEIGHTS, (1, 1))

    with (
        open_folder(folder) as source,
        pytest.raises(SourceUnavailable, match="changed while it was read"),
    ):
        publish(source, "demo", "v1", progress=touch)
