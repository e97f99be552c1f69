"""Who measures, while nobody waits: one task for each measurement that is wanted.

What a rollout wants is said anew in each of its passes. A measurement that is under way, or whose
reading lies ready, is not begun again; one that is wanted no more is ended, and its reading
forgotten. A reading that this process has not written into a status dies with it, and the next
process measures again. Every measurement has a deadline.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from hotweights_operator.model.measurements import Measure, MeasurementId, Reading
from hotweights_operator.runtime.cache import Cache
from hotweights_operator.runtime.measure import http, job, prometheus
from hotweights_operator.runtime.measure.client import JsonClient, NoResult
from hotweights_operator.runtime.triggers import Key

log = logging.getLogger(__name__)

Provider = Callable[[Measure], Awaitable[Reading]]
"""Makes a measurement of its kind. Raises `NoResult`."""


def providers(client: JsonClient, jobs: job.JobMeter) -> dict[str, Provider]:
    """By the field of a metric that is set."""

    async def by_prometheus(wanted: Measure) -> Reading:
        query = wanted.metric.prometheus
        return await prometheus.measure(client, query) if query else _none(wanted)

    async def by_http(wanted: Measure) -> Reading:
        request = wanted.metric.http
        return await http.measure(client, request) if request else _none(wanted)

    async def by_job(wanted: Measure) -> Reading:
        run = wanted.metric.job
        return await jobs.measure(wanted, run) if run else _none(wanted)

    return {"prometheus": by_prometheus, "http": by_http, "job": by_job}


def _none(wanted: Measure) -> Reading:
    raise NoResult(
        f"metric {wanted.id.metric} has no provider that this release of the operator knows"
    )


@dataclass(slots=True)
class Measurer:
    """The measurements of one operator process. ``wake`` asks for a key to be decided about."""

    cache: Cache
    providers: Mapping[str, Provider]
    wake: Callable[[Key, float], None]
    _tasks: dict[MeasurementId, asyncio.Task[None]] = field(default_factory=dict)
    _wanted: dict[Key, frozenset[MeasurementId]] = field(default_factory=dict)

    def want(self, key: Key, measures: Iterable[Measure]) -> None:
        """From now on this rollout wants these measurements, and no others."""
        wanted = {measure.id: measure for measure in measures}
        readings = self.cache.observed().readings
        for known in self._wanted.pop(key, frozenset()) - wanted.keys():
            readings.pop(known, None)
            if task := self._tasks.pop(known, None):
                task.cancel()
        for id_, measure in wanted.items():
            if id_ not in self._tasks and id_ not in readings:
                self._tasks[id_] = asyncio.create_task(
                    self._measure(key, measure), name=f"measure-{id_.metric}-{id_.number}"
                )
        if wanted:
            self._wanted[key] = frozenset(wanted)

    async def close(self) -> None:
        """End all that is under way."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _measure(self, key: Key, measure: Measure) -> None:
        reading = await self._read(measure)
        self._tasks.pop(measure.id, None)
        if measure.id in self._wanted.get(key, ()):
            self.cache.observed().readings[measure.id] = reading
            self.wake(key, 0.0)

    async def _read(self, measure: Measure) -> Reading:
        name = next((n for n in self.providers if getattr(measure.metric, n) is not None), "")
        try:
            return await self.providers[name](measure) if name else _none(measure)
        except NoResult as error:
            return Reading(datetime.now(UTC), error=str(error))
        # as the loop's workers do: a task that ended so would leave its analysis without an end
        except Exception as error:
            log.exception(
                "metric %s: a defect of the operator; please report it", measure.id.metric
            )
            return Reading(datetime.now(UTC), error=f"a defect of the operator: {error!r}")
