"""Objects of a cluster, read once or followed: what views are made of.

Whoever calls may have few rights. Without rollouts there is nothing to say; any other kind that may
not be read is left out, and the view says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from hotweights.kubectl.options import not_found
from hotweights.kubectl.views import snapshot
from hotweights.kubectl.views.snapshot import Snapshot
from hotweights_kube.client import Api, Selection
from hotweights_kube.errors import Forbidden, KubeError, NotFound
from hotweights_kube.resources import (
    NODE_WEIGHTS,
    NODES,
    PODS,
    WEIGHT_ROLLOUTS,
    WEIGHT_VERSIONS,
    Body,
    Resource,
)
from hotweights_kube.watch import Change, watch
from hotweights_operator.model.objects import INJECT_LABEL

AGENTS = "app.kubernetes.io/name=hotweights,app.kubernetes.io/component=agent"
MIN_SECONDS = 0.25
"""Between two pictures: a fleet that moves says something many times a second."""


@dataclass(frozen=True, slots=True)
class Source:
    """One kind of object, and which of them."""

    resource: Resource
    selection: Selection


def sources(namespace: str | None, name: str = "") -> dict[str, Source]:
    """All that a picture needs of a namespace (None: of all); with a name of one rollout."""
    mine = f"metadata.name={name}" if name else ""
    return {
        "rollout": Source(WEIGHT_ROLLOUTS, Selection(namespace, field_selector=mine)),
        "version": Source(WEIGHT_VERSIONS, Selection(namespace)),
        "pod": Source(PODS, Selection(namespace, f"{INJECT_LABEL}=true")),
        # they lie in the installation's namespace, which nobody told us
        "state": Source(NODE_WEIGHTS, Selection()),
        "node": Source(NODES, Selection()),
        "agent": Source(PODS, Selection(None, AGENTS)),
    }


@dataclass(slots=True)
class Store:
    """What was read last, by kind and UID."""

    bodies: dict[str, dict[str, Body] | None] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def snapshot(self) -> Snapshot:
        """All of it, as it is now."""
        values = {
            kind: None if several is None else list(several.values())
            for kind, several in self.bodies.items()
        }
        return snapshot.parse(values, datetime.now(UTC))


async def read(api: Api, wanted: dict[str, Source], needed: Iterable[str] = ("rollout",)) -> Store:
    """All objects as they are now. Raises `KubeError` for what is needed and may not be read."""
    store = Store()

    async def read_one(kind: str, source: Source) -> None:
        try:
            listing = await api.list(source.resource, source.selection)
        except (Forbidden, NotFound):
            if kind in needed:
                raise
            store.bodies[kind] = None
        else:
            store.bodies[kind] = {body["metadata"]["uid"]: body for body in listing.items}

    await asyncio.gather(*(read_one(kind, source) for kind, source in wanted.items()))
    return store


@asynccontextmanager
async def followed(api: Api, wanted: dict[str, Source]) -> AsyncIterator[Store]:
    """The same, kept up to date until the context ends; `Store.changed` is set after each change."""
    store = await read(api, wanted)
    tasks = [
        asyncio.create_task(_follow(api, source, known, store.changed))
        for kind, source in wanted.items()
        if (known := store.bodies[kind]) is not None
    ]
    try:
        yield store
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _follow(api: Api, source: Source, known: dict[str, Body], changed: asyncio.Event) -> None:
    async with aclosing(
        watch(api, source.resource, source.selection, on_trouble=_passes)
    ) as changes:
        async for change in changes:
            if change.type in ("SYNCED", "REWOUND"):
                continue
            uid = change.body["metadata"]["uid"]
            if change.type == "DELETED":
                known.pop(uid, None)
            else:
                known[uid] = change.body
            changed.set()


async def moments(
    api: Api, rollout: str, namespace: str | None, seconds: float
) -> AsyncGenerator[Body | None, None]:
    """One rollout as it is, and again after each change; None once it is deleted, and then no more.
    Ends after so many seconds. Raises `Failed` where there is none of this name at first.
    """
    source = sources(namespace, rollout)["rollout"]
    end = asyncio.get_running_loop().time() + seconds
    first = True
    async with aclosing(
        watch(api, source.resource, source.selection, on_trouble=_raises_what_stays)
    ) as changes:
        while True:
            left = end - asyncio.get_running_loop().time()
            change = await _within(changes, left)
            if change is None:
                return
            if change.type == "SYNCED" and first and not change.listed:
                raise not_found(f"there is no WeightRollout {rollout} in namespace {namespace}")
            if change.type in ("ADDED", "MODIFIED"):
                first = False
                yield change.body
            elif change.type == "DELETED":
                yield None
                return


async def _within(changes: AsyncIterator[Change], seconds: float) -> Change | None:
    """The next change; None: it did not come in time."""
    if seconds <= 0:
        return None
    try:
        async with asyncio.timeout(seconds):
            return await anext(changes)
    except TimeoutError:
        return None


def _passes(error: KubeError) -> None:
    """The watch goes on by itself; what it missed it reads again."""


def _raises_what_stays(error: KubeError) -> None:
    """What waiting does not mend is said at once."""
    if isinstance(error, Forbidden):
        raise error
