"""What other workers get to see of this worker's store.

A worker that may not read the source waits for the others; if it let the others wait for it in
turn, all would wait for each other. So it lends what it has and lets nobody wait.
"""

from __future__ import annotations

from hotweights_agent.staging.store import Store
from hotweights_transports.peers.base import ChunkProvider, Lease, Pending


class LocalChunks(ChunkProvider):
    """A `ChunkProvider` over the store that `lend` is given."""

    def __init__(self) -> None:
        self.waits = True
        """Whether what is still on its way here is worth waiting for."""
        self._store: Store

    def lend(self, store: Store) -> ChunkProvider:
        """Speak of this store from now on, and before anybody asks; gives itself."""
        self._store = store
        return self

    def locate(self, blake3: str) -> Lease | Pending | None:
        """As `ChunkProvider` has it, but nobody waits here while `waits` is False. From any
        thread.
        """
        found = self._store.locate(blake3)
        return found if self.waits or not isinstance(found, Pending) else None

    def manifest(self, digest: str) -> bytes | None:
        """As `ChunkProvider` has it: the store's."""
        return self._store.manifest(digest)
