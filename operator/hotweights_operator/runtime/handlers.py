"""The only module that knows kopf: it watches WeightRollouts and WeightVersions and tells
`Informers`; nothing else of it is used.

No stateful handlers, timers, daemons, indices, results or finalizers: kopf keeps those in
annotations and wedges objects when it is away. It is told to ask for ever, and should it end all
the same (it does when a watch is refused in a way that it does not know), it is begun anew:
rollouts go on meanwhile, since the lists of `Informers` see what changes too, only later.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import aclosing
from typing import Any

import kopf

from hotweights_common import hosts
from hotweights_common.backoff import Backoff
from hotweights_kube import errors
from hotweights_kube.client import Api, Selection
from hotweights_kube.resources import NODE_WEIGHTS, WEIGHT_ROLLOUTS, WEIGHT_VERSIONS
from hotweights_operator.runtime.informers import Informers, WatchedKind
from hotweights_operator.settings import Settings

log = logging.getLogger(__name__)

# a page of rollouts with long statuses stands in memory at once
PAGE_SIZE = 100
AGAIN_SECONDS = (1.0, 30.0)
"""Before kopf is begun anew: the first wait, which doubles, and the longest."""
END_SECONDS = 5.0
"""How long kopf's parts may take to end."""


class Endless:
    """Seconds between attempts, the last one for ever. kopf gives a request up, and then ends, when
    they are used up.
    """

    def __init__(self, *seconds: float) -> None:
        self._seconds = seconds

    def __iter__(self) -> Iterator[float]:
        return itertools.chain(self._seconds, itertools.repeat(self._seconds[-1]))


def registry(informers: Informers) -> kopf.OperatorRegistry:
    """kopf's handlers: one for each kind that it follows, and one that logs in."""
    made = kopf.OperatorRegistry()
    kopf.on.login(registry=made)(_login)
    for source in informers.sources:
        if source.by_kopf:
            _register(made, informers, source)
    return made


async def _login(**kwargs: Any) -> Any:
    """The service account, or a kubeconfig. By the address that every pod is given, because a
    cluster may have no DNS.
    """
    account = kopf.login_with_service_account(**kwargs)
    host, port = (
        os.environ.get("KUBERNETES_SERVICE_HOST", ""),
        os.environ.get("KUBERNETES_SERVICE_PORT", "443"),
    )
    if account is None:
        return kopf.login_with_kubeconfig(**kwargs)
    return (
        dataclasses.replace(account, server=f"https://{hosts.bracketed(host)}:{port}")
        if host
        else account
    )


def _register(made: kopf.OperatorRegistry, informers: Informers, source: WatchedKind) -> None:
    group, _, version = source.resource.api_version.rpartition("/")

    async def event(event: Any, **_: Any) -> None:
        informers.note(source, event["object"], deleted=event["type"] == "DELETED")

    kopf.on.event(group, version, source.resource.plural, registry=made, id=f"event-{source.kind}")(
        event
    )


def settings_for_kopf() -> kopf.OperatorSettings:
    """kopf, told to do as little as possible, and that for ever."""
    found = kopf.OperatorSettings()
    found.posting.enabled = False  # events are ours to write
    found.peering.standalone = True  # one operator at a time is the Deployment's business
    found.scanning.disabled = True  # needs no rights on namespaces and CRDs; what we watch is known
    found.watching.server_timeout = 300
    found.watching.inactivity_timeout = (
        90  # bookmarks come every minute; without one for so long the connection is dead
    )
    found.watching.chunk_size = PAGE_SIZE
    found.networking.request_timeout = 30
    found.networking.connect_timeout = 10
    found.networking.error_backoffs = Endless(0.5, 1, 2, 3, 5, 10)
    found.queueing.exit_timeout = (
        0.5  # what was heard and not yet noted may be lost: the next operator lists everything
    )
    found.process.ultimate_exiting_timeout = None
    return found


async def wait_for_resources(api: Api, settings: Settings) -> None:
    """kopf learns once which resources there are: until ours are, it must not start."""
    backoff, failures = Backoff(1.0, 15.0), 0
    while True:
        try:
            # one object of each is enough to know that it may be listed
            for resource in (WEIGHT_ROLLOUTS, WEIGHT_VERSIONS, NODE_WEIGHTS):
                namespace = (
                    settings.namespace
                    if resource is NODE_WEIGHTS
                    else next(iter(settings.watched), None)
                )
                async with aclosing(
                    api.pages(resource, Selection(namespace), page_size=1)
                ) as pages:
                    await anext(pages)
        except errors.KubeError as error:
            log.warning("waiting for the API server and our custom resources: %s", error)
            failures += 1
            await asyncio.sleep(backoff.seconds(failures))
        else:
            return


async def run_kopf(informers: Informers, listen: Callable[[], None]) -> None:
    """Watch, until cancelled.

    kopf takes SIGTERM and SIGINT for itself, ends when one comes, and nobody else would hear of it;
    so ``listen`` takes them back.
    """
    loop, watched = asyncio.get_running_loop(), informers.settings.watched
    wait_seconds, longest_seconds = AGAIN_SECONDS
    while True:
        began = loop.time()
        tasks = await kopf.spawn_tasks(
            registry=registry(informers),
            settings=settings_for_kopf(),
            standalone=True,
            clusterwide=not watched,
            namespaces=watched,
        )
        listen()
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            why = ", ".join(
                str(task.exception() or task.get_name()) for task in done if not task.cancelled()
            )
        finally:
            await _end(tasks)
        # it ran for longer than any wait: what ended it now is something else
        if loop.time() - began > 2 * longest_seconds:
            wait_seconds = AGAIN_SECONDS[0]
        log.error("kopf ended and is begun anew in %.0f s: %s", wait_seconds, why)
        await asyncio.sleep(wait_seconds)
        wait_seconds = min(2 * wait_seconds, longest_seconds)


async def _end(tasks: Collection[asyncio.Task[None]]) -> None:
    """End kopf's parts and nothing else: `kopf.run_tasks` would cancel every task of the loop that
    is younger than kopf.
    """
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=END_SECONDS)
