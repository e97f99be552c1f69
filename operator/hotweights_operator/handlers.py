"""The only module that knows kopf: its watches feed the cache and the queue, and nothing else of it is used.

No stateful handlers, timers, daemons, results or finalizers: kopf keeps those in annotations and wedges objects when it is away.
An index per resource holds the handlers back until everything was listed once, so that nothing is decided on half of the picture;
afterwards every event goes through ``on.event``. NodeWeights and the agents' pods live in one namespace and are few, so they
are followed by our own watch, which needs rights in that namespace only. kopf says nothing of objects that vanished while its
connection was down; so everything is listed anew now and then.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import kopf

from hotweights_kube import errors
from hotweights_kube.client import Api, Selection
from hotweights_kube.resources import NODE_WEIGHTS, NODES, PODS, WEIGHT_ROLLOUTS, WEIGHT_VERSIONS, Body, Resource
from hotweights_kube.watch import watch
from hotweights_operator import observe
from hotweights_operator.cache import Agent, Kind
from hotweights_operator.model import INJECT_LABEL
from hotweights_operator.reconcile import Reconciler
from hotweights_operator.settings import Settings

log = logging.getLogger(__name__)

INJECTED = f"{INJECT_LABEL}=true"


@dataclass(frozen=True, slots=True)
class Source:
    """One kind of object: where it comes from, and what becomes of it."""

    kind: Kind
    resource: Resource
    parse: Callable[[Body], Any]
    label_selector: str = ""

    def key(self, body: Body) -> str:
        """Under which key the cache has it."""
        metadata = body["metadata"]
        if self.kind in ("pod", "agent"):
            return str(metadata["uid"])
        if self.kind in ("rollout", "version"):
            return f"{metadata['namespace']}/{metadata['name']}"
        return str(metadata["name"])


def _agent(body: Body) -> Agent:
    node = (body.get("spec") or {}).get("nodeName", "")
    ready = observe.is_ready(body) and "deletionTimestamp" not in body["metadata"]
    return Agent(body["metadata"]["uid"], node, ready)


BY_KOPF = (
    Source("rollout", WEIGHT_ROLLOUTS, observe.rollout),
    Source("version", WEIGHT_VERSIONS, observe.version),
    Source("pod", PODS, observe.pod, INJECTED),
    Source("node", NODES, observe.node),
)


@dataclass(slots=True)
class Feed:
    """From events to the cache and the queue."""

    reconciler: Reconciler
    settings: Settings
    indexed: asyncio.Event = field(default_factory=asyncio.Event)
    heard_at: float = field(default_factory=time.monotonic)
    by_us: tuple[Source, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.by_us = (
            Source("state", NODE_WEIGHTS, observe.node_state),
            Source("agent", PODS, _agent, self.settings.agent_selector),
        )

    def note(self, source: Source, body: Body, *, deleted: bool = False) -> None:
        """An object came, changed or went."""
        self.heard_at = time.monotonic()
        cache, key, version = self.reconciler.cache, source.key(body), int(body["metadata"]["resourceVersion"])
        old = cache.get(source.kind, key)
        if deleted:
            changed = cache.drop(source.kind, key, version)
        else:
            try:
                value = source.parse(body)
            except observe.Malformed as error:
                log.error("%s", error)  # noqa: TRY400 - the message is for people, the trace is of no use to them
                return
            changed = cache.put(source.kind, key, version, value) and value != old
        if changed and self.indexed.is_set():
            self.reconciler.changed(source.kind, key, old)

    async def follow(self, api: Api, source: Source, synced: asyncio.Event) -> None:
        """Our own watch of what lives in the installation's namespace."""
        selection = Selection(self.settings.namespace, label_selector=source.label_selector)
        async with aclosing(watch(api, source.resource, selection)) as changes:
            async for change in changes:
                if change.type == "SYNCED":
                    synced.set()
                else:
                    self.note(source, change.body, deleted=change.type == "DELETED")

    async def resync(self, api: Api) -> None:
        """List everything now and then, and forget what is not there any more."""
        while True:
            await asyncio.sleep(self.settings.resync_seconds)
            for source in BY_KOPF:
                try:
                    await self._list(api, source)
                except errors.KubeError as error:
                    log.warning("%s were not listed: %s", source.resource.plural, error)
            self.reconciler.everything()

    async def _list(self, api: Api, source: Source) -> None:
        everywhere = not self.settings.watched or not source.resource.namespaced
        for namespace in [None] if everywhere else self.settings.watched:
            listing = await api.list(source.resource, Selection(namespace, label_selector=source.label_selector))
            for body in listing.items:
                self.note(source, body)
            if everywhere:
                present = [source.key(body) for body in listing.items]
                self.reconciler.cache.keep_only(source.kind, present, int(listing.resource_version))


def registry(feed: Feed) -> kopf.OperatorRegistry:
    """kopf's handlers: an index and an event handler per source."""
    made = kopf.OperatorRegistry()

    kopf.on.login(registry=made)(_login)
    for source in BY_KOPF:
        _register(made, feed, source)
    return made


async def _login(**kwargs: Any) -> Any:
    """The service account, or a kubeconfig. By the address that every pod is given, because a cluster may have no DNS."""
    account = kopf.login_with_service_account(**kwargs)
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if account is None:
        return kopf.login_with_kubeconfig(**kwargs)
    return (
        dataclasses.replace(account, server=f"https://{f'[{host}]' if ':' in host else host}:{port}")
        if host
        else account
    )


def _register(made: kopf.OperatorRegistry, feed: Feed, source: Source) -> None:
    group, _, version = source.resource.api_version.rpartition("/")

    async def index(body: Any, **_: Any) -> None:
        feed.note(source, _plain(body))

    async def event(event: Any, **_: Any) -> None:
        if not feed.indexed.is_set():
            feed.indexed.set()
            feed.reconciler.everything()
        feed.note(source, event["object"], deleted=event["type"] == "DELETED")

    kopf.index(group, version, source.resource.plural, registry=made, id=f"index-{source.kind}")(index)
    kopf.on.event(group, version, source.resource.plural, registry=made, id=f"event-{source.kind}")(event)


def _plain(body: Any) -> Body:
    """kopf's view of a body as the dict that it wraps."""
    return {**body}


def settings_for_kopf(settings: Settings) -> kopf.OperatorSettings:
    """kopf, told to do as little as possible."""
    found = kopf.OperatorSettings()
    found.posting.enabled = False
    found.peering.standalone = True
    found.scanning.disabled = True  # needs no rights on namespaces and CRDs; what we watch is known
    found.watching.server_timeout = 300
    found.networking.request_timeout = 30
    found.networking.connect_timeout = 10
    found.networking.error_backoffs = [0.5, 1, 2, 3, 5, 5, 5, 5, 5, 10, 10, 10, 30, 30, 30]
    found.watching.label_selectors["", "v1", "pods"] = INJECTED
    found.queueing.exit_timeout = (
        0.5  # what was heard and not yet noted may be lost: the next operator lists everything
    )
    found.process.ultimate_exiting_timeout = None
    return found


async def wait_for_resources(api: Api, settings: Settings) -> None:
    """kopf learns once which resources there are: until ours are, it must not start."""
    wait_seconds = 1.0
    while True:
        try:
            for resource in (WEIGHT_ROLLOUTS, WEIGHT_VERSIONS, NODE_WEIGHTS):
                namespace = settings.namespace if resource is NODE_WEIGHTS else next(iter(settings.watched), None)
                await api.list(resource, Selection(namespace), page_size=1)
        except errors.KubeError as error:
            log.warning("waiting for the API server and our custom resources: %s", error)
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(wait_seconds * 2, 15.0)
        else:
            return


async def run_kopf(feed: Feed, listen: Callable[[], None]) -> None:
    """Watch, until cancelled.

    kopf takes SIGTERM and SIGINT for itself, ends when one comes, and nobody else would hear of it; so ``listen`` takes them back.
    """
    watched = feed.settings.watched
    others = asyncio.all_tasks()
    tasks = await kopf.spawn_tasks(
        registry=registry(feed),
        settings=settings_for_kopf(feed.settings),
        standalone=True,
        clusterwide=not watched,
        namespaces=watched,
    )
    listen()
    await kopf.run_tasks(tasks, ignored=others)
    raise RuntimeError("kopf ended by itself")
