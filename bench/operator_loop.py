"""The operator's own parts, put together as in its process, without kopf and without connections.
All that benches know of them.

Who reads this because something moved in the operator: this is the one place to follow it.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from bench.apiserver import Server
from bench.fleet import SYSTEM
from hotweights_kube.events import Recorder
from hotweights_kube.resources import Body
from hotweights_operator import metrics
from hotweights_operator.decide import rollouts
from hotweights_operator.runtime.cache import Cache
from hotweights_operator.runtime.informers import Informers, WatchedKind
from hotweights_operator.runtime.perform import Performer
from hotweights_operator.runtime.queue import WorkQueue
from hotweights_operator.runtime.reconcile import Reconciler
from hotweights_operator.runtime.triggers import Key
from hotweights_operator.settings import AGENT_SELECTOR, Settings

SETTINGS = Settings(
    SYSTEM, (), AGENT_SELECTOR, "bench", metrics_port=0, health_port=0, log_level="warning"
)


class Operator:
    """One operator between the API server and its watches."""

    def __init__(self, server: Server) -> None:
        cache, queue = Cache(), WorkQueue[Key](SETTINGS.pace_seconds)
        recorder = Recorder(server, "hotweights.dev/operator", SETTINGS.instance)
        performer = Performer(server, cache, recorder, SETTINGS.namespace)
        loop_health = metrics.LoopHealth(0.0, 0, 0.0, True)
        self._reconciler = Reconciler(
            cache, queue, performer, metrics.Metrics(cache, lambda: loop_health)
        )
        self._feed = Informers(self._reconciler, SETTINGS)
        self._sources: dict[str, WatchedKind] = {
            source.kind: source for source in self._feed.sources
        }
        self._tasks: list[asyncio.Task[None]] = []
        performer.wrote = self._reconciler.changed

    @property
    def depth(self) -> int:
        """How much waits to be decided or to be written."""
        return self._reconciler.queue.depth + len(self._reconciler.loop.outbox)

    def note(self, kind: str, body: Body) -> None:
        """What a watch tells."""
        self._feed.note(self._sources[kind], body)

    def decide(self) -> None:
        """Decide about the rollout, and write nothing."""
        cache, loop = self._reconciler.cache, self._reconciler.loop
        rollouts.decide(
            cache.get("rollout", "models/llm"), cache.observed(), datetime.now(UTC), loop.started_at
        )

    def start(self) -> None:
        """Work, as soon as everything was listed."""
        self._feed.complete.set()
        self._reconciler.begin()
        workers = [self._reconciler.work for _ in range(SETTINGS.workers)]
        writers = [self._reconciler.write for _ in range(SETTINGS.writes)]
        self._tasks = [asyncio.create_task(run()) for run in (*workers, *writers)]

    async def stop(self) -> None:
        """Work no more. Raises what ended a worker or a writer before."""
        for task in self._tasks:
            task.cancel()
        for end in await asyncio.gather(*self._tasks, return_exceptions=True):
            if not isinstance(end, asyncio.CancelledError):
                raise end or RuntimeError("it ended by itself")
