"""What a broadcast leaves in an image, whatever the process beside it does to the slots."""

from __future__ import annotations

import os

import pytest
from blake3 import blake3

from hotweights_planner.header import TensorEntry
from hotweights_planner.manifest import CHUNK_NBYTES, Chunk, build
from hotweights_planner.plan import Item
from hotweights_storage import image
from hotweights_storage.image import ImageBuilder
from hotweights_transports.broadcast.collective import _ChunkAssembler

NBYTES = 4096


def test_a_slot_that_is_written_to_after_its_hash_spoils_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rank's process shares the slots with the node."""
    content = os.urandom(NBYTES)
    digest = blake3(content).hexdigest()
    entry = TensorEntry("a", "U8", (NBYTES,), NBYTES, 0)
    manifest = build(
        "m", "v1", {"model.safetensors": [entry]}, {"a": [digest]}, chunk_nbytes=CHUNK_NBYTES
    )
    slot = bytearray(content)

    def spoiling(data: memoryview) -> object:
        found = blake3(data)
        slot[:] = bytes(NBYTES)
        return found

    monkeypatch.setattr(image, "blake3", spoiling)
    kept: list[Chunk] = []
    with ImageBuilder(manifest) as builder, memoryview(slot) as bucket:
        parts = _ChunkAssembler(builder, kept.append, "the head")
        (chunk,) = manifest.chunks()
        parts.take_or_leave(Item(chunk, 0, 0, NBYTES), bucket)
        place = builder.range(digest)
        assert place is not None
        assert os.pread(place.fd, place.nbytes, place.offset) == content
    assert (len(kept), parts.wrong) == (1, 0)
