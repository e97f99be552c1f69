"""What a node asks, and in which order, to bring a version."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from hotweights_agent.session.messages import StageDone
from hotweights_agent.settings import StagingSettings
from hotweights_agent.staging.store import Store
from hotweights_crds.nodeweights import Peer, StageItem
from hotweights_transports.peers.base import Identity, PeerServer
from hotweights_transports.peers.proof import ServerKey
from hotweights_transports.peers.registry import transport_for
from tests.agent.played_node import PlayedNode, published

# more than `PlayedNode.end` waits: nothing here takes as long
SETTINGS = StagingSettings(patience_seconds=3600.0)


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


@pytest.mark.parametrize(("proves", "scheme"), [(True, "tcp"), (False, "file")])
async def test_a_parent_that_does_not_prove_who_it_is_gets_no_token_and_others_are_asked(
    node: PlayedNode, other: PlayedNode, tmp_path: Path, proves: bool, scheme: str
) -> None:
    item, manifest = published(tmp_path, "v1")
    other.stager.stage(item)
    assert isinstance(await other.end(), StageDone)
    tokens: list[str] = []

    def authenticate(token: str) -> Identity:
        tokens.append(token)
        return Identity("agent")

    key = ServerKey()
    transport = transport_for("tcp://127.0.0.1:0")
    server = transport.listen("tcp://127.0.0.1:0", other.store, authenticate, prove=key.prove)
    with server:
        key.serves_at(server.address)
        told = key.public if proves else ServerKey().public
        # a stand-in at the same address, of a route from before it had a key, is no way around it
        old = Peer(node="other", endpoint=server.address)
        peer = old.model_copy(update={"key": told})
        node.stager.stage(item.model_copy(update={"parents": [peer], "fallbacks": [old]}))
        assert isinstance(await node.end(), StageDone)
    assert {name: nbytes for name, nbytes in node.fetched.items() if nbytes} == {
        scheme: manifest.nbytes
    }
    assert bool(tokens) is proves


async def test_a_node_that_reads_the_source_waits_for_nobody(
    node: PlayedNode, store: Store, tmp_path: Path, serve: Callable[[Store], PeerServer]
) -> None:
    """Whoever stands in is late, as all nodes are told at once."""
    item, _ = published(tmp_path, "v1")
    peer = Peer(node="late", endpoint=serve(store).address)
    node.stager.stage(item.model_copy(update={"fallbacks": [peer]}))
    assert isinstance(await node.end(), StageDone)
