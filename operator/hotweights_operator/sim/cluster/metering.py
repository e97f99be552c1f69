"""What measurements give in a simulation: good and bad values, none, and errors, after a while.

A metric's URL says what it gives. What was given is remembered for the judges; what an operator's
process has begun or read dies with it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from hotweights_operator.model.measurements import Measure, MeasurementId, Reading
from hotweights_operator.runtime.triggers import Key

GAUGES: dict[str, tuple[float, float, float, float]] = {
    # shares of: a good value (0), a bad one (1), no value, an error
    "http://good": (0.9, 0.0, 0.05, 0.05),
    "http://bad": (0.3, 0.6, 0.05, 0.05),
    "http://away": (0.1, 0.0, 0.1, 0.8),
    "http://empty": (0.2, 0.0, 0.8, 0.0),
}


@dataclass(slots=True)
class Instruments:
    """What is there to be measured, whoever asks."""

    well: bool = False  # the faults have stopped: every value is a good one
    # by measurement: it may be made again by the next process, and give something else
    gave: dict[MeasurementId, set[str]] = field(default_factory=dict)


class Metering:
    """One operator process's measurements."""

    def __init__(self, draw: random.Random, instruments: Instruments, counts: Counter[str]) -> None:
        self._draw, self._instruments, self._counts = draw, instruments, counts
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
        shares = GAUGES[measure.metric.http.url if measure.metric.http else "http://good"]
        kinds = ("a good value", "a bad value", "no value", "an error")
        what = kinds[0] if self._instruments.well else self._draw.choices(kinds, shares)[0]
        self._counts[f"measurement gives {what}"] += 1
        self._instruments.gave.setdefault(measure.id, set()).add(what)
        match what:
            case "a good value":
                return Reading(now, 0.0)
            case "a bad value":
                return Reading(now, 1.0)
            case "no value":
                return Reading(now, float("nan"))
            case _:
                return Reading(now, error="nobody answers")
