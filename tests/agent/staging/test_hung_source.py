"""A source that hangs costs its own versions, and neither others nor the agent's end."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hotweights_agent.session.messages import Message, ResolveDone, StageDone, StageFailed
from hotweights_agent.settings import StagingSettings
from hotweights_agent.staging.manifest_cache import ManifestCache
from hotweights_agent.staging.stager import Stager
from hotweights_agent.staging.store import Store
from hotweights_crds.nodeweights import ResolveItem, StageItem
from hotweights_planner.manifest import Manifest
from hotweights_storage import source_reads
from hotweights_storage.resolve import publish
from hotweights_storage.sources.base import Root, Source, Sources
from hotweights_storage.sources.file import FileOpener, FileSource, open_folder
from tests.agent.fake_engine import until


class Mount:
    """A hard mount, whose server may be away: then reads hang in the kernel, in a FIFO's open."""

    def __init__(self, fifo: Path) -> None:
        self.fifo = fifo
        self.away = self.opens_away = False
        os.mkfifo(fifo)

    def open(self, uri: str, namespace: str) -> Source:
        if self.opens_away:
            self.hang()
        return _Mounted(self, Path(uri.removeprefix("nfs://")))

    def hang(self) -> None:
        os.close(os.open(self.fifo, os.O_RDONLY))

    def answer(self) -> None:
        """The server is back: all that hangs goes on."""
        self.away = self.opens_away = False
        deadline = time.monotonic() + 10
        while any(t.name.startswith(("source ", "hotweights-read")) for t in threading.enumerate()):
            os.close(os.open(self.fifo, os.O_RDWR | os.O_NONBLOCK))
            assert time.monotonic() < deadline
            time.sleep(0.01)


class _Mounted(FileSource):
    def __init__(self, mount: Mount, folder: Path) -> None:
        super().__init__(
            f"nfs://{folder}", lambda name, flags: os.open(folder / (name or "."), flags)
        )
        self._mount = mount

    def read_into(self, file: str, offset: int, into: memoryview) -> int:
        if self._mount.away:
            self._mount.hang()
        return super().read_into(file, offset, into)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    found = Mount(tmp_path / "fifo")
    yield found
    found.answer()


class Node:
    def __init__(self, folder: Path, mount: Mount) -> None:
        self.store = Store(available=lambda: 2**30)
        self.manifests = ManifestCache(folder / "manifests")
        self.told: asyncio.Queue[Message] = asyncio.Queue()
        self.stager = Stager(
            self.store,
            Sources({"nfs": mount, "file": FileOpener([Root(folder)])}),
            self.manifests,
            self.told.put,
            token=lambda: "",
            settings=StagingSettings(at_once=1, source_stall_seconds=0.3, origin_workers=2),
        )

    async def end(self) -> StageDone | StageFailed | ResolveDone:
        """How the next job ends."""
        while True:
            message = await asyncio.wait_for(self.told.get(), 10)
            if isinstance(message, StageDone | StageFailed | ResolveDone):
                return message


@pytest.fixture
async def node(tmp_path: Path, mount: Mount) -> AsyncIterator[Node]:
    found = Node(tmp_path, mount)
    yield found
    await found.stager.close()
    for version in found.store.versions():
        found.store.release(version.digest)


def published(folder: Path, version: str, scheme: str) -> tuple[StageItem, Manifest]:
    root = folder / version
    root.mkdir()
    save_file({"a": np.full((64, 64), hash(version) % 97, np.float32)}, root / "model.safetensors")
    with open_folder(root) as source:
        found = publish(source, "m", version)
    return (
        StageItem(
            digest=found.digest,
            namespace="ns",
            model="m",
            version=version,
            uri=f"{scheme}://{root}",
        ),
        found,
    )


@pytest.mark.parametrize("known", [True, False], ids=["its chunks", "its manifest"])
async def test_a_version_of_another_source_comes_all_the_same(
    node: Node, mount: Mount, tmp_path: Path, known: bool
) -> None:
    hung, manifest = published(tmp_path, "v1", "nfs")
    healthy, _ = published(tmp_path, "v2", "file")
    if known:
        node.manifests.put(manifest)
    mount.away = True
    node.stager.stage(hung)
    node.stager.stage(healthy)
    ends = {end.digest: end for end in [await node.end(), await node.end()]}  # type: ignore[union-attr]
    assert isinstance(ends[healthy.digest], StageDone)
    failed = ends[hung.digest]
    assert isinstance(failed, StageFailed)
    assert (failed.reason, failed.transient) == ("SourceStalled", True)
    assert node.stager.stuck_reads > 0
    mount.answer()
    node.stager.stage(hung)
    assert isinstance(await node.end(), StageDone)
    assert node.stager.stuck_reads == 0


async def test_reading_for_a_digest_says_that_the_source_hangs(
    node: Node, mount: Mount, tmp_path: Path
) -> None:
    item, _ = published(tmp_path, "v1", "nfs")
    mount.opens_away = True
    node.stager.resolve(
        ResolveItem(uid="u", name="v1", namespace="ns", model="m", version="v1", uri=item.uri)
    )
    end = await node.end()
    assert isinstance(end, ResolveDone)
    assert (end.result.reason, end.transient) == ("SourceStalled", True)


@pytest.mark.parametrize("hang", ["away", "opens_away"])
async def test_the_agent_ends_in_time(
    mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hang: str
) -> None:
    monkeypatch.setattr(source_reads, "CALL_OFF_SECONDS", 0.2)
    node = Node(tmp_path, mount)
    node.stager._reads = source_reads.SourceReads(stall_seconds=600.0)
    item, manifest = published(tmp_path, "v1", "nfs")
    node.manifests.put(manifest)
    setattr(mount, hang, True)
    node.stager.stage(item)
    await until(lambda: any(t.name.startswith("source ") for t in threading.enumerate()))
    began = time.monotonic()
    await node.stager.close()
    assert time.monotonic() - began < 5.0
    assert node.store.versions() == ()
