"""Versions that come one after the other, each with some chunks changed: what the node's memory and
an engine's mappings come to, with the kernel's own figures.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hotweights.adapters.vllm.rank.image import Image as MappedImage
from hotweights_agent.staging import compacting
from hotweights_agent.staging.store import Store
from hotweights_planner.header import TensorEntry
from hotweights_planner.manifest import PAGE_NBYTES as PAGE
from hotweights_planner.manifest import build
from hotweights_storage.image import Image
from hotweights_storage.slab import Slab

Checkpoint = Any  # conftest's
NewCheckpoint = Callable[..., Checkpoint]
TENSORS = 40  # of four chunks of a page each
PROMISED = 1.25


def stage(store: Store, version: Checkpoint) -> None:
    with store.begin(version.manifest) as staging:
        for blake3 in staging.builder.missing:
            staging.builder.put(blake3, version.data[blake3])
        staging.commit()


def mapped(store: Store, digest: str) -> MappedImage:
    """As an engine does."""
    with store.image(digest) as image:
        return MappedImage.open(image.fds, digest)


def content(image: MappedImage) -> dict[str, bytes]:
    return {entry.name: bytes(image.view(entry)) for entry in image.table.entries}


def expected(version: Checkpoint) -> dict[str, bytes]:
    return {
        tensor.name: b"".join(version.data[blake3] for blake3 in tensor.chunks)
        for tensor in version.manifest.tensors
    }


def descriptors() -> set[tuple[str, int]]:
    """Of memory that this process has open, with the inodes. Other tests may have left some, which
    go meanwhile.
    """
    found: set[tuple[str, int]] = set()
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208
        link = Path("/proc/self/fd", number)
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if str(link.readlink()).startswith("/memfd:"):
                found.add((number, link.stat().st_ino))
    return found


def slabs_of_this_process() -> dict[int, int]:
    """Memory in bytes of every memfd that it has open or maps, by inode. Other tests may have left
    some.
    """
    found: dict[int, int] = {}
    for folder in ("fd", "map_files"):
        for link in Path("/proc/self", folder).iterdir():
            try:
                if "hotweights-slab" in str(link.readlink()):
                    status = link.stat()
                    found[status.st_ino] = status.st_blocks * 512
            except FileNotFoundError:  # closed meanwhile
                continue
    return found


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many slabs as a large model has."""
    monkeypatch.setattr(compacting, "MAX_SLAB_NBYTES", 8 * PAGE)


def deltas(checkpoint: NewCheckpoint, count: int) -> Iterator[Checkpoint]:
    rng, seeds = random.Random(3), list(range(TENSORS))
    for number in range(count):
        yield checkpoint(f"v{number}", tuple(seeds))
        for at in rng.sample(range(TENSORS), TENSORS // 10):
            seeds[at] = 1000 * (number + 1) + at


@pytest.mark.usefixtures("small_slabs")
def test_a_node_and_its_engine_hold_what_two_versions_need(
    store: Store, checkpoint: NewCheckpoint
) -> None:
    before, serving, previous, worst, looked = descriptors(), None, None, 0.0, 0
    others = slabs_of_this_process().keys()
    for version in deltas(checkpoint, 30):
        stage(store, version)
        if previous is not None:
            needed = PAGE * len(previous.data.keys() | version.data.keys())
        serving = mapped(store, version.manifest.digest)  # and lets go of the one before
        for held in store.versions()[:-2]:
            store.release(held.digest)
        assert store.settle()
        if previous is not None:
            ours = slabs_of_this_process()
            assert sum(ours[inode] for inode in ours.keys() - others) == store.usage().held
            worst = max(worst, store.usage().held / needed)
            looked += 1
        previous = version
    assert looked == 29
    assert 1.0 <= worst <= PROMISED
    assert serving is not None
    assert content(serving) == expected(previous)
    assert len(descriptors() - before) < 60


@pytest.mark.usefixtures("small_slabs")
def test_a_version_that_moved_is_what_it_was(store: Store, checkpoint: NewCheckpoint) -> None:
    """The way back: the previous version, whose chunks lie elsewhere by now, is mapped anew."""
    moved = 0
    previous: Checkpoint | None = None
    for version in deltas(checkpoint, 25):
        slabs = places(store, previous)
        stage(store, version)
        if previous is not None:
            moved += slabs != places(store, previous)
            assert content(mapped(store, previous.manifest.digest)) == expected(previous)
        previous = version
        for held in store.versions()[:-2]:
            store.release(held.digest)
    assert moved > 5


def places(store: Store, version: Checkpoint | None) -> tuple[Slab, ...]:
    if version is None:
        return ()
    with store.image(version.manifest.digest) as image:
        return image.slabs


@pytest.mark.usefixtures("small_slabs")
def test_an_image_in_use_outlives_its_move(store: Store, checkpoint: NewCheckpoint) -> None:
    """Frames with its descriptors may be on their way to an engine, and chunks to a peer."""
    versions = list(deltas(checkpoint, 12))
    stage(store, versions[0])
    pins = [store.image(versions[0].manifest.digest)]
    for version in versions[1:]:
        stage(store, version)
        pins.append(store.image(versions[0].manifest.digest))
    assert len({pin.image for pin in pins}) > 1
    for pin in pins:
        image = MappedImage.open(pin.image.fds, versions[0].manifest.digest)
        assert content(image) == expected(versions[0])
        pin.release()


@pytest.mark.usefixtures("small_slabs")
def test_without_memory_for_copies_all_stays_where_it_is(checkpoint: NewCheckpoint) -> None:
    """Compacting never costs anybody a version that would have fitted."""
    versions = list(deltas(checkpoint, 6))
    free = [1 << 30]
    store = Store(available=lambda: free[0])
    for version in versions[:5]:
        stage(store, version)
        for held in store.versions()[:-1]:
            store.release(held.digest)
    free[0] = PAGE * len(versions[5].data.keys() - versions[4].data.keys())
    with store.begin(versions[5].manifest) as staging:
        assert staging.builder.new_nbytes == free[0]


def test_a_version_of_a_terabyte_has_room_in_the_tables_of_the_kernel() -> None:
    """Two of them, and one that arrives, within the descriptors that a soft limit never gave and a
    hard limit does; and an engine maps it. No page of it is taken here.
    """
    whole = 64 << 20
    digests = [f"{number:064x}" for number in range((1 << 40) // whole)]
    entries, chunks = [], {}
    for at in range(0, len(digests), 64):
        name, nbytes = f"model.layers.{at // 64}.weight", 64 * whole
        entries.append(TensorEntry(name, "U8", (nbytes,), nbytes, at * whole))
        chunks[name] = digests[at : at + 64]
    manifest = build("m", "v1", {"m.safetensors": entries}, chunks, chunk_nbytes=whole)
    store, before = Store(available=lambda: 2 << 40), descriptors()
    with store.begin(manifest) as staging:
        assert staging.builder.new_nbytes == 1 << 40
        assert len(descriptors() - before) <= 2 * 1024
        assert staging.builder.mapping_count <= 1024
        assert store.usage().held == 0
    assert store.settle()
    assert descriptors() <= before


class Kept:
    """A keeper that says what it has."""

    def __init__(self) -> None:
        self.digests: set[str] = set()

    def keep(self, image: Image) -> None:
        for slab in image.retain():
            slab.release()
        self.digests.add(image.manifest.digest)

    def drop(self, digest: str) -> None:
        self.digests.discard(digest)


@pytest.mark.usefixtures("small_slabs")
def test_a_version_that_is_released_while_it_moves_spoils_nothing(
    checkpoint: NewCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a new place, and the keeper has not heard of that yet."""
    keeper = Kept()
    store = Store(available=lambda: 1 << 30, keeper=keeper)
    released: list[str] = []
    moved = store._relocate

    def relocate(held: Any, old: Image, plan: Any) -> Any:
        class Keeping:
            def __enter__(self) -> None:
                monkeypatch.setattr(store, "_keeping", lock)
                released.append(held.manifest.digest)
                store.release(held.manifest.digest)
                assert store.settle()
                lock.acquire()

            def __exit__(self, *_: object) -> None:
                lock.release()

        lock = store._keeping
        if not released:
            monkeypatch.setattr(store, "_keeping", Keeping())
        return moved(held, old, plan)

    monkeypatch.setattr(store, "_relocate", relocate)
    for version in deltas(checkpoint, 30):
        stage(store, version)
        for held in store.versions()[:-2]:
            store.release(held.digest)
        assert store.settle()
    assert released
    assert keeper.digests == {held.digest for held in store.versions()}
    for held in store.versions():
        store.release(held.digest)
    assert store.settle()
    assert keeper.digests == set()
