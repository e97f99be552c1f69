"""Measurements as values: which one is wanted, and what it gave.

One is known by what it is the measurement of, so that one which was begun twice, or comes late,
counts once or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from hotweights_crds.analysis import Metric


@dataclass(frozen=True, slots=True)
class MeasurementId:
    """The number-th measurement of one metric in one analysis."""

    rollout: str  # UID
    revision: int
    step: int
    begun: str  # when the analysis began, as its status has it
    metric: str
    number: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What came of one. No value and no error: there was nothing to measure."""

    at: datetime
    value: float | str | bool | None = None
    text: str = ""  # for people: where it came from, or why there is none
    error: str = ""  # why nothing is known


@dataclass(frozen=True, slots=True)
class Measure:
    """One that is to be made now, by asking somebody."""

    id: MeasurementId
    metric: Metric  # with its arguments in place
    namespace: str  # of the rollout: where Jobs run
    owner: str  # the rollout's name
