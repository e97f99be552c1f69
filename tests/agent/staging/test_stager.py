"""What a node asks, and in which order, to bring a version."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from hotweights_agent.session.messages import StageDone
from hotweights_agent.settings import StagingSettings
from hotweights_agent.staging.store import Store
from hotweights_crds.nodeweights import Peer, StageItem
from hotweights_transports.peers.base import PeerServer
from tests.agent.staging.played_node import PlayedNode, published

SETTINGS = StagingSettings(patience_seconds=5.0)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[PlayedNode]:
    found = PlayedNode(tmp_path, SETTINGS)
    yield found
    await found.close()


@pytest.fixture
async def other(tmp_path: Path) -> AsyncIterator[PlayedNode]:
    found = PlayedNode(tmp_path, SETTINGS)
    yield found
    await found.close()


@pytest.mark.parametrize("role", ["parents", "fallbacks"])
async def test_a_node_without_parents_is_one_that_reads_the_source(
    node: PlayedNode,
    other: PlayedNode,
    tmp_path: Path,
    serve: Callable[[Store], PeerServer],
    role: str,
) -> None:
    item, manifest = published(tmp_path, "v1")
    other.stager.stage(item)
    assert isinstance(await other.end(), StageDone)
    peer = Peer(node="other", endpoint=serve(other.store).address)
    node.stager.stage(item.model_copy(update={role: [peer]}))
    assert isinstance(await node.end(), StageDone)
    scheme = {"parents": "tcp", "fallbacks": "file"}[role]
    assert {name for name, nbytes in node.fetched.items() if nbytes} == {scheme}
    assert node.fetched[scheme] == manifest.nbytes


async def test_a_node_that_cannot_read_the_source_takes_it_from_those_that_stand_in(
    node: PlayedNode, other: PlayedNode, tmp_path: Path, serve: Callable[[Store], PeerServer]
) -> None:
    item, manifest = published(tmp_path, "v1")
    other.stager.stage(item)
    assert isinstance(await other.end(), StageDone)
    peer = Peer(node="other", endpoint=serve(other.store).address)
    elsewhere = StageItem(**(item.model_dump() | {"uri": "file:///nowhere", "fallbacks": [peer]}))
    node.stager.stage(elsewhere)
    assert isinstance(await node.end(), StageDone)
    assert node.fetched["tcp"] == manifest.nbytes


async def test_a_node_that_reads_the_source_waits_for_nobody(
    node: PlayedNode, store: Store, tmp_path: Path, serve: Callable[[Store], PeerServer]
) -> None:
    """Whoever stands in is late, as all nodes are told at once."""
    item, _ = published(tmp_path, "v1")
    peer = Peer(node="late", endpoint=serve(store).address)
    began = time.monotonic()
    node.stager.stage(item.model_copy(update={"fallbacks": [peer]}))
    assert isinstance(await node.end(), StageDone)
    assert time.monotonic() - began < SETTINGS.patience_seconds
