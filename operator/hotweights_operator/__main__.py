"""``python -m hotweights_operator``: the operator's process. It puts the parts together, and ends
when one of them does.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from hotweights_kube.client import Api
from hotweights_kube.errors import NotConfigured
from hotweights_kube.events import Recorder
from hotweights_operator import metrics
from hotweights_operator.runtime import handlers
from hotweights_operator.runtime.cache import Cache
from hotweights_operator.runtime.informers import Informers
from hotweights_operator.runtime.perform import Performer
from hotweights_operator.runtime.queue import WorkQueue
from hotweights_operator.runtime.reconcile import Reconciler
from hotweights_operator.runtime.triggers import Key
from hotweights_operator.settings import Settings, parse

log = logging.getLogger("hotweights_operator")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until a signal, or until something that cannot be repaired."""
    settings = parse(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
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

    # kopf sets handlers of its own when it starts, so this is done again then
    listen()
    async with await Api.connect(user_agent="hotweights-operator") as api:
        await _run(settings, api, stop, listen)


async def _run(
    settings: Settings, api: Api, stop: asyncio.Event, listen: Callable[[], None]
) -> None:
    cache, queue = Cache(), WorkQueue[Key](settings.pace_seconds)
    recorder = Recorder(api, "hotweights.dev/operator", settings.instance)
    performer = Performer(api, cache, recorder, settings.namespace)
    meter = metrics.Metrics(cache, lambda: loop_health())
    reconciler = Reconciler(cache, queue, performer, meter)
    informers = Informers(reconciler, settings)

    def loop_health() -> metrics.LoopHealth:
        ages = informers.ages()
        return metrics.LoopHealth(
            min(ages.values()),
            queue.depth,
            max(queue.oldest_seconds, reconciler.stalled_seconds),
            informers.complete.is_set(),
            ages=ages,
            unlisted=informers.unlisted(),
            malformed=informers.malformed(),
        )

    performer.wrote = reconciler.changed
    runners = await metrics.serve(
        meter,
        loop_health,
        metrics_port=settings.metrics_port,
        health_port=settings.health_port,
        stuck_seconds=settings.stuck_seconds,
        stale_seconds=settings.stale_seconds,
    )
    tasks: set[asyncio.Task[Any]] = {
        asyncio.create_task(stop.wait(), name="stop"),
        asyncio.create_task(_serve(settings, api, informers, reconciler, listen), name="serve"),
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
    informers: Informers,
    reconciler: Reconciler,
    listen: Callable[[], None],
) -> None:
    """Everything that runs, in the order in which it may start. A part that fails takes the process
    with it.
    """
    await handlers.wait_for_resources(api, settings)
    async with asyncio.TaskGroup() as group:
        for source in informers.sources:
            for namespace in () if source.by_kopf else source.namespaces:
                group.create_task(
                    informers.follow(api, source, namespace),
                    name=f"watch-{source.kind}-{namespace or 'all'}",
                )
        group.create_task(informers.relist(api), name="relist")
        await informers.complete.wait()
        log.info("serving %s by %s", ", ".join(settings.watched) or "all namespaces", api.url)
        group.create_task(handlers.run_kopf(informers, listen), name="kopf")
        for number in range(settings.workers):
            group.create_task(reconciler.work(), name=f"worker-{number}")
        for number in range(settings.writes):
            group.create_task(reconciler.write(), name=f"writer-{number}")
        group.create_task(informers.look_again(), name="look-again")


if __name__ == "__main__":
    sys.exit(main())
