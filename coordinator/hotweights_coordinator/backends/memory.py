"""State that lives and dies with one coordinator, which therefore always leads."""

from __future__ import annotations

import math

from hotweights_coordinator.backends.base import Lease
from hotweights_coordinator.state.state import CoordinatorState


class MemoryBackend:
    """A `base.Backend` of one coordinator: its lease never ends, and its state goes with it."""

    name = "memory"
    renew_seconds = 1.0  # nothing is to be renewed; the server asks all the same

    def __init__(self) -> None:
        self._state: CoordinatorState | None = None
        self._blobs: dict[str, bytes] = {}

    async def lead(self, instance_id: str, endpoint: str) -> Lease:
        return Lease(mine=True, fence=1, leader=endpoint, until=math.inf)

    async def load(self) -> CoordinatorState | None:
        return self._state

    async def store(self, durable: CoordinatorState, lease: Lease) -> None:
        self._state = durable

    async def put_blob(self, digest: str, content: bytes) -> None:
        self._blobs[digest] = content

    async def get_blob(self, digest: str) -> bytes | None:
        return self._blobs.get(digest)

    async def drop_blob(self, digest: str, lease: Lease) -> None:
        self._blobs.pop(digest, None)

    async def release(self, lease: Lease) -> None:
        pass

    async def close(self) -> None:
        pass
