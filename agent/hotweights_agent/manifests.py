"""Finds a version's manifest by its digest: at the node's parents, at their stand-ins, and last at the origin.

Whoever gives it cannot change it: the digest is checked, and everything in it. A peer that does not know the version yet is
asked again for a while, because reading the origin may mean hashing a whole checkpoint. It fetches no weights.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from hotweights_agent.fetch import FetchFailed, Persistence
from hotweights_planner import manifest as manifests
from hotweights_planner.errors import BadManifest
from hotweights_planner.manifest import Manifest
from hotweights_transports.errors import Cancelled
from hotweights_transports.peers.base import PeerClient, PeerError, PeerMissing

log = logging.getLogger(__name__)


def fetch_manifest(
    digest: str,
    peers: Sequence[PeerClient],
    origin: Callable[[], Manifest],
    *,
    persistence: Persistence | None = None,
    cancel: threading.Event | None = None,
) -> Manifest:
    """The manifest that `digest` names. `origin` resolves the source, and is only called when no peer has it.

    Raises `Cancelled`, `FetchFailed` (``DigestMismatch``: the source is no longer what was resolved), or what `origin` does.
    """
    persistence = persistence or Persistence()
    cancel = cancel or threading.Event()
    patient_until = time.monotonic() + min(persistence.patience_seconds, persistence.deadline_seconds)
    while True:
        found, may_come = _ask(digest, peers, cancel)
        if found is not None:
            return found
        if not may_come or time.monotonic() >= patient_until:
            break
        cancel.wait(persistence.again_seconds)
    _check(cancel)
    manifest = origin()
    if manifest.digest != digest:
        raise FetchFailed(
            f"the source now holds {manifest.digest}, not {digest}: it was written to after it was resolved; "
            "publish what is there as a new WeightVersion, or put the old files back",
            "DigestMismatch",
            transient=False,
        )
    return manifest


def _ask(digest: str, peers: Sequence[PeerClient], cancel: threading.Event) -> tuple[Manifest | None, bool]:
    """The manifest, if a peer has it now; and whether one may have it later."""
    may_come = False
    for peer in peers:
        _check(cancel)
        try:
            return manifests.parse(peer.fetch_manifest(digest), peer.address, digest), False
        except PeerMissing:
            may_come = True
        except (PeerError, BadManifest) as error:
            log.warning("no manifest from a peer: %s", error)
    return None, may_come


def _check(cancel: threading.Event) -> None:
    if cancel.is_set():
        raise Cancelled("cancelled while the manifest was looked for")
