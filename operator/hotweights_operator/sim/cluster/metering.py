"""What measurements give in a simulation: good and bad values, none, and errors, after a while.

A metric's URL says what it gives, so that a story's version is good or bad by what its rollout
measures. It dies with the operator's process, as its tasks do.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta

from hotweights_operator.model.measurements import Measure, MeasurementId, Reading
from hotweights_operator.runtime.triggers import Key

WORLDS: dict[str, tuple[float, float, float, float]] = {
    # shares of: a good value (0), a bad one (1), no value, an error
    "http://good": (0.85, 0.0, 0.08, 0.07),
    "http://bad": (0.3, 0.6, 0.05, 0.05),
    "http://middling": (0.6, 0.0, 0.4, 0.0),
    "http://away": (0.0, 0.0, 0.1, 0.9),
}


class Metering:
    """One operator process's measurements."""

    def __init__(self, draw: random.Random, counts: Counter[str]) -> None:
        self._draw, self._counts = draw, counts
        self._begun: dict[MeasurementId, tuple[Key, Measure, datetime]] = {}
        self._wanted: dict[Key, set[MeasurementId]] = {}

    def want(
        self,
        key: Key,
        measures: Sequence[Measure],
        readings: dict[MeasurementId, Reading],
        now: datetime,
    ) -> None:
        """From now on this rollout wants these measurements, and no others."""
        wanted = {measure.id for measure in measures}
        for gone in self._wanted.pop(key, set()) - wanted:
            self._begun.pop(gone, None)
            readings.pop(gone, None)
        for measure in measures:
            if measure.id not in self._begun and measure.id not in readings:
                ends_at = now + timedelta(seconds=self._draw.uniform(0.0, 10.0))
                self._begun[measure.id] = (key, measure, ends_at)
        if wanted:
            self._wanted[key] = wanted

    def read(self, readings: dict[MeasurementId, Reading], now: datetime) -> set[Key]:
        """What came in since; the rollouts that it is for."""
        found: set[Key] = set()
        for id_, (key, measure, ends_at) in list(self._begun.items()):
            if now >= ends_at:
                del self._begun[id_]
                readings[id_] = self._reading(measure, now)
                found.add(key)
        return found

    def _reading(self, measure: Measure, now: datetime) -> Reading:
        url = measure.metric.http.url if measure.metric.http is not None else "http://good"
        what = self._draw.choices(("good", "bad", "nothing", "error"), WORLDS[url])[0]
        self._counts[f"measured: {what}"] += 1
        match what:
            case "good":
                return Reading(now, 0.0)
            case "bad":
                return Reading(now, 1.0)
            case "nothing":
                return Reading(now, float("nan"))
            case _:
                return Reading(now, error="nobody answers")
