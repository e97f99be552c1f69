"""Who measures: nobody waits, nothing is doubled, and what is wanted no more is ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pytest
import pytest_asyncio

from hotweights_crds.analysis import Metric
from hotweights_operator.model.measurements import Measure, MeasurementId, Reading
from hotweights_operator.runtime.cache import Cache
from hotweights_operator.runtime.measure.client import NoResult
from hotweights_operator.runtime.measure.measurer import Measurer
from hotweights_operator.runtime.triggers import Key

KEY: Key = ("rollout", "models/llm")
METRIC = Metric.from_dict(
    {"name": "errors", "http": {"url": "http://a"}, "successCondition": "result < 1"}
)


def wanted(number: int = 1, rollout: str = "r", metric: Metric = METRIC) -> Measure:
    id_ = MeasurementId(rollout, 2, 1, "2026-01-01T12:00:00Z", metric.name, number)
    return Measure(id_, metric, "models", "llm")


@dataclass
class Scene:
    """A measurer whose provider answers when it is told to."""

    cache: Cache = field(default_factory=Cache)
    asked: list[MeasurementId] = field(default_factory=list)
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    woken: asyncio.Queue[Key] = field(default_factory=asyncio.Queue)
    cancelled: list[MeasurementId] = field(default_factory=list)
    raises: Exception | None = None
    measurer: Measurer = field(init=False)

    def __post_init__(self) -> None:
        self.measurer = Measurer(
            self.cache, {"http": self.measure}, lambda key, _: self.woken.put_nowait(key)
        )

    async def measure(self, measure: Measure) -> Reading:
        self.asked.append(measure.id)
        try:
            await self.answers.wait()
        except asyncio.CancelledError:
            self.cancelled.append(measure.id)
            raise
        if self.raises is not None:
            raise self.raises
        return Reading(datetime.now(UTC), float(measure.id.number))

    @property
    def readings(self) -> dict[MeasurementId, Reading]:
        return self.cache.observed().readings

    async def until(self, holds: Callable[[], bool]) -> None:
        for _ in range(100):  # turns of the event loop: nothing here waits for a time
            if holds():
                return
            await asyncio.sleep(0)
        raise AssertionError("it does not come to be")


@pytest_asyncio.fixture
async def scene() -> AsyncIterator[Scene]:
    made = Scene()
    yield made
    await made.measurer.close()


async def test_what_it_gives_is_observed_and_the_rollout_is_looked_at(scene: Scene) -> None:
    scene.measurer.want(KEY, [wanted()])
    assert scene.readings == {}
    scene.answers.set()
    assert await scene.woken.get() == KEY
    assert scene.readings[wanted().id].value == 1.0


async def test_what_is_under_way_or_lies_ready_is_not_begun_again(scene: Scene) -> None:
    for _ in range(3):
        scene.measurer.want(KEY, [wanted()])
        await scene.until(lambda: len(scene.asked) == 1)
    scene.answers.set()
    await scene.woken.get()
    scene.measurer.want(KEY, [wanted()])
    await asyncio.sleep(0)
    assert scene.asked == [wanted().id]


async def test_a_reading_is_forgotten_when_its_status_was_written(scene: Scene) -> None:
    scene.answers.set()
    scene.measurer.want(KEY, [wanted()])
    await scene.woken.get()
    scene.measurer.want(KEY, [])
    assert scene.readings == {}


async def test_what_is_wanted_no_more_is_ended_and_comes_to_nothing(scene: Scene) -> None:
    scene.measurer.want(KEY, [wanted()])
    await scene.until(lambda: len(scene.asked) == 1)
    scene.measurer.want(KEY, [])
    await scene.until(lambda: scene.cancelled == [wanted().id])
    scene.answers.set()
    await asyncio.sleep(0)
    assert scene.readings == {}
    assert scene.woken.empty()


async def test_rollouts_do_not_end_each_other_s(scene: Scene) -> None:
    other: Key = ("rollout", "models/other")
    scene.measurer.want(KEY, [wanted()])
    scene.measurer.want(other, [wanted(rollout="o")])
    scene.measurer.want(KEY, [])
    scene.answers.set()
    assert await scene.woken.get() == other
    assert [id_.rollout for id_ in scene.readings] == ["o"]


@pytest.mark.parametrize("error", [NoResult("nobody answers"), ZeroDivisionError("a defect")])
async def test_an_error_is_a_reading_that_says_why(scene: Scene, error: Exception) -> None:
    scene.raises = error
    scene.answers.set()
    scene.measurer.want(KEY, [wanted()])
    await scene.woken.get()
    assert str(error) in scene.readings[wanted().id].error


async def test_a_metric_of_a_newer_release_is_an_error(scene: Scene) -> None:
    unknown = METRIC.model_copy(update={"http": None})
    scene.measurer.want(KEY, [wanted(metric=unknown)])
    await scene.woken.get()
    assert "no provider that this release" in scene.readings[wanted().id].error


async def test_the_next_measurement_takes_the_place_of_the_last(scene: Scene) -> None:
    scene.answers.set()
    scene.measurer.want(KEY, [wanted(1)])
    await scene.woken.get()
    scene.measurer.want(KEY, [wanted(2)])
    await scene.woken.get()
    assert list(scene.readings) == [replace(wanted().id, number=2)]
