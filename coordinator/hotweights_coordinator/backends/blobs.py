"""Plans and manifests, which are too big for the state that names them: in the backend, and at hand
while they are asked for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping

from hotweights_coordinator.backends.base import Backend, BackendError, Lease

log = logging.getLogger(__name__)


class Blobs:
    """Plans and manifests by their digests, of which those that were asked for are in memory."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._at_hand: dict[str, bytes] = {}
        self._reading = asyncio.Lock()

    def at_hand(self, digest: str) -> bytes | None:
        """What is in memory; None: the backend has to be asked, by `get`."""
        return self._at_hand.get(digest)

    async def get(self, digest: str) -> bytes | None:
        """None: there is none of this name. A thousand who ask at once are one question. Raises
        `Unavailable`.
        """
        async with self._reading:
            found = self._at_hand.get(digest) or await self._backend.get_blob(digest)
        if found is not None:
            self._at_hand[digest] = found
        return found

    async def put(self, blobs: Mapping[str, bytes]) -> None:
        """Before the state that names them is stored. Raises `BackendError`."""
        for digest, blob in blobs.items():
            await self._backend.put_blob(digest, blob)
            self._at_hand[digest] = blob

    def keep(self, named: Collection[str]) -> None:
        """Only these stay at hand: another leader may have dropped the others."""
        self._at_hand = {digest: blob for digest, blob in self._at_hand.items() if digest in named}

    async def forget(self, digests: Collection[str], lease: Lease) -> None:
        """After a state that no longer names them was stored."""
        for digest in digests:
            self._at_hand.pop(digest, None)
            try:
                await self._backend.drop_blob(digest, lease)
            except BackendError as error:
                log.warning("%s is kept for nothing: %s", digest, error)
