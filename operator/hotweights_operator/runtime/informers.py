"""From what the API server tells to the cache and the queue, and how long ago it told anything.

Pods, nodes, agents and NodeWeights are followed by our own watch, each in the namespaces that it
may be in; kopf follows WeightRollouts and WeightVersions (`handlers`). It does not say what
vanished while its connection was down, nor whether it still hears, so those are listed every minute
too: they are few. A list says what exists: whatever is known besides, and is not newer than the
list, is forgotten, also what only our own write told us of. Until everything was listed once
nothing is decided, because half of the picture is another picture.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from hotweights_kube import errors
from hotweights_kube.client import Selection
from hotweights_kube.resources import (
    NODE_WEIGHTS,
    NODES,
    PODS,
    WEIGHT_ROLLOUTS,
    WEIGHT_VERSIONS,
    Body,
    Resource,
)
from hotweights_kube.resources import version_of as version_in
from hotweights_kube.watch import Watched, WatchTiming, watch
from hotweights_operator.model.objects import INJECT_LABEL
from hotweights_operator.runtime import observe
from hotweights_operator.runtime.cache import Agent, Cache, Kind
from hotweights_operator.runtime.malformed import last_known
from hotweights_operator.settings import Settings

log = logging.getLogger(__name__)

INJECTED = f"{INJECT_LABEL}=true"
OURS: tuple[Kind, ...] = ("rollout", "version", "state")
"""Kinds with a schema of ours, which an object may not fit."""

Place = tuple[Kind, str | None]
"""One collection that is followed: a kind in a namespace (None: in all, or it has none)."""


class Decider(Protocol):
    """Who decides on what is in the cache."""

    cache: Cache

    def changed(self, kind: Kind, key: str, old: object) -> None:
        """An object is new, different or gone."""
        ...

    def everything(self) -> None:
        """Every decision there is may come out differently."""
        ...


@dataclass(frozen=True, slots=True)
class WatchedKind:
    """One kind of object: where it comes from, and what becomes of it."""

    kind: Kind
    resource: Resource
    parse: Callable[[Body], Any]
    namespaces: tuple[str | None, ...]
    label_selector: str = ""
    by_kopf: bool = False

    def key(self, body: Body) -> str:
        """Under which key the cache has it."""
        metadata = body["metadata"]
        if self.kind in ("pod", "agent"):
            return str(metadata["uid"])
        return (
            f"{metadata['namespace']}/{metadata['name']}" if self.by_kopf else str(metadata["name"])
        )

    def key_of(self, value: Any) -> str:
        """The same for what became of it."""
        if self.kind in ("pod", "agent"):
            return str(value.uid)
        return f"{value.namespace}/{value.name}" if self.by_kopf else str(value.name)


def sources(settings: Settings) -> tuple[WatchedKind, ...]:
    """All that is followed: users' objects in the namespaces that are served, ours in the
    installation's.
    """
    served: tuple[str | None, ...] = settings.watched or (None,)
    here = (settings.namespace,)
    return (
        WatchedKind("rollout", WEIGHT_ROLLOUTS, observe.rollout, served, by_kopf=True),
        WatchedKind("version", WEIGHT_VERSIONS, observe.version, served, by_kopf=True),
        WatchedKind("pod", PODS, observe.pod, served, INJECTED),
        WatchedKind("node", NODES, observe.node, (None,)),
        WatchedKind("state", NODE_WEIGHTS, observe.node_state, here),
        WatchedKind("agent", PODS, _agent, here, settings.agent_selector),
    )


def _agent(body: Body) -> Agent:
    node = (body.get("spec") or {}).get("nodeName", "")
    # one that is being deleted still answers for a while, but is nobody to count on
    ready = observe.is_ready(body) and "deletionTimestamp" not in body["metadata"]
    addresses = tuple(one["ip"] for one in (body.get("status") or {}).get("podIPs") or ())
    return Agent(body["metadata"]["uid"], node, ready, addresses)


@dataclass(slots=True)
class Informers:
    """What is heard. Give it `follow` for each of our watches, `relist` and `look_again` as
    tasks.
    """

    decider: Decider
    settings: Settings
    clock: Callable[[], float] = time.monotonic
    timing: WatchTiming = field(default_factory=WatchTiming)
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when everything was listed once."""
    sources: tuple[WatchedKind, ...] = field(init=False)
    _heard: dict[Place, float] = field(init=False)  # or begun, where nothing was heard yet
    _unlisted: set[Place] = field(init=False)
    _listed_at: dict[Place, int] = field(default_factory=dict)  # of kopf's: the last list's version
    _malformed: dict[tuple[Kind, str], int] = field(default_factory=dict)  # its resourceVersion

    def __post_init__(self) -> None:
        self.sources = sources(self.settings)
        places = [
            (source.kind, namespace) for source in self.sources for namespace in source.namespaces
        ]
        self._heard = dict.fromkeys(places, self.clock())
        self._unlisted = set(places)

    def ages(self) -> dict[Kind, float]:
        """For each kind, since when nothing was heard of it in some place (seconds)."""
        now, found = self.clock(), dict.fromkeys((source.kind for source in self.sources), 0.0)
        for (kind, _), heard_at in self._heard.items():
            found[kind] = max(found[kind], now - heard_at)
        return found

    def unlisted(self) -> list[Kind]:
        """Kinds that were not listed yet in every place."""
        return sorted({kind for kind, _ in self._unlisted})

    def malformed(self) -> dict[Kind, int]:
        """How many objects there are, of each kind with a schema, that do not fit it."""
        counts = Counter(kind for kind, _ in self._malformed)
        return {kind: counts[kind] for kind in OURS}

    def note(self, source: WatchedKind, body: Body, *, deleted: bool = False) -> None:
        """An object came, changed or went."""
        cache, key, version = self.decider.cache, source.key(body), int(version_in(body))
        old = cache.get(source.kind, key)
        if deleted:
            changed = cache.drop(source.kind, key, version)
            self._fits(source.kind, key, version)
        elif cache.version_of(source.kind, key) >= version:
            self._fits(source.kind, key, version)
            return  # mostly our own write, which comes back by the watch
        else:
            value = self._parsed(source, key, version, body, old)
            changed = (
                value is not None and cache.put(source.kind, key, version, value) and value != old
            )
        if changed and self.complete.is_set():
            self.decider.changed(source.kind, key, old)

    def _parsed(self, source: WatchedKind, key: str, version: int, body: Body, old: Any) -> Any:
        try:
            value = source.parse(body)
        except observe.Malformed as error:
            if self._malformed.get((source.kind, key), -1) < version:
                self._malformed[source.kind, key] = version
                log.error("%s. Until then nothing is decided about it", error)
            return last_known(source.kind, body, old)
        self._malformed.pop((source.kind, key), None)
        return value

    def _fits(self, kind: Kind, key: str, version: int) -> None:
        """It is gone, or a later state of it was understood."""
        if self._malformed.get((kind, key), version) < version:
            del self._malformed[kind, key]

    def rewound(self, source: WatchedKind) -> None:
        """resourceVersions of a kind went back: etcd was restored from a backup."""
        self.decider.cache.rewind(source.kind)
        for place in [place for place in self._malformed if place[0] == source.kind]:
            self._malformed[place] = 0

    def hear(self, source: WatchedKind, namespace: str | None) -> None:
        """The API server said something of this collection, be it a bookmark: the way is open."""
        self._heard[source.kind, namespace] = self.clock()

    def listed(
        self, source: WatchedKind, namespace: str | None, keys: Iterable[str], version: int
    ) -> None:
        """A list was complete, and this is all that was there at ``version``. What is known besides
        and is not newer is forgotten; the first complete set of lists starts decisions.
        """
        cache, known = self.decider.cache, {}
        present = set(keys)
        for value in cache.values(source.kind):
            key = source.key_of(value)
            if len(source.namespaces) == 1 or value.namespace == namespace:
                known[key] = value
            else:
                present.add(key)  # of another place: this list knows nothing of it
        for key in cache.keep_only(source.kind, present, version):
            if self.complete.is_set():
                self.decider.changed(source.kind, key, known[key])
        for kind, key in [place for place in self._malformed if place[0] == source.kind]:
            if key not in present and (
                namespace is None or key.startswith(f"{namespace}/") or not source.by_kopf
            ):
                self._fits(kind, key, version)
        self._unlisted.discard((source.kind, namespace))
        if not self._unlisted and not self.complete.is_set():
            self.complete.set()
            self.decider.everything()

    async def follow(self, api: Watched, source: WatchedKind, namespace: str | None) -> None:
        """Our own watch, for ever: it begins with a list, and lists again when it lost its
        place.
        """
        selection = Selection(namespace, label_selector=source.label_selector)
        heard = partial(self.hear, source, namespace)
        async with aclosing(
            watch(api, source.resource, selection, timing=self.timing, on_heard=heard)
        ) as changes:
            async for change in changes:
                if change.type == "REWOUND":
                    self.rewound(source)
                elif change.type == "SYNCED":
                    keys = (source.key(body) for body in change.listed)
                    self.listed(source, namespace, keys, int(version_in(change.body)))
                else:
                    self.note(source, change.body, deleted=change.type == "DELETED")

    async def relist(self, api: Watched) -> None:
        """List what kopf follows, for ever."""
        places = [
            (source, namespace)
            for source in self.sources
            if source.by_kopf
            for namespace in source.namespaces
        ]
        while True:
            well = [await self._listed_well(api, source, namespace) for source, namespace in places]
            await asyncio.sleep(
                self.settings.relist_seconds if all(well) else self.timing.backoff.longest_seconds
            )

    async def _listed_well(self, api: Watched, source: WatchedKind, namespace: str | None) -> bool:
        keys: list[str] = []
        version = 0
        try:
            async with aclosing(api.pages(source.resource, Selection(namespace))) as pages:
                async for page in pages:
                    version = int(page.resource_version)
                    if not keys and version < self._listed_at.get((source.kind, namespace), 0):
                        log.warning("%s: resourceVersions went back to %d, as after a backup was "
                                    "restored", source.resource.plural, version)  # fmt: skip
                        self.rewound(source)
                    for body in page.items:
                        keys.append(source.key(body))
                        self.note(source, body)
                    del page  # the next one takes as much memory again
        except errors.KubeError as error:
            log.warning("%s were not listed: %s", source.resource.plural, error)
            return False
        self._listed_at[source.kind, namespace] = version
        self.hear(source, namespace)
        self.listed(source, namespace, keys, version)
        return True

    async def look_again(self) -> None:
        """Decide on everything now and then, should a wake-up have been lost."""
        while True:
            await asyncio.sleep(self.settings.resync_seconds)
            self.decider.everything()
