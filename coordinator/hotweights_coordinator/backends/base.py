"""What keeps the coordinator's state, and how one of several coordinators is the one that decides.

The server calls, in this order: `lead` at once and then every ``renew_seconds``, as long as it
lives; when a lease with a new ``fence`` is its own, `load`; then `store` for every group of
changes, before anybody hears of them; `release` and `close` at the end. Calls may overlap: `lead`
runs while a `store` is under way.

A blob (a plan, a manifest) is put before the state that names it is stored, and dropped after a
state that no longer names it was stored. Blobs are named by their content, so putting one twice
changes nothing.

Every call ends in bounded time. What an implementation may raise:

    BackendError           raised as one of these two
    ├── Fenced             somebody else leads: nothing was written
    └── Unavailable        nobody can say whether it was written; the server reloads before it
                           decides anything again
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, get_type_hints

from pydantic import TypeAdapter, ValidationError

from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason
from hotweights_coordinator.state.state import CoordinatorState

_BOOTTIME: int | None = getattr(time, "CLOCK_BOOTTIME", None)  # Linux has it


class BackendError(HotweightsError):
    """State could not be kept or read. The text names the store and the remedy."""

    reason = Reason.BACKEND_UNAVAILABLE


class Fenced(BackendError):
    """Another coordinator leads; this one's writes no longer count. Nothing was written."""

    reason = Reason.NOT_LEADER


class Unavailable(BackendError):
    """The store does not answer; what was being written may or may not be there."""


def lease_clock() -> float:
    """Seconds of the clock that leases are counted by. It never jumps, and goes on while the machine
    is suspended (CLOCK_BOOTTIME, clock_gettime(2)), which `time.monotonic` does not; where there is
    none, it is that one.
    """
    return time.monotonic() if _BOOTTIME is None else time.clock_gettime(_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Lease:
    """Who leads. ``fence`` grows with every take-over; ``leader`` is the endpoint that clients go
    to (empty: nobody's known).
    """

    mine: bool
    fence: int
    leader: str
    until: float
    """`lease_clock` until which its holder may act on it: earlier than the store's own end of it."""

    @property
    def is_held(self) -> bool:
        """Whether it is ours, and still is."""
        return self.mine and lease_clock() < self.until


class Backend(Protocol):
    """Keeps one `CoordinatorState` and some blobs."""

    name: str
    """One word: memory, redis."""
    renew_seconds: float
    """How often `lead` wants to be called."""

    async def lead(self, instance_id: str, endpoint: str) -> Lease:
        """Take the lease if it is free, renew it if it is ours, else say whose it is. Raises
        `Unavailable`.
        """
        ...

    async def load(self) -> CoordinatorState | None:
        """What was stored last; None: nothing ever was. Raises `Unavailable`."""
        ...

    async def store(self, durable: CoordinatorState, lease: Lease) -> None:
        """Replace what is stored if the lease's fence still is the newest. Raises `Fenced` or
        `Unavailable`.
        """
        ...

    async def put_blob(self, digest: str, content: bytes) -> None:
        """Keep it under this name. Raises `Unavailable`."""
        ...

    async def get_blob(self, digest: str) -> bytes | None:
        """None: there is none of this name. Raises `Unavailable`."""
        ...

    async def drop_blob(self, digest: str, lease: Lease) -> None:
        """Forget it if the lease's fence still is the newest. Raises `Fenced` or `Unavailable`."""
        ...

    async def release(self, lease: Lease) -> None:
        """Let another one lead at once. Raises `Unavailable`."""
        ...

    async def close(self) -> None:
        """End connections; nothing is called afterwards. Raises nothing."""
        ...


_ADAPTERS: dict[str, TypeAdapter[Any]] = {}


def encode(durable: CoordinatorState, before: CoordinatorState | None = None) -> dict[str, bytes]:
    """The state's parts as JSON, by name; with ``before``, only those parts that are others than
    its.
    """
    # by identity: `state` gives the very same object where nothing changed
    return {
        part.name: _adapter(part.name).dump_json(getattr(durable, part.name))
        for part in fields(CoordinatorState)
        if before is None or getattr(durable, part.name) is not getattr(before, part.name)
    }


def decode(parts: Mapping[str, bytes]) -> CoordinatorState:
    """The state that `encode` wrote down whole. Raises `Unavailable` where it is none."""
    try:
        return CoordinatorState(
            **{
                part.name: _adapter(part.name).validate_json(parts[part.name])
                for part in fields(CoordinatorState)
            }
        )
    except (KeyError, ValidationError) as error:
        raise Unavailable(
            f"what is stored is no coordinator's state ({_first(error)}); is it another release's?"
        ) from error


def _adapter(name: str) -> TypeAdapter[Any]:
    if not _ADAPTERS:
        _ADAPTERS.update(
            {key: TypeAdapter(hint) for key, hint in get_type_hints(CoordinatorState).items()}
        )
    return _ADAPTERS[name]


def _first(error: KeyError | ValidationError) -> str:
    return (
        f"{error.args[0]} is missing"
        if isinstance(error, KeyError)
        else json.dumps(error.errors()[0]["msg"])
    )
