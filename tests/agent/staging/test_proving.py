"""That a manifest alone opens nobody's weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hotweights_agent.session.messages import Message, ResolveDone
from hotweights_agent.settings import RootSettings, Settings, StagingSettings
from hotweights_agent.staging.allowed_sources import allowed
from hotweights_agent.staging.manifest_cache import ManifestCache
from hotweights_agent.staging.stager import Stager
from hotweights_agent.staging.store import Store
from hotweights_crds.nodeweights import ResolvedVersion, ResolveItem
from hotweights_planner.manifest import FILE_NAME
from hotweights_storage.resolve import publish
from hotweights_storage.sources.file import open_folder

WEIGHTS = "model.safetensors"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, str]:
    """Weights of one tenant; a file of another with the same header and a hole, beside the first
    one's manifest; and the digest of that.
    """
    theirs, hole = tmp_path / "theirs", tmp_path / "hole"
    for folder in (theirs, hole):
        folder.mkdir()
    save_file({"w": np.arange(1 << 18, dtype=np.int32)}, theirs / WEIGHTS)
    manifest = publish(open_folder(theirs), "tiny", "v1")
    whole = (theirs / WEIGHTS).read_bytes()
    with (hole / WEIGHTS).open("wb") as file:
        file.write(whole[: 8 + int.from_bytes(whole[:8], "little")])
        file.truncate(len(whole))
    for folder in (theirs, hole):
        (folder / FILE_NAME).write_bytes(manifest.canonical)
    return theirs, hole, manifest.digest


class Resolver:
    """A stager that only reads sources."""

    def __init__(self, root: Path, *, prove: bool) -> None:
        self.told: asyncio.Queue[Message] = asyncio.Queue()
        self.stager = Stager(
            Store(available=lambda: 1 << 30),
            allowed([RootSettings(root, namespaces=("*",))]),
            ManifestCache(root / "manifests"),
            self.told.put,
            token=lambda: "",
            prove_sources=prove,
        )

    async def __call__(self, folder: Path, digest: str = "") -> ResolvedVersion:
        self.stager.resolve(
            ResolveItem(
                uid="u",
                namespace="team-b",
                name="v1",
                model="tiny",
                version="v1",
                uri=f"file://{folder}",
                digest=digest,
            )
        )
        async with asyncio.timeout(50):
            done = await self.told.get()
        if not isinstance(done, ResolveDone):
            raise TypeError(f"{done} came instead of a ResolveDone")
        return done.result


@pytest.fixture
async def proving(tmp_path: Path) -> AsyncIterator[Resolver]:
    found = Resolver(tmp_path, prove=True)
    yield found
    await found.stager.close()


@pytest.mark.parametrize("pinned", [True, False])
async def test_a_hole_beside_a_manifest_is_not_that_version(
    proving: Resolver, folders: tuple[Path, Path, str], pinned: bool
) -> None:
    theirs, hole, digest = folders
    found = await proving(hole, digest if pinned else "")
    assert (found.digest, found.reason) == ("", "ChecksumMismatch")
    assert "w" in found.message
    assert (await proving(theirs, digest if pinned else "")).digest == digest


async def test_without_tenants_a_manifest_is_believed(
    tmp_path: Path, folders: tuple[Path, Path, str]
) -> None:
    """Reading all of it would delay every release, for nobody's good."""
    believing = Resolver(tmp_path, prove=False)
    _, hole, digest = folders
    try:
        assert (await believing(hole)).digest == digest
    finally:
        await believing.stager.close()


@pytest.mark.parametrize(
    ("roots", "proves"),
    [
        ((), False),
        ((("a",),), False),
        ((("a",), ("a",)), False),
        ((("a", "b"),), True),
        ((("a",), ("b",)), True),
        ((("*",),), True),
    ],
)
def test_sources_are_proved_where_there_are_several_tenants(
    roots: tuple[tuple[str, ...], ...], proves: bool
) -> None:
    settings = tuple(RootSettings(Path(f"/{n}"), namespaces=names) for n, names in enumerate(roots))
    assert Settings(node="n", roots=settings).prove_sources is proves
    trusting = StagingSettings(trust_manifests=True)
    assert not Settings(node="n", roots=settings, staging=trusting).prove_sources
