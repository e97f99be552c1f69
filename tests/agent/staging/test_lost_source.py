"""The trainer deletes, or writes over, the folder of a version that is still wanted: who has it
keeps it, who lacks it takes it from those, and a restart loses nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hotweights_agent.local.kept_memory import KeptMemory
from hotweights_agent.session.messages import StageDone, StageFailed
from hotweights_agent.settings import StagingSettings
from hotweights_agent.staging.store import Store
from hotweights_crds.nodeweights import Peer, StageItem
from hotweights_transports.peers.base import PeerServer
from tests.agent.local.test_keeper import keeper_at
from tests.agent.played_node import PlayedNode, published

SETTINGS = StagingSettings(patience_seconds=5.0)


def deleted(item: StageItem) -> None:
    shutil.rmtree(item.uri.removeprefix("file://"))


def written_over(item: StageItem) -> None:
    folder = Path(item.uri.removeprefix("file://"))
    save_file({"a": np.frombuffer(b"v9" * 8192, np.uint8)}, folder / "model.safetensors")


def half_deleted(item: StageItem) -> None:
    (Path(item.uri.removeprefix("file://")) / "model.safetensors").unlink()


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[PlayedNode]:
    found = PlayedNode(tmp_path, SETTINGS)
    yield found
    await found.close()


@pytest.fixture
async def other(tmp_path: Path) -> AsyncIterator[PlayedNode]:
    found = PlayedNode(tmp_path, SETTINGS, manifests="others")
    yield found
    await found.close()


@pytest.mark.parametrize("role", ["parents", "fallbacks"])
@pytest.mark.parametrize("lose", [deleted, written_over, half_deleted])
async def test_who_lacks_it_takes_it_from_who_has_it(
    node: PlayedNode,
    other: PlayedNode,
    tmp_path: Path,
    serve: Callable[[Store], PeerServer],
    lose: Callable[[StageItem], None],
    role: str,
) -> None:
    item, manifest = published(tmp_path, "v1")
    other.stager.stage(item)
    assert isinstance(await other.end(), StageDone)
    lose(item)
    peer = Peer(node="other", endpoint=serve(other.store).address)
    node.stager.stage(item.model_copy(update={role: [peer]}))
    done = await node.end()
    assert isinstance(done, StageDone), done
    assert node.fetched["tcp"] == manifest.nbytes


@pytest.mark.parametrize(
    ("lose", "reason", "transient"),
    [
        (deleted, "SourceNotFound", True),
        (half_deleted, "BadCheckpoint", False),
        (written_over, "DigestMismatch", False),
    ],
)
async def test_when_nobody_has_it_the_folder_is_named(
    node: PlayedNode,
    tmp_path: Path,
    lose: Callable[[StageItem], None],
    reason: str,
    transient: bool,
) -> None:
    item, _ = published(tmp_path, "v1")
    lose(item)
    node.stager.stage(item)
    failed = await node.end()
    assert isinstance(failed, StageFailed)
    assert (failed.reason, failed.transient) == (reason, transient)
    assert item.uri.removeprefix("file://") in failed.message


@pytest.mark.timeout(180)  # a keeper is a process
@pytest.mark.parametrize("lose", [deleted, written_over])
async def test_a_restarted_agent_needs_neither_the_folder_nor_its_disk(
    tmp_path: Path, lose: Callable[[StageItem], None]
) -> None:
    """What the keeper holds is whole, its manifest included."""
    item, _ = published(tmp_path, "v1")
    with keeper_at(tmp_path / "keeper.sock"):
        kept = KeptMemory(tmp_path / "keeper.sock")
        first = PlayedNode(tmp_path, SETTINGS, keeper=kept)
        first.stager.stage(item)
        assert isinstance(await first.end(), StageDone)
        await first.stager.close()  # and nothing is let go of
        kept.close()
        lose(item)
        kept = KeptMemory(tmp_path / "keeper.sock")
        second = PlayedNode(tmp_path, SETTINGS, keeper=kept, manifests="emptied")
        for image in kept.find():
            second.store.adopt(image)
        second.stager.stage(item)
        done = await second.end()
        assert isinstance(done, StageDone), done
        assert sum(second.fetched.values()) == 0
        await second.close()
        kept.close()
