"""State that outlives a coordinator, and lets several of them stand by: `base.Backend` on Redis.

What is written, and when it counts, is ``redis_store``'s; this says which bytes the state is.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from hotweights_common.reasons import Reason
from hotweights_coordinator.backends.base import Lease, decode, encode
from hotweights_coordinator.backends.redis_store import RedisStore, available
from hotweights_coordinator.state.state import CoordinatorState
from hotweights_coordinator.wire.messages import CoordinatorError

log = logging.getLogger(__name__)

URL_VARIABLE = "HOTWEIGHTS_REDIS_URL"
CLUSTER_VARIABLE = "HOTWEIGHTS_COORD_CLUSTER"
LEASE_VARIABLE = "HOTWEIGHTS_COORD_LEASE_SECONDS"

_CLUSTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class RedisSettingsError(CoordinatorError):
    """An environment variable that says nothing usable."""

    reason = Reason.BAD_SETTING


@dataclass(frozen=True, slots=True)
class RedisSettings:
    """Where the state is, whose it is, and how long a leader may be silent."""

    url: str = "redis://127.0.0.1:6379/0"
    cluster: str = "default"
    """Coordinators of one name share one state."""
    lease_seconds: float = 5.0
    """A leader that dies is replaced after at most this and a little; one that Redis does not hear
    for this long steps down.
    """

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """What the environment says, else the defaults. Raises `RedisSettingsError`."""
        usual = cls()
        found = cls(
            environment.get(URL_VARIABLE) or usual.url,
            environment.get(CLUSTER_VARIABLE) or usual.cluster,
            _seconds(environment.get(LEASE_VARIABLE) or str(usual.lease_seconds)),
        )
        if not _CLUSTER.fullmatch(found.cluster):
            raise RedisSettingsError(
                f"${CLUSTER_VARIABLE} is {found.cluster!r}; letters, digits, '.', '_' and '-' "
                "are for names"
            )
        return found


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    # below, every pause of a busy machine would lose it; above, nobody takes over for minutes
    if not 0.1 <= seconds <= 300.0:
        raise RedisSettingsError(
            f"${LEASE_VARIABLE} is {text!r}; it has to be a number of seconds from 0.1 to 300"
        )
    return seconds


class RedisBackend:
    """A `base.Backend` that is shared by all coordinators of one cluster name."""

    name = "redis"

    def __init__(self, settings: RedisSettings) -> None:
        """Connects to nothing yet. Raises `RedisSettingsError`."""
        if reason := available():
            raise RedisSettingsError(reason)
        try:
            self._store = RedisStore(settings.url, settings.cluster, settings.lease_seconds)
        except ValueError as error:
            raise RedisSettingsError(
                f"${URL_VARIABLE} is no address of a Redis: {error}"
            ) from error
        self._kept: CoordinatorState | None = None  # what Redis has, as far as we know
        self._highest_token = 0
        self._lease: Lease | None = None
        self._swept_fence = 0

    @property
    def renew_seconds(self) -> float:
        return self._store.renew_seconds

    async def lead(self, instance_id: str, endpoint: str) -> Lease:
        first, self._lease = self._lease is None, await self._store.lead(instance_id, endpoint)
        if first and (warning := await self._store.persistence()):
            log.warning(warning)
        return self._lease

    async def load(self) -> CoordinatorState | None:
        self._kept = None
        # tokens go on above what this process has known, or engines would refuse them
        parts, blobs = await self._store.load()
        self._kept = durable = decode(parts) if parts else None
        await self._sweep(blobs - (durable.blobs if durable else frozenset()))
        known, self._highest_token = (
            self._highest_token,
            max(self._highest_token, durable.token if durable else 0),
        )
        if (durable is not None and durable.token >= known) or not known:
            return durable
        log.error(
            "Redis HAS LOST STATE: decisions up to token %d are gone; tokens go on from there",
            known,
        )
        return replace(durable or CoordinatorState(), token=known)

    async def _sweep(self, orphans: frozenset[str]) -> None:
        """Drop what a former leader put and never named, once a lease: later it might be what is
        about to be named.
        """
        if self._lease is not None and self._lease.mine and self._lease.fence != self._swept_fence:
            self._swept_fence = self._lease.fence
            if orphans:
                await self._store.drop(sorted(orphans), self._lease)

    async def store(self, durable: CoordinatorState, lease: Lease) -> None:
        # nothing is known of it until Redis has answered, so the next write would be of all parts
        before, self._kept = self._kept, None
        await self._store.write(encode(durable, before), lease)
        self._kept = durable
        self._highest_token = max(self._highest_token, durable.token)

    async def put_blob(self, digest: str, content: bytes) -> None:
        await self._store.put(digest, content)

    async def get_blob(self, digest: str) -> bytes | None:
        return await self._store.get(digest)

    async def drop_blob(self, digest: str, lease: Lease) -> None:
        await self._store.drop([digest], lease)

    async def release(self, lease: Lease) -> None:
        await self._store.release(lease)

    async def close(self) -> None:
        await self._store.close()
