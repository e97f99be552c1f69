"""Images: verified before it is stored, readable before it is whole, sealed before anybody maps
it.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from blake3 import blake3

from hotweights_planner.header import TensorEntry
from hotweights_planner.manifest import Manifest, build
from hotweights_storage import linux
from hotweights_storage.errors import ChecksumMismatch, Incomplete, TransferError
from hotweights_storage.image import Image, ImageBuilder
from hotweights_storage.slab import Slab

PAGE = 4096
Tensors = Mapping[str, bytes]


def make(tensors: Tensors, version: str = "v1") -> Manifest:
    entries, digests, offset = [], {}, 64
    for name, content in tensors.items():
        entries.append(TensorEntry(name, "U8", (len(content),), len(content), offset))
        offset += len(content)
        digests[name] = [
            blake3(content[at : at + PAGE]).hexdigest() for at in range(0, len(content), PAGE)
        ]
    return build("m", version, {"a.safetensors": entries}, digests, chunk_nbytes=PAGE)


def pieces(tensors: Tensors) -> dict[str, bytes]:
    parts = (
        content[at : at + PAGE]
        for content in tensors.values()
        for at in range(0, len(content), PAGE)
    )
    return {blake3(part).hexdigest(): part for part in parts}


def filled(builder: ImageBuilder, tensors: Tensors) -> Image:
    content = pieces(tensors)
    for digest in builder.missing:
        assert builder.put(digest, content[digest])
    return builder.finish()


def tensors_of(image: Image) -> dict[str, bytes]:
    """As an engine reads it: the table, then the extents of the slabs that came with it."""
    table, *slabs = image.fds
    document = json.loads(os.pread(table, 1 << 20, 0))
    return {
        tensor["name"]: b"".join(
            os.pread(slabs[slab], nbytes, offset) for slab, offset, nbytes in tensor["extents"]
        )
        for tensor in document["tensors"]
    }


def open_memory() -> set[tuple[int, int]]:
    """Descriptors of anonymous memory. What a test is to give back is looked for among them by name:
    others may open and close files of their own meanwhile.
    """
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            if "memfd:hotweights" in os.readlink(link):  # noqa: PTH115  # a link to no path
                found.add((int(link.name), link.stat().st_ino))
    return found


OLD = {"a": os.urandom(3 * PAGE + 5), "b": os.urandom(PAGE), "empty": b""}
NEW = OLD | {"b": os.urandom(PAGE), "c": OLD["a"][:PAGE]}


def test_a_version_and_its_successor_share_memory_until_both_are_gone() -> None:
    before = open_memory()
    old = filled(ImageBuilder(make(OLD)), OLD)
    builder = ImageBuilder(make(NEW, "v2"), old.chunks)
    assert builder.new_nbytes == PAGE
    new = filled(builder, NEW)
    assert tensors_of(old) == OLD
    shared = set(old.slabs) & set(new.slabs)
    assert len(shared) == 1
    old.close()
    old.close()
    assert tensors_of(new) == NEW
    new.close()
    assert not open_memory() - before


def test_a_wrong_chunk_is_named_and_not_stored() -> None:
    with ImageBuilder(make(OLD)) as builder:
        digest = builder.missing[1]
        for wrong in (bytes(PAGE), bytes(PAGE - 1), b""):
            with pytest.raises(
                ChecksumMismatch, match=f"chunk 1 of tensor a \\(bytes {64 + PAGE} to"
            ) as caught:
                builder.put(digest, wrong, "peer n1")
            assert (
                caught.value.chunk.file,
                caught.value.chunk.tensor,
                caught.value.chunk.number,
            ) == (
                "a.safetensors",
                "a",
                1,
            )
        assert not builder.has(digest)
        assert builder.range(digest) is None
        with pytest.raises(Incomplete, match="5 of 5 chunks"):
            builder.finish()


def test_a_verified_chunk_can_be_sent_on_before_the_image_is_whole() -> None:
    heard: list[str] = []
    content = pieces(OLD)
    with ImageBuilder(make(OLD), on_chunk=heard.append) as builder:
        digest = builder.missing[2]
        assert builder.put(digest, content[digest])
        assert not builder.put(digest, content[digest])
        found = builder.range(digest)
        assert found is not None
        assert os.pread(found.fd, found.nbytes, found.offset) == content[digest]
        # the descriptor is for reading
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            os.pwrite(found.fd, b"x", found.offset)
        assert caught.value.errno == errno.EBADF
        assert heard == [digest]


def test_a_slab_that_engines_see_can_never_change() -> None:
    image = filled(ImageBuilder(make(OLD)), OLD)
    for fd in image.fds:
        with pytest.raises(PermissionError):
            os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_TRUNC)
        writer = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        with pytest.raises(PermissionError):
            os.pwrite(writer, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(writer, 1)
        os.close(writer)
        mmap.mmap(fd, 1, mmap.MAP_SHARED, mmap.PROT_READ).close()
    image.close()


def test_sealing_waits_for_whoever_is_reading_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages in a pipe are held as a reader holds the one that it copies."""
    slab = Slab(4096)
    slab.write(0, bytes(4096))
    end, begin = os.pipe()
    assert os.splice(slab.fd, begin, 4096, offset_src=0) == 4096
    seal, tries = linux.seal, list[str]()

    def watched(fd: int) -> None:
        try:
            seal(fd)
        except OSError as error:
            tries.append(str(error))
            if len(tries) == 2:
                os.read(end, 4096)  # the reader goes on
            raise

    monkeypatch.setattr(linux, "seal", watched)
    slab.seal()
    assert len(tries) >= 2
    assert all("busy" in text for text in tries)
    assert linux.is_sealed(slab.fd)
    slab.release()
    os.close(begin)
    os.close(end)


def test_sealing_ends_though_a_page_is_held_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotweights_storage.slab.SEAL_SECONDS", 0.1)
    slab = Slab(4096)
    slab.write(0, bytes(4096))
    end, begin = os.pipe()
    assert os.splice(slab.fd, begin, 4096, offset_src=0) == 4096
    with pytest.raises(OSError, match="busy"):
        slab.seal()
    os.close(begin)
    os.close(end)
    monkeypatch.undo()
    slab.seal()
    assert slab.sealed
    slab.release()


def test_a_finished_or_closed_builder_is_done() -> None:
    builder = ImageBuilder(make(OLD))
    image = filled(builder, OLD)
    builder.close()
    assert tensors_of(image) == OLD
    with pytest.raises(Incomplete, match="finished before"):
        builder.finish()
    image.close()
    given_up = ImageBuilder(make(OLD))
    given_up.close()
    digest = given_up.missing[0]
    assert not given_up.put(digest, pieces(OLD)[digest])


def test_many_threads_bring_the_same_chunks() -> None:
    heard: list[str] = []
    tensors = {f"t{index}": os.urandom(10 * PAGE) for index in range(20)}
    content = pieces(tensors)
    builder = ImageBuilder(make(tensors), on_chunk=heard.append, max_slab_nbytes=7 * PAGE)
    start = threading.Barrier(4)

    def bring(reverse: bool) -> int:
        start.wait()
        order = builder.missing[::-1] if reverse else builder.missing
        return sum(builder.put(digest, content[digest]) for digest in order)

    with ThreadPoolExecutor(4) as pool:
        brought = sum(pool.map(bring, [False, True, False, True]))
    assert brought == len(content) == len(heard) == len(set(heard))
    image = builder.finish()
    assert len(image.slabs) > 20
    assert tensors_of(image) == tensors
    image.close()


def test_a_freed_slab_cannot_be_retained() -> None:
    slab = Slab(PAGE)
    slab.release()
    with pytest.raises(TransferError, match="already freed"):
        slab.retain()


def test_a_builder_over_a_freed_slab_leaves_nothing_open() -> None:
    image = filled(ImageBuilder(make(OLD)), OLD)
    chunks = dict(image.chunks)
    image.close()
    before = open_memory()
    with pytest.raises(TransferError, match="already freed"):
        ImageBuilder(make(OLD), chunks)
    assert not open_memory() - before
