"""A lease, a hash and some blobs in Redis, that only the lease's holder can change.

This module alone knows the library ``redis``, and knows nothing of what the bytes mean. Its
promises:

* A write counts if, and only if, the lease in Redis still carries this process's fence
  (``redis_scripts``). No clock decides that; the clock here keeps a leader from *answering* after
  its time.
* The lease's time is counted from the moment the request for it was sent, by a clock that
  never jumps and goes on while the machine is suspended, less a margin: this process stops calling itself leader before Redis does, however long the answer
  took.
* A write without an answer leaves the outcome open. It is settled before the next one: ``load``
  takes a new revision, which voids whatever is still on its way, and gives what holds.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from hotweights_coordinator.backends import redis_scripts as scripts
from hotweights_coordinator.backends.base import Fenced, Lease, Unavailable, lease_clock

log = logging.getLogger(__name__)

LEASE_MARGIN = 0.1
"""Share of the lease that a leader gives up at its end: what clocks may differ in speed, and an
answer's way to the client.
"""
RENEWALS_PER_LEASE = 3  # so that one that fails leaves time for more
LOOKS_PER_LEASE = 10
"""How often a follower looks whether the lease is free; and a leader that could not renew whether
it can.
"""

_OWN_FIELDS = frozenset({"fence", "revision", "endpoint"})
# before the first look: fence 0 is below every one that Redis gives
_NOBODYS = Lease(mine=False, fence=0, leader="", until=0.0)


def available() -> str:
    """Why Redis cannot be used; empty: it can."""
    missing = (
        "the Python package redis is not installed; pip install -e '.[coordinator]' in the checkout"
    )
    return "" if find_spec("redis") else missing


class Conflict(Unavailable):
    """The state is not, or may not be, the one that a write was decided on: nothing was written.
    ``load`` comes first.
    """


class RedisStore:
    """One process's face of one cluster's state.

    ``lead`` comes first and then every ``renew_seconds``; with a new fence, after `Conflict` and
    after `Unavailable` comes ``load``; then ``write`` as often as wished; ``release`` at the end.
    Whoever does not lead may ``load`` and ``get``.
    """

    def __init__(
        self,
        url: str,
        cluster: str,
        lease_seconds: float,
        clock: Callable[[], float] = lease_clock,
    ) -> None:
        """Raises ValueError for a URL that is none. Connects to nothing yet."""
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError

        def connect() -> Any:
            # Nothing is repeated by the library: whether a lost answer may be asked for again is
            # decided here. Nor does it limit
            # writes to its sockets: it would do so with asyncio.wait_for, which on Python 3.11
            # swallows a cancellation now and then.
            return Redis.from_url(url, retry=Retry(NoBackoff(), 0), protocol=2, socket_timeout=None)

        self._error: type[Exception] = RedisError
        self._lease_seconds, self._clock = lease_seconds, clock
        # A process that takes its predecessor's place must not take its lease for its own.
        self._nonce = secrets.token_hex(4)
        self._keys = [f"hotweights/{cluster}/{name}" for name in ("leader", "state", "blobs")]
        # Pools of their own: a long write must not make a renewal late. An answer later than the
        # lease is of no use to anybody.
        self._lease_timeout_seconds = lease_seconds / RENEWALS_PER_LEASE
        self._redis, self._lease_redis = connect(), connect()
        at = self._redis.connection_pool.connection_kwargs
        self.place = (
            at.get("path")
            or f"redis://{at.get('host', 'localhost')}:{at.get('port', 6379)}/{at.get('db', 0)}"
        )
        self._changing = asyncio.Lock()
        self._lease = _NOBODYS
        self._value = ""  # of our lease; empty: we have none
        self._revision: int | None = None  # None: to be loaded
        self._highest_fence = 0
        self._doubtful = False

    @property
    def renew_seconds(self) -> float:
        """When ``lead`` wants to be called again."""
        calm = self._lease.mine and not self._doubtful
        return self._lease_seconds / (RENEWALS_PER_LEASE if calm else LOOKS_PER_LEASE)

    async def lead(self, instance_id: str, endpoint: str) -> Lease:
        """Take the lease if it is free, renew it if it is ours, else say whose it is."""
        self._doubtful = True
        identity = f"{instance_id}/{self._nonce}"
        if not (self._value and await self._renew()):
            await self._acquire(identity, endpoint)
        self._doubtful = False
        return self._lease

    async def _renew(self) -> bool:
        sent, value = self._clock(), self._value
        outcome, *_ = await self._run(scripts.RENEW, value, self._lease_milliseconds)
        if outcome == b"ok":
            self._lease = Lease(
                True, self._lease.fence, self._lease.leader, self._end(sent, self._lease_seconds)
            )
        return bool(outcome == b"ok")

    async def _acquire(self, identity: str, endpoint: str) -> None:
        sent = self._clock()
        arguments = (identity, endpoint, self._lease_milliseconds, self._highest_fence)
        outcome, *rest = await self._run(scripts.ACQUIRE, *arguments)
        if outcome == b"acquired":
            fence, last = rest
            if last < self._highest_fence:
                log.error(
                    _LOST,
                    self.place,
                    f"its last lease was number {last}, this process knows {self._highest_fence}",
                )
            self._hold(
                f"{identity}:{fence}",
                Lease(True, fence, endpoint, self._end(sent, self._lease_seconds)),
            )
            return
        holder, leader, remaining = rest[0].decode(), rest[1].decode(), rest[2] / 1000
        name, _, fence = holder.rpartition(":")
        if name == identity:  # the answer that gave it to us got lost
            self._hold(holder, Lease(True, int(fence), leader, self._end(sent, remaining)))
        else:
            self._hold("", Lease(False, int(fence), leader, self._end(sent, remaining)))

    def _hold(self, value: str, lease: Lease) -> None:
        if value != self._value:
            self._revision = None
        self._value, self._lease = value, lease
        self._highest_fence = max(self._highest_fence, lease.fence)

    def _end(self, sent: float, seconds: float) -> float:
        return sent + seconds - self._lease_seconds * LEASE_MARGIN

    async def release(self, lease: Lease) -> None:
        """Give the lease back, so that the next takes over at once."""
        if self._holds(lease):
            value = self._value
            self._hold("", _NOBODYS)
            await self._run(scripts.RELEASE, value)

    async def load(self) -> tuple[dict[str, bytes], frozenset[str]]:
        """Fields and names of blobs. For the leader it voids every write of its own that is still
        on its way.
        """
        async with self._changing:
            self._revision = None
            if value := self._value:
                outcome, *rest = await self._run(scripts.CLAIM, value)
                if outcome == b"ok":
                    revision, fields, blobs = rest
                    self._revision = revision if value == self._value else None
                    return _fields(fields), frozenset(name.decode() for name in blobs)
            _, fields = await self._run(scripts.READ)
            return _fields(fields), frozenset()

    async def write(self, fields: Mapping[str, bytes], lease: Lease) -> None:
        """Write fields, all or none, if the state is still what was loaded or written last."""
        pairs = [part for pair in fields.items() for part in pair]
        async with self._changing:
            value, revision = self._expected(lease)
            self._revision = None  # unknown until Redis has answered
            (written,) = await self._change(scripts.WRITE, value, revision, *pairs)
            self._revision = written if value == self._value else None

    async def put(self, name: str, content: bytes) -> None:
        """Keep a blob under the name of its content, so that a late one does no harm. Raises
        `Fenced` or `Unavailable`.
        """
        if not self._value:
            raise Fenced("this coordinator does not lead")
        await self._change(scripts.PUT, self._value, name, content)

    async def get(self, name: str) -> bytes | None:
        """A blob, for anybody; None: there is none of this name. Raises `Unavailable`."""
        content: bytes | None = await self._ask(
            self._redis.hget(self._keys[2], name), self._lease_seconds
        )
        return content

    async def drop(self, names: Sequence[str], lease: Lease) -> None:
        """Forget blobs, if the state is still what was loaded or written last. Raises `Fenced` or
        `Unavailable`.
        """
        async with self._changing:
            value, revision = self._expected(lease)
            await self._change(scripts.DROP, value, revision, *names)

    async def persistence(self) -> str:
        """What a crash of Redis would lose, in words; empty: nothing, or it does not say."""
        try:
            found = await self._ask(self._redis.config_get("append*"), self._lease_seconds)
        except Unavailable:
            return ""  # managed services keep CONFIG to themselves
        settings = {_text(name): _text(value) for name, value in found.items()}
        if settings.get("appendonly") != "yes":
            return (
                f"Redis at {self.place} keeps no append-only file, so its restart loses commits; "
                f"{_REMEDY}"
            )
        if settings.get("appendfsync") != "always":
            return (
                f"Redis at {self.place} syncs its file only now and then, so a crash loses "
                f"the last commits; {_REMEDY}"
            )
        return ""

    async def close(self) -> None:
        """End all connections; the lease is left to its end unless it was released."""
        await self._redis.aclose()
        await self._lease_redis.aclose()

    # -- how a script is run --------------------------------------------------------------------

    @property
    def _lease_milliseconds(self) -> int:
        return round(self._lease_seconds * 1000)

    def _holds(self, lease: Lease) -> bool:
        return bool(self._value) and self._value.endswith(f":{lease.fence}")

    def _expected(self, lease: Lease) -> tuple[str, int]:
        if not self._holds(lease):
            raise Fenced(f"lease {lease.fence} is no longer this coordinator's")
        if self._revision is None:
            raise Conflict(
                "what became of an earlier write is not known; the state has to be loaded first"
            )
        return self._value, self._revision

    async def _change(self, script: str, *args: bytes | str | int) -> list[Any]:
        """Run a script that compares the lease, and maybe the revision. Raises `Fenced` or
        `Conflict` where it found others, and then nothing was changed.
        """
        rest: list[Any]
        outcome, *rest = await self._run(script, *args)
        if outcome == b"fenced":
            raise Fenced(
                f"this coordinator no longer leads: the lease is {rest[0].decode() or 'nobody'}'s"
            )
        if outcome == b"conflict":
            raise Conflict("the state was written meanwhile; it has to be loaded first")
        return rest

    async def _run(self, script: str, *args: bytes | str | int) -> Any:
        urgent = script in (scripts.ACQUIRE, scripts.RENEW, scripts.RELEASE)
        client, seconds = (
            (self._lease_redis, self._lease_timeout_seconds)
            if urgent
            else (self._redis, self._lease_seconds)
        )
        return await self._ask(client.register_script(script)(keys=self._keys, args=args), seconds)

    async def _ask(self, answer: Any, timeout_seconds: float) -> Any:
        try:
            # For all of it together: connecting, sending, waiting, and where Redis was restarted,
            # sending the script again.
            async with asyncio.timeout(timeout_seconds):
                return await answer
        except TimeoutError as error:
            raise Unavailable(
                f"Redis at {self.place} does not answer within {timeout_seconds:g} s"
            ) from error
        except (self._error, OSError) as error:
            raise Unavailable(
                f"Redis at {self.place}: {str(error).rstrip(chr(46))}; start it, or set "
                "$HOTWEIGHTS_REDIS_URL"
            ) from error


_REMEDY = "set `appendonly yes` and `appendfsync always`"
_LOST = (
    "Redis at %s HAS LOST STATE: %s. Numbers go on above what is known; check what is current "
    "with `hotweights coord-status`, "
    "and " + _REMEDY
)


def _fields(flat: Sequence[bytes]) -> dict[str, bytes]:
    pairs = {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}
    return {name: value for name, value in pairs.items() if name not in _OWN_FIELDS}


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
