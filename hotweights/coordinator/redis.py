"""Coordinator state in Redis: a lease that says who leads, and writes that only the leader's fence lets through.

This module alone knows the library ``redis``; it knows nothing of what the state means. Its promises:

* A write counts if, and only if, the lease in Redis still carries this process's fence (``redis_scripts``). The clock here only keeps
  a leader from *answering* after its time; no clock decides what is written.
* The lease's time is counted from the moment the request for it was sent, by a monotonic clock, less a margin: this process stops
  calling itself leader before Redis does, however long the answer took.
* A write without an answer leaves the outcome open. It is settled before the next one: ``load`` takes a new revision, which voids
  whatever is still on its way, and answers what holds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from hotweights.coordinator import redis_scripts as scripts

log = logging.getLogger(__name__)

LEASE_MARGIN = 0.1
"""Share of the lease that a leader gives up at its end: what clocks may differ in speed, and an answer's way to the client."""
RENEWALS_PER_LEASE = 3
LOOKS_PER_LEASE = 10
"""How often a follower looks whether the lease has been given back, so that a clean hand-over waits for next to nothing."""
_OWN_FIELDS = frozenset({"fence", "revision", "endpoint"})


def available() -> str:
    """Why Redis cannot be used; empty: it can."""
    return (
        "" if find_spec("redis") else "the Python package redis is not installed; pip install 'hotweights[coordinator]'"
    )


class BackendUnavailable(Exception):
    """Redis does not answer; what was asked may or may not have been done."""


class Fenced(Exception):
    """Another process leads, or nobody: nothing was written."""


class Conflict(Exception):
    """The state is not the one that the write was decided on: nothing was written."""


@dataclass(frozen=True, slots=True)
class Leader:
    """Who holds the lease."""

    identity: str
    fence: int
    endpoint: str
    remaining_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state as of one moment, and who led then."""

    fields: Mapping[str, bytes]
    leader: Leader | None


class RedisStore:
    """One coordinator's face of one cluster's hash, lease and blobs.

    Order of calls: ``acquire`` until it gives a fence; ``load``; then ``write`` as often as wished while somebody calls ``renew`` every
    third of the lease; ``release`` at the end. ``identity`` is this process's alone: a later one has another. ``read`` is for anybody at any time. After ``BackendUnavailable`` or ``Conflict`` from
    ``write``, ``load`` comes first again. After ``Fenced``, from whichever, this process no longer leads and ``acquire`` comes first.
    """

    def __init__(
        self,
        url: str,
        cluster: str,
        identity: str,
        endpoint: str,
        lease_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError

        self._error: type[Exception] = RedisError
        self._identity, self._endpoint, self._clock = identity, endpoint, clock
        self.lease_seconds = lease_seconds
        self._lease_key = f"hotweights/{cluster}/leader"
        self._state_key = f"hotweights/{cluster}/state"
        self._blob_prefix = f"hotweights/{cluster}/"

        def connect(timeout_seconds: float) -> Any:
            # Nothing here is repeated by the library: whether a lost answer may be asked for again is decided above, with the revision.
            return Redis.from_url(
                url,
                socket_timeout=timeout_seconds,
                socket_connect_timeout=timeout_seconds,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )

        # Two connection pools: a long write must not make a renewal late. An answer after the lease is of no use to anybody.
        self._redis = connect(lease_seconds)
        self._lease_redis = connect(lease_seconds / RENEWALS_PER_LEASE)
        at = self._redis.connection_pool.connection_kwargs
        self.place = f"redis://{at.get('host', at.get('path', 'localhost'))}:{at.get('port', '')}/{at.get('db', 0)}"
        self._scripts = {
            source: client.register_script(source)
            for client, sources in (
                (self._lease_redis, (scripts.ACQUIRE, scripts.RENEW, scripts.RELEASE)),
                (self._redis, (scripts.CLAIM, scripts.WRITE, scripts.READ)),
            )
            for source in sources
        }
        self._value = ""  # of our lease; empty: we have none
        self._until = 0.0  # by our clock
        self._revision: int | None = None  # None: to be loaded
        self._highest_fence = 0

    @property
    def fence(self) -> int:
        """Of our lease; 0: we have none."""
        return int(self._value.rpartition(":")[2]) if self._value else 0

    def leads(self) -> bool:
        """Whether nobody else can have taken over yet."""
        return bool(self._value) and self._clock() < self._until

    async def acquire(self) -> Leader:
        """Take the lease if nobody holds it; who holds it now."""
        sent = self._clock()
        outcome, *rest = await self._run(
            scripts.ACQUIRE, self._identity, self._endpoint, self._lease_milliseconds, self._highest_fence
        )
        if outcome == b"held":
            holder, endpoint, remaining = rest
            leader = self._leader(holder.decode(), endpoint.decode(), remaining / 1000)
            if leader.identity != self._identity:
                self._forget()
            else:  # ours: either we doubted it, or the answer that gave it got lost
                if self._value != holder.decode():
                    self._value, self._revision = holder.decode(), None
                self._extend(sent, leader.remaining_seconds)
            return leader
        fence, last = rest
        if last < self._highest_fence:
            log.error(
                "Redis at %s has lost state: its last lease was number %d, this process knows number %d; going on with %d. "
                "Run Redis with `appendonly yes` and `appendfsync always`, and check who leads and what is current",
                self.place, last, self._highest_fence, fence,
            )  # fmt: skip
        self._value = f"{self._identity}:{fence}"
        self._highest_fence = fence
        self._revision = None
        self._extend(sent, self.lease_seconds)
        return Leader(self._identity, fence, self._endpoint, self.lease_seconds)

    async def renew(self) -> None:
        """Keep the lease for its whole time from now on; ``Fenced``: it is gone."""
        sent = self._clock()
        await self._run_mine(scripts.RENEW, self._lease_milliseconds)
        self._extend(sent, self.lease_seconds)

    async def release(self) -> None:
        """Give the lease back, so that the next takes over at once."""
        if self._value:
            value, self._value = self._value, ""
            await self._run(scripts.RELEASE, value)

    async def load(self) -> Mapping[str, bytes]:
        """The state, to be changed by us; voids every write of ours that is still on its way."""
        self._revision = None
        revision, fields = await self._run_mine(scripts.CLAIM)
        self._revision = revision
        return _fields(fields)

    async def write(
        self, fields: Mapping[str, bytes], removed: Sequence[str] = (), blobs: Mapping[str, bytes | None] | None = None
    ) -> None:
        """Write fields and blobs (None: delete it) at once and durably, if the state is still what we know."""
        if self._revision is None:
            raise Conflict("the state has to be loaded before it is written")
        blobs = blobs or {}
        expected, self._revision = self._revision, None  # unknown until Redis has answered
        args: list[bytes | str | int] = [expected, len(fields), len(removed)]
        for name, value in fields.items():
            args += [name, value]
        args += [*removed, *(value or b"" for value in blobs.values())]
        keys = [self._blob_prefix + name for name in blobs]
        (revision,) = await self._run_mine(scripts.WRITE, *args, keys=keys)
        self._revision = revision

    async def read(self) -> Snapshot:
        """The state and who leads, for anybody."""
        _, holder, flat = await self._run(scripts.READ)
        fields = {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}
        self._highest_fence = max(self._highest_fence, int(fields.get("fence", b"0")))
        leader = self._leader(holder.decode(), fields.get("endpoint", b"").decode()) if holder else None
        return Snapshot(_fields(flat), leader)

    async def blob(self, name: str) -> bytes | None:
        """The bytes kept under this name."""
        return await self._ask(self._redis.get(self._blob_prefix + name))  # type: ignore[no-any-return]

    async def persistence(self) -> str:
        """What a crash of Redis would lose, in words; empty: nothing, or it does not say."""
        settings: dict[str, str] = {}
        try:
            for name in ("appendonly", "appendfsync"):
                answer = await self._ask(self._redis.config_get(name))
                settings |= {_text(key): _text(value) for key, value in answer.items()}
        except BackendUnavailable:
            return ""  # managed services keep CONFIG to themselves
        if settings.get("appendonly") != "yes":
            return f"Redis at {self.place} keeps no append-only file: a restart loses commits; set `appendonly yes` and `appendfsync always`"
        if settings.get("appendfsync") != "always":
            return f"Redis at {self.place} writes its file every so often: a crash loses the last commits; set `appendfsync always`"
        return ""

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()
        await self._lease_redis.aclose()

    # -- how a script is run ------------------------------------------------------------------------------------------------------

    @property
    def _lease_milliseconds(self) -> int:
        return round(self.lease_seconds * 1000)

    async def _run_mine(self, script: str, *args: bytes | str | int, keys: Iterable[str] = ()) -> list[Any]:
        """Run a script that compares our lease's value first."""
        if not self._value:
            raise Fenced("this coordinator does not lead")
        rest: list[Any]
        outcome, *rest = await self._run(script, self._value, *args, keys=keys)
        if outcome == b"fenced":
            holder = rest[0].decode()
            self._forget()
            if holder:
                self._leader(holder, "")
            raise Fenced(f"this coordinator no longer leads: the lease is {holder or 'nobody'}'s")
        if outcome == b"conflict":
            raise Conflict("the state was written meanwhile")
        return rest

    async def _run(self, script: str, *args: bytes | str | int, keys: Iterable[str] = ()) -> Any:
        return await self._ask(self._scripts[script](keys=[self._lease_key, self._state_key, *keys], args=args))

    async def _ask(self, answer: Awaitable[Any]) -> Any:
        try:
            return await answer
        except self._error as error:
            raise BackendUnavailable(f"Redis at {self.place}: {error}") from error

    def _leader(self, value: str, endpoint: str, remaining_seconds: float = 0.0) -> Leader:
        identity, _, fence = value.rpartition(":")
        self._highest_fence = max(self._highest_fence, int(fence))
        return Leader(identity, int(fence), endpoint, remaining_seconds)

    def _extend(self, sent: float, seconds: float) -> None:
        self._until = sent + seconds - self.lease_seconds * LEASE_MARGIN

    def _forget(self) -> None:
        self._value, self._revision = "", None


def _fields(flat: Sequence[bytes]) -> dict[str, bytes]:
    pairs = {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}
    return {name: value for name, value in pairs.items() if name not in _OWN_FIELDS}


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
