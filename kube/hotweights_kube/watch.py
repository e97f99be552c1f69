"""List and watch, for as long as it takes: what changes reaches the caller, whatever happens to the connection.

A generator that never ends by itself: it lists, says ``SYNCED``, watches from there, and starts again where it left off when the
connection breaks, or from a new list when the API server has forgotten that point. Objects that vanished unseen meanwhile come
as ``DELETED`` with their last known metadata. Bookmarks keep the point fresh, and a connection without even those is taken for
dead. It refuses to know what the objects mean; a consumer that is slow slows only its own watch.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from hotweights_kube import errors
from hotweights_kube.client import Listing, Selection
from hotweights_kube.resources import Body, Resource, version_of

log = logging.getLogger(__name__)

ChangeType = Literal["ADDED", "MODIFIED", "DELETED", "SYNCED"]


class Watched(Protocol):
    """What a watch needs of the API."""

    async def list(self, resource: Resource, selection: Selection | None = None, *, page_size: int = 500) -> Listing:
        """All selected objects."""
        ...

    def stream(
        self, resource: Resource, selection: Selection, query: Any, *, silence_seconds: float
    ) -> AsyncIterator[Body]:
        """The events of one request."""
        ...


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to one object; ``SYNCED`` (without an object) when everything that exists has been told."""

    type: ChangeType
    body: Body = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a watch lasts, and how fast it is tried again."""

    watch_seconds: tuple[float, float] = (240.0, 360.0)
    """A request's length is drawn from here, so that a thousand watchers do not come back at once."""
    silence_seconds: float = 90.0
    """Bookmarks come every minute; without one for so long the connection is dead."""
    backoff_seconds: tuple[float, float] = (0.25, 8.0)
    """First and longest wait between attempts."""

    def wait_seconds(self, failures: int, draw: Callable[[], float]) -> float:
        """Exponential, capped, and between half and whole by a draw from [0, 1)."""
        first, longest = self.backoff_seconds
        return float(min(longest, first * 2 ** min(failures - 1, 16)) * (0.5 + draw() / 2))


def _log_trouble(error: errors.KubeError) -> None:
    log.warning("%s", error)


async def watch(
    api: Watched,
    resource: Resource,
    selection: Selection | None = None,
    *,
    pace: Pace | None = None,
    on_trouble: Callable[[errors.KubeError], None] = _log_trouble,
    draw: Callable[[], float] = random.random,
) -> AsyncGenerator[Change, None]:
    """Every change of the selected objects, from a first full list on, without end. Close it with ``aclosing``."""
    selection, pace = selection or Selection(), pace or Pace()
    known: dict[str, Body] = {}
    version = ""
    failures = 0
    while True:
        try:
            if not version:
                listing = await api.list(resource, selection)
                for change in _difference(known, listing.items, resource):
                    yield change
                version = listing.resource_version
                yield Change("SYNCED")
            query = {
                "resourceVersion": version,
                "allowWatchBookmarks": "true",
                "timeoutSeconds": str(round(_between(pace.watch_seconds, draw()))),
            }
            heard = False
            async for event in api.stream(resource, selection, query, silence_seconds=pace.silence_seconds):
                told, version = _read(event, known, resource)
                heard, failures = True, 0
                if told is not None:
                    yield told
            if not heard:  # a server that ends every watch at once must not be asked in a tight loop
                await asyncio.sleep(pace.wait_seconds(1, draw))
        except errors.Expired:
            version = ""  # the list that follows says what was missed
            failures += 1
            await asyncio.sleep(pace.wait_seconds(failures, draw))
        except errors.KubeError as error:
            failures += 1
            on_trouble(error)
            hinted = error.retry_after_seconds if isinstance(error, errors.Unavailable) else None
            await asyncio.sleep(min(hinted or pace.wait_seconds(failures, draw), 30.0))


def _read(event: Body, known: dict[str, Body], resource: Resource) -> tuple[Change | None, str]:
    """The change in one event of a watch, and the version from which to go on."""
    kind, body = event.get("type"), event.get("object", {})
    match kind:
        case "BOOKMARK":
            return None, version_of(body)
        case "ADDED" | "MODIFIED":
            known[_key(body)] = _trace(body, resource)
            return Change(kind, body), version_of(body)
        case "DELETED":
            known.pop(_key(body), None)
            return Change("DELETED", body), version_of(body)
        case _:
            code = int(body.get("code") or 500)
            raise errors.from_response(f"watch {resource.plural}", code, str(body.get("message", "")).encode(), {})


def _difference(known: dict[str, Body], items: list[Body], resource: Resource) -> list[Change]:
    """What a new list tells: everything that is there, and what is not any more."""
    present = {_key(item): item for item in items}
    gone = [Change("DELETED", body) for key, body in known.items() if key not in present]
    told: list[Change] = [Change("MODIFIED" if key in known else "ADDED", item) for key, item in present.items()]
    known.clear()
    known.update({key: _trace(item, resource) for key, item in present.items()})
    return gone + told


def _key(body: Body) -> str:
    return str(body.get("metadata", {}).get("uid", ""))


def _trace(body: Body, resource: Resource) -> Body:
    """What is kept of an object, to tell of its deletion if that happens unseen."""
    kept = ("name", "namespace", "uid", "resourceVersion", "labels")
    metadata = {key: value for key, value in body.get("metadata", {}).items() if key in kept}
    return {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata}


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share
