"""``python -m hotweights_operator``: the operator's process. It puts the parts together, and ends when one of them does."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from hotweights_kube.client import Api
from hotweights_kube.errors import NotConfigured
from hotweights_kube.events import Recorder
from hotweights_operator import handlers, metrics
from hotweights_operator.cache import Cache, Kind
from hotweights_operator.keys import Key
from hotweights_operator.perform import Performer
from hotweights_operator.queue import WorkQueue
from hotweights_operator.reconcile import Reconciler
from hotweights_operator.settings import Settings, parse

log = logging.getLogger("hotweights_operator")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until a signal, or until something that cannot be repaired."""
    settings = parse(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    if settings.log_level != "debug":
        logging.getLogger("kopf").setLevel(logging.WARNING)
    try:
        asyncio.run(run(settings))
    except NotConfigured as error:
        print(error, file=sys.stderr)
        return 2
    return 0


async def run(settings: Settings) -> None:
    """The whole operator, until SIGTERM or SIGINT."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def listen() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)

    listen()
    async with await Api.connect(user_agent="hotweights-operator") as api:
        await _run(settings, api, stop, listen)


async def _run(settings: Settings, api: Api, stop: asyncio.Event, listen: Callable[[], None]) -> None:
    cache, queue = Cache(), WorkQueue[Key](settings.pace_seconds)
    recorder = Recorder(api, "hotweights.dev/operator", settings.instance)
    performer = Performer(api, cache, recorder, settings.namespace, settings.writes)
    meter = metrics.Metrics(cache, lambda: pulse())
    reconciler = Reconciler(cache, queue, performer, meter)
    feed = handlers.Feed(reconciler, settings)
    synced = {source.kind: asyncio.Event() for source in feed.by_us}

    def pulse() -> metrics.Pulse:
        ready = feed.indexed.is_set() and all(event.is_set() for event in synced.values())
        return metrics.Pulse(time.monotonic() - feed.heard_at, queue.depth, queue.oldest_seconds, ready)

    def wrote(kind: Kind, key: str) -> None:
        reconciler.changed(kind, key, None)

    performer.wrote = wrote
    runners = await metrics.serve(
        meter,
        pulse,
        metrics_port=settings.metrics_port,
        health_port=settings.health_port,
        stuck_seconds=settings.stuck_seconds,
    )
    tasks: set[asyncio.Task[Any]] = {
        asyncio.create_task(stop.wait(), name="stop"),
        asyncio.create_task(_serve(settings, api, feed, synced, listen), name="serve"),
    }
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for runner in runners:
            await runner.cleanup()


async def _serve(
    settings: Settings,
    api: Api,
    feed: handlers.Feed,
    synced: dict[Kind, asyncio.Event],
    listen: Callable[[], None],
) -> None:
    """Everything that runs, in the order in which it may start. A part that fails takes the process with it."""
    await handlers.wait_for_resources(api, settings)
    async with asyncio.TaskGroup() as group:
        for source in feed.by_us:
            group.create_task(feed.follow(api, source, synced[source.kind]), name=f"watch-{source.kind}")
        for event in synced.values():
            await event.wait()
        log.info("serving %s by %s", ", ".join(settings.watched) or "all namespaces", api.url)
        group.create_task(handlers.run_kopf(feed, listen), name="kopf")
        await feed.indexed.wait()
        for number in range(settings.workers):
            group.create_task(feed.reconciler.work(), name=f"worker-{number}")
        group.create_task(feed.resync(api), name="resync")


if __name__ == "__main__":
    sys.exit(main())
