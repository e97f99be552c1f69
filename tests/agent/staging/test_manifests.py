"""A version's manifest comes from whoever has it, and nobody can change it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from hotweights_agent.fetch import FetchFailed, Persistence
from hotweights_agent.manifests import fetch_manifest
from hotweights_agent.store import Store
from hotweights_planner.manifest import Manifest
from hotweights_transports.errors import Cancelled
from hotweights_transports.peers.base import PeerClient, PeerServer

Serve = Callable[[Store], PeerServer]
Connect = Callable[[str], PeerClient]
PATIENT = Persistence(patience_seconds=1.0, again_seconds=0.02)
HASTY = Persistence(patience_seconds=0.0)


@pytest.fixture
def manifest(checkpoint: Callable[..., Any]) -> Manifest:
    found: Manifest = checkpoint("v1", (1, 2)).manifest
    return found


def unread() -> Manifest:
    raise AssertionError("the origin was read")


def test_from_a_peer_that_is_staging_it(manifest: Manifest, store: Store, serve: Serve, connect: Connect) -> None:
    with store.begin(manifest):
        assert fetch_manifest(manifest.digest, [connect(serve(store).address)], unread) == manifest


def test_a_peer_that_will_know_it_is_waited_for(
    manifest: Manifest, store: Store, serve: Serve, connect: Connect
) -> None:
    timer = threading.Timer(0.15, store.begin, [manifest])
    timer.start()
    assert fetch_manifest(manifest.digest, [connect(serve(store).address)], unread, persistence=PATIENT) == manifest
    timer.join()


def test_dead_and_ignorant_peers_are_passed_over(
    manifest: Manifest, store: Store, serve: Serve, connect: Connect
) -> None:
    gone = serve(store)
    gone.close()
    peers = [connect(gone.address), connect(serve(store).address)]
    assert fetch_manifest(manifest.digest, peers, lambda: manifest, persistence=HASTY) == manifest


def test_a_source_that_changed_is_named(manifest: Manifest, checkpoint: Callable[..., Any]) -> None:
    other = checkpoint("v1", (3,)).manifest
    with pytest.raises(FetchFailed, match=f"now holds {other.digest}, not {manifest.digest}") as caught:
        fetch_manifest(manifest.digest, [], lambda: other)
    assert caught.value.reason == "DigestMismatch"


def test_cancel(manifest: Manifest, store: Store, serve: Serve, connect: Connect) -> None:
    cancel = threading.Event()
    threading.Timer(0.1, cancel.set).start()
    with pytest.raises(Cancelled):
        fetch_manifest(manifest.digest, [connect(serve(store).address)], unread, persistence=PATIENT, cancel=cancel)
