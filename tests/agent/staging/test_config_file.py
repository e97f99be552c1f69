"""A version's configuration comes along beside its weights, from whoever has it, and its absence costs
nothing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from hotweights_agent.local.kept_memory import _image
from hotweights_agent.session.messages import StageDone
from hotweights_agent.settings import StagingSettings
from hotweights_agent.staging import compacting, config_file
from hotweights_agent.staging.chunk_sources import PeerSource
from hotweights_agent.staging.store import Store
from hotweights_crds.nodeweights import Peer, StageItem
from hotweights_planner.compaction import Compaction
from hotweights_planner.manifest import MAX_CONFIG_NBYTES
from hotweights_storage.errors import Cancelled
from hotweights_storage.resolve import publish
from hotweights_storage.slab import sealed_memfd
from hotweights_storage.sources.file import open_folder
from hotweights_storage.stage import stage_from_source
from hotweights_transports.peers.base import Deliver, Missing, PeerClient, PeerServer, Want
from tests.agent.played_node import PlayedNode

CONFIG = b'{"model_type": "llama", "rope_theta": 10000.0, "name": "\xc3\xbc"}'


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has it is given as long as a busy machine takes."""
    monkeypatch.setattr(config_file, "SECONDS_EACH", 50.0)


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[list[PlayedNode]]:
    made = [PlayedNode(tmp_path, StagingSettings(patience_seconds=5.0)) for _ in range(2)]
    yield made
    for node in made:
        await node.close()


def published(folder: Path, config: bytes = CONFIG) -> StageItem:
    root = folder / "v1"
    root.mkdir()
    save_file({"a": numpy.arange(9000, dtype=numpy.float32)}, root / "model.safetensors")
    (root / "config.json").write_bytes(config)
    with open_folder(root) as source:
        found = publish(source, "m", "v1")
    return StageItem(
        digest=found.digest, namespace="ns", model="m", version="v1", uri=f"file://{root}"
    )


async def staged(node: PlayedNode, item: StageItem) -> StageDone:
    node.stager.stage(item)
    end = await node.end()
    assert isinstance(end, StageDone), end
    return end


def text(store: Store, item: StageItem) -> object:
    """What an engine is told of ``config.json``; None: nothing but its digest."""
    with store.image(item.digest) as image:
        (file,) = json.loads(image.table_json)["files"]
    assert file["name"] == "config.json"
    return file.get("text")


async def test_it_comes_from_the_source(nodes: list[PlayedNode], tmp_path: Path) -> None:
    item = published(tmp_path)
    done = await staged(nodes[0], item)
    assert text(nodes[0].store, item) == CONFIG.decode()
    assert done.bytes_fetched == done.bytes_total == 36000, "it does not count as weights"


async def test_it_comes_from_a_parent_where_the_source_is_not(
    nodes: list[PlayedNode], tmp_path: Path, serve: Callable[[Store], PeerServer]
) -> None:
    item = published(tmp_path)
    await staged(nodes[0], item)
    (tmp_path / "v1").rename(tmp_path / "gone")
    parent = Peer(node="other", endpoint=serve(nodes[0].store).address)
    await staged(nodes[1], item.model_copy(update={"parents": [parent]}))
    assert text(nodes[1].store, item) == CONFIG.decode()


def test_a_parent_that_is_about_to_have_it_is_waited_for(
    tmp_path: Path, serve: Callable[[Store], PeerServer], connect: Callable[[str], PeerClient]
) -> None:
    """In a chain, a child has the last chunk a moment after its parent."""
    published(tmp_path)
    parent, child = (Store(available=lambda: 2**30) for _ in range(2))
    with open_folder(tmp_path / "v1") as source:
        manifest = publish(source, "m", "v1")
        with parent.begin(manifest) as above, child.begin(manifest) as below:
            stage_from_source(source, above.builder)
            peer = PeerSource(connect(serve(parent).address), manifest.digest)
            asking = threading.Thread(
                target=config_file.bring_config,
                args=(below.builder, [peer], threading.Event()),
            )
            asking.start()
            above.builder.config = CONFIG
            above.commit()
            asking.join()
            assert below.builder.config == CONFIG
    parent.release(manifest.digest)


@pytest.mark.parametrize(
    "config",
    [b"", b"\xff{}", b"{}" + b" " * MAX_CONFIG_NBYTES],
    ids=["is empty", "is no text", "is large"],
)
async def test_what_nobody_can_compare_stays_behind(
    nodes: list[PlayedNode], tmp_path: Path, config: bytes
) -> None:
    item = published(tmp_path, config)
    await staged(nodes[0], item)
    assert text(nodes[0].store, item) is None


async def test_a_version_is_whole_without_it(
    nodes: list[PlayedNode], tmp_path: Path, serve: Callable[[Store], PeerServer]
) -> None:
    """The parent is of a release that did not keep it, and the source is not here."""
    item = published(tmp_path)
    await staged(nodes[0], item)
    with nodes[0].store.image(item.digest) as image:
        image._config = None
    (tmp_path / "v1").rename(tmp_path / "gone")
    parent = Peer(node="other", endpoint=serve(nodes[0].store).address)
    await staged(nodes[1], item.model_copy(update={"parents": [parent]}))
    assert text(nodes[1].store, item) is None


async def test_the_next_agent_finds_it_again(nodes: list[PlayedNode], tmp_path: Path) -> None:
    item = published(tmp_path)
    await staged(nodes[0], item)
    other = Store(available=lambda: 2**30)
    with nodes[0].store.image(item.digest) as image:
        manifest = sealed_memfd(image.manifest.canonical)
        kept = _image([manifest.fd, image.fds[0]], list(image.slabs), item.digest)
        found, canonical = image.manifest, image.manifest.canonical
    manifest.release()
    assert (kept.config, kept.manifest.canonical) == (CONFIG, canonical)
    other.adopt(kept)
    with other.begin(found) as staging:
        staging.commit()
    assert text(other, item) == CONFIG.decode()
    other.release(item.digest)


async def test_a_version_that_moves_keeps_it(nodes: list[PlayedNode], tmp_path: Path) -> None:
    item = published(tmp_path)
    await staged(nodes[0], item)
    with nodes[0].store.image(item.digest) as image:
        plan = Compaction(image.chunks, {}, frozenset(), 0)
        found = compacting.moved(image, plan, lambda: 1 << 30)
    assert found is not None
    assert found[1].config == CONFIG
    found[1].close()


class Silent:
    """A source that never answers, or that gives others' bytes."""

    name = "silent"

    def __init__(self, gives: bytes | None = None) -> None:
        self.gives, self.asked = gives, 0

    def fetch(
        self, wanted: Iterator[Want], deliver: Deliver, stop: threading.Event
    ) -> list[Missing]:
        self.asked += 1
        for want in wanted:
            if self.gives is None:
                stop.wait(10)
                raise Cancelled("called off")
            deliver(want, memoryview(self.gives))
        return []


async def test_neither_silence_nor_a_lie_is_waited_for_or_kept(
    nodes: list[PlayedNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_file, "SECONDS_EACH", 0.05)
    item = published(tmp_path)
    with open_folder(tmp_path / "v1") as source:
        manifest = publish(source, "m", "v1")
    assert manifest.digest == item.digest
    with nodes[0].store.begin(manifest) as staging:
        sources = [Silent(), Silent(b"{}"), Silent(CONFIG), Silent()]
        config_file.bring_config(staging.builder, sources, threading.Event())
        assert staging.builder.config == CONFIG
        assert [source.asked for source in sources] == [1, 1, 1, 0]
