"""``python -m hotweights_operator``: the operator's process. It puts the parts together, and ends
when one of them does.

Of several such processes one leads: all of them hear what happens, and that one decides and writes.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from hotweights_kube.client import Api
from hotweights_kube.errors import NotConfigured
from hotweights_kube.events import Recorder
from hotweights_kube.lease import Election
from hotweights_operator import metrics
from hotweights_operator.runtime import handlers, leadership
from hotweights_operator.runtime.cache import Cache
from hotweights_operator.runtime.informers import Informers
from hotweights_operator.runtime.leadership import Fenced, Leadership
from hotweights_operator.runtime.perform import Performer
from hotweights_operator.runtime.queue import WorkQueue
from hotweights_operator.runtime.reconcile import Reconciler
from hotweights_operator.runtime.triggers import Key
from hotweights_operator.settings import Settings, parse

log = logging.getLogger("hotweights_operator")

END_SECONDS = 5.0
"""How long what was begun may take to end when this process is to decide no more."""


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
    election = Election(settings.instance, settings.lease)
    lead = Leadership(api, election, settings.namespace)
    performer = Performer(Fenced(api, lead), cache, recorder, settings.namespace)
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
            leads=lead.leads,
        )

    performer.wrote = reconciler.changed
    api.answered = meter.answered
    runners = await metrics.serve(
        meter,
        loop_health,
        metrics_port=settings.metrics_port,
        health_port=settings.health_port,
        stuck_seconds=settings.stuck_seconds,
        stale_seconds=settings.stale_seconds,
    )
    tasks: set[asyncio.Task[Any]] = {
        asyncio.create_task(_hear(settings, api, informers, listen), name="hear"),
        asyncio.create_task(
            _decide(settings, informers, reconciler, performer, lead, stop), name="decide"
        ),
        asyncio.create_task(meter.watch_lag(), name="lag"),
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


async def _hear(
    settings: Settings, api: Api, informers: Informers, listen: Callable[[], None]
) -> None:
    """All that keeps the cache, in the order in which it may start, whoever leads. A part that
    fails takes the process with it.
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
        log.info("hearing %s by %s", ", ".join(settings.watched) or "all namespaces", api.url)
        group.create_task(handlers.run_kopf(informers, listen), name="kopf")
        group.create_task(informers.look_again(), name="look-again")


async def _decide(
    settings: Settings,
    informers: Informers,
    reconciler: Reconciler,
    performer: Performer,
    lead: Leadership,
    stop: asyncio.Event,
) -> None:
    """Lead whenever nobody else does, until ``stop``; then give the lead up."""
    stopped = asyncio.create_task(stop.wait(), name="stop")
    try:
        # who does not know what there is would only keep others from leading
        while await _first(informers.complete.wait(), stopped) and await _first(
            lead.take(), stopped
        ):
            if await _term(settings, reconciler, performer, lead, stopped):
                await lead.release()
            else:  # what is on its way may still come: another one leads when the lease runs out
                lead.election.resign()
        await lead.release()  # it was taken at the last moment
    finally:
        stopped.cancel()


async def _term(
    settings: Settings,
    reconciler: Reconciler,
    performer: Performer,
    lead: Leadership,
    stopped: asyncio.Task[bool],
) -> bool:
    """Decide and write, until the lead is lost or is to be given up. Whether nothing is on its way
    any more.
    """
    election = lead.election
    log.info("%s leads", election.identity)

    async def work() -> None:
        if election.taken_from:
            log.info("%s did not give up: its writes are fenced off", election.taken_from)
            mark = f"{election.identity} {election.transitions}"
            await leadership.fence(performer, mark, settings.writes)
        reconciler.begin()
        async with asyncio.TaskGroup() as group:
            for number in range(settings.workers):
                group.create_task(reconciler.work(), name=f"worker-{number}")
            for number in range(settings.writes):
                group.create_task(reconciler.write(), name=f"writer-{number}")

    tasks = {
        asyncio.create_task(lead.keep(), name="keep-lead"),
        asyncio.create_task(work(), name="work"),
    }
    try:
        done, _ = await asyncio.wait({*tasks, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in done & tasks:
            task.result()
        return await reconciler.end(END_SECONDS if stopped in done else 0.0)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _first(wanted: Coroutine[Any, Any, Any], stopped: asyncio.Task[bool]) -> bool:
    """Wait for it, unless the process is to stop before; whether it came."""
    task = asyncio.ensure_future(wanted)
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        return not stopped.done()
    finally:
        task.cancel()


if __name__ == "__main__":
    sys.exit(main())
