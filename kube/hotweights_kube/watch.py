"""List and watch, for as long as it takes: what changes reaches the caller, whatever happens to the
connection.

A generator that never ends by itself: it lists, says ``SYNCED``, watches from there, and starts
again where it left off when the connection breaks, or from a new list when the API server has
forgotten that point. A list is told page by page, so that a large one never stands in memory at
once. Objects that vanished unseen come as ``DELETED`` at the end of a list, with the list's
resourceVersion: that they are gone is as new as the list, and newer than whatever was known of
them. Bookmarks keep the point fresh, and a connection without even those is taken for dead. An
etcd that was restored from a backup begins again at an earlier resourceVersion, and says nothing to
a watch that asks for later ones: so a silent one begins with a list, which finds that out. It
refuses to know what the objects mean; a consumer that is slow slows only its own watch.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from hotweights_common.backoff import Backoff
from hotweights_kube import errors
from hotweights_kube.client import Listing, Selection
from hotweights_kube.resources import Body, Resource, version_of

log = logging.getLogger(__name__)

ChangeType = Literal["ADDED", "MODIFIED", "DELETED", "SYNCED", "REWOUND"]

_Name = tuple[str, str]  # namespace and name: one object at a time has it
# UID and resourceVersion, to tell of a deletion that happens unseen
_Known = dict[_Name, tuple[str, str]]


class Watched(Protocol):
    """What a watch needs of the API."""

    def pages(
        self, resource: Resource, selection: Selection | None = None
    ) -> AsyncGenerator[Listing, None]:
        """All selected objects, a page at a time."""
        ...

    def stream(
        self, resource: Resource, selection: Selection, query: Any, *, silence_seconds: float
    ) -> AsyncGenerator[Body, None]:
        """The events of one request, until it ends or breaks off."""
        ...


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to one object; ``SYNCED`` when everything that exists has been told;
    ``REWOUND``, before a list, when resourceVersions went back: those told before compare with none
    that follow.

    ``SYNCED`` has the list's resourceVersion in its body, and in ``listed`` the metadata of all
    that was in the list: whatever else somebody knows of, and is not newer, does not exist.
    """

    type: ChangeType
    body: Body = field(default_factory=dict)
    listed: tuple[Body, ...] = ()


@dataclass(frozen=True, slots=True)
class WatchTiming:
    """How long a watch lasts, and how fast it is tried again."""

    watch_seconds: tuple[float, float] = (240.0, 360.0)
    """A request's length is drawn from here, so that a thousand watchers do not come back at
    once.
    """
    silence_seconds: float = 90.0
    """Bookmarks come every minute; without one for so long the connection is dead."""
    backoff: Backoff = Backoff(0.25, 8.0)
    """Between attempts; spread, because all watchers lose an API server at the same moment."""


def _log_trouble(error: errors.KubeError) -> None:
    log.warning("%s", error)


async def watch(
    api: Watched,
    resource: Resource,
    selection: Selection | None = None,
    *,
    timing: WatchTiming | None = None,
    on_trouble: Callable[[errors.KubeError], None] = _log_trouble,
    on_heard: Callable[[], None] = lambda: None,
    draw: Callable[[], float] = random.random,
) -> AsyncGenerator[Change, None]:
    """Every change of the selected objects, from a first full list on, without end. Close it with
    ``aclosing``.

    ``on_heard`` is called whenever the API server says anything, if only a bookmark.
    """
    selection, timing = selection or Selection(), timing or WatchTiming()
    known: _Known = {}
    version = ""
    reached = 0  # the latest resourceVersion that was told
    failures = 0
    loop = asyncio.get_running_loop()
    while True:
        heard, began = False, loop.time()
        try:
            if not version:
                async with aclosing(
                    _list(api, resource, selection, known, on_heard, reached)
                ) as changes:
                    async for change in changes:
                        if change.type == "SYNCED":
                            version = version_of(change.body)
                            reached = int(version or 0)
                        yield change
                began = loop.time()
            query = {
                "resourceVersion": version,
                "allowWatchBookmarks": "true",
                "timeoutSeconds": str(round(_between(timing.watch_seconds, draw()))),
            }
            async with aclosing(
                api.stream(resource, selection, query, silence_seconds=timing.silence_seconds)
            ) as events:
                async for event in events:
                    told, version = _read(event, known, resource)
                    reached = _advanced(reached, version, resource)
                    heard, failures = True, 0
                    on_heard()
                    if told is not None:
                        yield told
            # a server that ends every watch at once must not be asked in a tight loop
            if not heard:
                await asyncio.sleep(timing.backoff.spread(1, draw))
        except errors.Expired:
            version = ""  # the list that follows says what was missed
            failures += 1  # a server that forgets at once must not be asked for list after list
            await asyncio.sleep(timing.backoff.spread(failures, draw))
        except errors.KubeError as error:
            failures += 1
            if not heard and loop.time() - began >= timing.silence_seconds:
                version = ""
            on_trouble(error)
            # never sooner than it asked for
            await asyncio.sleep(
                max(errors.wait_seconds(error) or 0.0, timing.backoff.spread(failures, draw))
            )


async def _list(
    api: Watched,
    resource: Resource,
    selection: Selection,
    known: _Known,
    on_heard: Callable[[], None],
    reached: int,
) -> AsyncGenerator[Change, None]:
    """Everything that is there, then what is not any more, then ``SYNCED``. What was told stays in
    ``known`` if it breaks off.
    """
    present: set[_Name] = set()
    version = ""
    async with aclosing(api.pages(resource, selection)) as pages:
        async for page in pages:
            on_heard()
            if not version and int(page.resource_version or 0) < reached:
                log.warning(
                    "%s: resourceVersions went back from %d to %s, as after a backup was restored",
                    resource.plural,
                    reached,
                    page.resource_version,
                )
                yield Change("REWOUND")
            version = page.resource_version
            for body in page.items:
                name, uid = _name(body), _uid(body)
                before = known.get(name)
                if before is not None and before[0] != uid:  # its name was given to another one
                    yield Change("DELETED", _trace(resource, name, *before))
                known[name] = (uid, version_of(body))
                present.add(name)
                yield Change("ADDED" if before is None or before[0] != uid else "MODIFIED", body)
            del page  # the next one takes as much memory again
    # only after all pages: before the last one nothing is known to be gone
    for name in [name for name in known if name not in present]:
        yield Change("DELETED", _trace(resource, name, known.pop(name)[0], version))
    listed = tuple(_trace(resource, name, *last) for name, last in known.items())
    yield Change("SYNCED", {"metadata": {"resourceVersion": version}}, listed)


def _advanced(reached: int, version: str, resource: Resource) -> int:
    """The later one. Raises `Expired` where they went back within a watch."""
    now = int(version or 0)
    if now < reached:
        raise errors.Expired(f"watch {resource.plural}: went back from {reached} to {version}")
    return now


def _read(event: Body, known: _Known, resource: Resource) -> tuple[Change | None, str]:
    """The change in one event of a watch, and the version from which to go on."""
    kind, body = event.get("type"), event.get("object", {})
    match kind:
        case "BOOKMARK":
            return None, version_of(body)
        case "ADDED" | "MODIFIED":
            known[_name(body)] = (_uid(body), version_of(body))
            return Change(kind, body), version_of(body)
        case "DELETED":
            known.pop(_name(body), None)
            return Change("DELETED", body), version_of(body)
        case _:
            # an ERROR event has a Status instead of an object
            code = int(body.get("code") or 500)
            raise errors.from_response(
                f"watch {resource.plural}", code, json.dumps(body).encode(), {}
            )


def _name(body: Body) -> _Name:
    metadata = body.get("metadata", {})
    return str(metadata.get("namespace", "")), str(metadata.get("name", ""))


def _uid(body: Body) -> str:
    return str(body.get("metadata", {}).get("uid", ""))


def _trace(resource: Resource, name: _Name, uid: str, version: str) -> Body:
    """What is left of an object that is not here any more."""
    metadata = {"name": name[1], "uid": uid, "resourceVersion": version}
    if name[0]:
        metadata["namespace"] = name[0]
    return {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata}


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share
