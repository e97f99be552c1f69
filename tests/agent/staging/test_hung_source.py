"""A source that hangs costs its own versions, and neither others nor the agent's end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hotweights_agent.session.messages import ResolveDone, StageDone, StageFailed
from hotweights_agent.settings import StagingSettings
from hotweights_agent.staging import stager
from hotweights_agent.staging.fetch_policy import FetchPolicy
from hotweights_common.backoff import Backoff
from hotweights_crds.nodeweights import ResolveItem
from hotweights_storage import source_reads
from hotweights_storage.source_reads import SourceReads
from hotweights_storage.sources.base import Source
from hotweights_storage.sources.folder import FileSource
from tests.agent.fake_engine import until
from tests.agent.played_node import PlayedNode, published


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
        deadline = time.monotonic() + 50
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


class Reads(SourceReads):
    """A mount that is away is given up soon; what answers has as long as a busy machine takes."""

    def __init__(self, mount: Mount, away_seconds: float) -> None:
        self._mount = mount
        self._asking = threading.local()
        super().__init__(away_seconds)

    def _wait(self, uri: str, *rest: Any) -> None:  # in the thread that asks
        away = self._mount.away or self._mount.opens_away
        self._asking.for_a_mount_that_is_away = away and uri.startswith("nfs:")
        super()._wait(uri, *rest)

    @property
    def _stall_seconds(self) -> float:
        return self._away_seconds if self._asking.for_a_mount_that_is_away else 50.0

    @_stall_seconds.setter
    def _stall_seconds(self, seconds: float) -> None:
        self._away_seconds = seconds


QUICK = StagingSettings(at_once=1, source_stall_seconds=0.5, origin_workers=2)


@pytest.fixture
async def node(
    tmp_path: Path, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[PlayedNode]:
    monkeypatch.setattr(stager, "FetchPolicy", partial(FetchPolicy, backoff=Backoff(0.01, 60.0)))
    found = PlayedNode(tmp_path, QUICK, nfs=mount)
    found.stager._reads = Reads(mount, found.stager._reads._stall_seconds)
    yield found
    await found.close()


@pytest.mark.parametrize("known", [True, False], ids=["its chunks", "its manifest"])
async def test_a_version_of_another_source_comes_all_the_same(
    node: PlayedNode, mount: Mount, tmp_path: Path, known: bool
) -> None:
    hung, manifest = published(tmp_path, "v1", "nfs")
    healthy, _ = published(tmp_path, "v2")
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
    node: PlayedNode, mount: Mount, tmp_path: Path
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
    node = PlayedNode(tmp_path, StagingSettings(), nfs=mount)
    item, manifest = published(tmp_path, "v1", "nfs")
    node.manifests.put(manifest)
    setattr(mount, hang, True)
    node.stager.stage(item)
    await until(lambda: any(t.name.startswith("source ") for t in threading.enumerate()))
    began = time.monotonic()
    await node.stager.close()
    assert time.monotonic() - began < 50.0, "it waited until the source is given up"
    assert node.store.versions() == ()
