"""The origin as a source among others: a folder on a disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hotweights_agent.staging.chunk_sources import OriginSource
from hotweights_agent.staging.fetch import Fetch, FetchFailed, Progress
from hotweights_agent.staging.fetch_policy import FetchPolicy
from hotweights_agent.staging.store import Store
from hotweights_common.backoff import Backoff
from hotweights_storage.errors import SourceRefused
from hotweights_storage.sources.base import Source
from hotweights_storage.sources.file import open_folder

Checkpoint = Any  # conftest's; a conftest is no module to import from
QUICK = FetchPolicy(deadline_seconds=30, backoff=Backoff(0.01, 60.0), patience_seconds=0.0)


@pytest.fixture
def version(checkpoint: Callable[..., Checkpoint]) -> Checkpoint:
    return checkpoint("v1", tuple(range(20)))


@pytest.fixture
def file(version: Checkpoint, tmp_path: Path) -> Path:
    found = tmp_path / "model.safetensors"
    found.write_bytes(b"".join(version.data.values()))
    return found


@pytest.fixture
def origin(version: Checkpoint, file: Path) -> OriginSource:
    return OriginSource(
        "file:///models/v1", lambda: open_folder(file.parent), version.manifest, workers=2
    )


def fetch(store: Store, version: Checkpoint, *sources: Any) -> Progress:
    with store.begin(version.manifest) as staging:
        found = Fetch(staging.builder, sources, policy=QUICK).run()
        staging.commit()
    return found


def test_a_folder(store: Store, version: Checkpoint, origin: OriginSource) -> None:
    assert fetch(store, version, origin).by_source == (("file:///models/v1", version.nbytes),)
    with store.image(version.manifest.digest) as image:
        assert image.manifest == version.manifest


def test_it_gives_what_a_donor_lacks(
    store: Store, version: Checkpoint, table: Any, origin: OriginSource
) -> None:
    some = dict(list(version.data.items())[10:70])
    found = dict(fetch(store, version, table(some, "donor"), origin).by_source)
    assert found == {"donor": 60 * 4096, "file:///models/v1": (len(version.data) - 60) * 4096}


def test_a_flipped_byte_names_file_and_chunk(
    store: Store, version: Checkpoint, file: Path, origin: OriginSource
) -> None:
    data = bytearray(file.read_bytes())
    data[5 * 4096 + 7] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        FetchFailed,
        match=r"file:///models/v1: model\.safetensors: chunk 1 of "
        r"tensor",
    ) as caught:
        fetch(store, version, origin)
    assert caught.value.reason == "ChecksumMismatch"
    assert not caught.value.transient
    assert store.versions() == ()


def test_a_truncated_file(
    store: Store, version: Checkpoint, file: Path, origin: OriginSource
) -> None:
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FetchFailed, match="ends before byte") as caught:
        fetch(store, version, origin)
    assert caught.value.reason == "SourceTruncated"
    assert caught.value.transient


def test_a_source_that_is_not_allowed_is_not_tried_again(
    store: Store, version: Checkpoint, table: Any
) -> None:
    opened = 0

    def refuse() -> Source:
        nonlocal opened
        opened += 1
        raise SourceRefused("file:///etc: not under an allowed root")

    origin = OriginSource("file:///etc", refuse, version.manifest)
    with pytest.raises(FetchFailed) as caught:
        fetch(store, version, origin)
    assert (caught.value.reason, caught.value.transient, opened) == ("SourceNotAllowed", False, 1)
    assert (
        dict(fetch(store, version, origin, table(version.data)).by_source)["table"]
        == version.nbytes
    )
