"""Repetition raises a count, and one object cannot bury the API server."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta

from hotweights_kube import errors
from hotweights_kube.events import MAX_PER_OBJECT, Notice, Recorder, Reference
from hotweights_kube.resources import Body, Resource

ROLLOUT = Reference("hotweights.dev/v1alpha1", "WeightRollout", "r", "u", "ns")


class Writer:
    def __init__(self) -> None:
        self.created: list[Body] = []
        self.patched: list[tuple[str, Body]] = []
        self.error: errors.KubeError | None = None

    async def create(self, resource: Resource, body: Body, *, manager: str = "") -> Body:
        await asyncio.sleep(0)  # others come in between, as they do on the way to an API server
        if self.error:
            raise self.error
        self.created.append(body)
        return body

    async def merge_patch(
        self, resource: Resource, name: str, patch: Body, *, namespace: str | None = None
    ) -> Body:
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        if not any(body["metadata"]["name"] == name for body in self.created):
            raise errors.NotFound(name)
        self.patched.append((name, patch))
        return patch


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


def recorder() -> tuple[Recorder, Writer, Clock]:
    writer, clock = Writer(), Clock()
    return Recorder(writer, "hotweights.dev/operator", "pod", clock), writer, clock


async def test_the_same_notice_again_raises_the_count() -> None:
    record, writer, clock = recorder()
    for _ in range(3):
        await record.record(Notice(ROLLOUT, "Stalled", "no source", "Warning"))
        clock.now += timedelta(minutes=1)
    assert len(writer.created) == 1
    assert [patch["series"]["count"] for _, patch in writer.patched] == [2, 3]
    assert writer.created[0]["regarding"]["namespace"] == "ns"


async def test_after_a_while_it_is_a_new_event() -> None:
    record, writer, clock = recorder()
    await record.record(Notice(ROLLOUT, "Stalled", "no source"))
    clock.now += timedelta(minutes=11)
    await record.record(Notice(ROLLOUT, "Stalled", "no source"))
    assert len(writer.created) == 2
    assert len({body["metadata"]["name"] for body in writer.created}) == 2


async def test_one_object_gets_a_bounded_number() -> None:
    record, writer, _ = recorder()
    for number in range(100):
        await record.record(Notice(ROLLOUT, "Failed", f"pod {number}"))
    assert len(writer.created) == MAX_PER_OBJECT


async def test_an_api_server_that_is_away_costs_an_event_and_nothing_else() -> None:
    record, writer, _ = recorder()
    writer.error = errors.Unavailable("away")
    await record.record(Notice(ROLLOUT, "Failed", "pod"))
    writer.error = None
    await record.record(Notice(ROLLOUT, "Failed", "pod"))
    assert len(writer.created) == 1


async def test_two_at_the_same_time_are_one_event() -> None:
    record, writer, _ = recorder()
    notice = Notice(ROLLOUT, "Stalled", "no source")
    await asyncio.gather(*(record.record(notice) for _ in range(5)))
    assert len(writer.created) == 1
    assert writer.patched[-1][1]["series"]["count"] == 5


async def test_an_event_that_is_gone_is_written_anew() -> None:
    record, writer, _ = recorder()
    notice = Notice(ROLLOUT, "Stalled", "no source")
    await record.record(notice)
    writer.created.clear()
    await record.record(notice)
    await record.record(notice)
    assert len(writer.created) == 1
    assert [patch["series"]["count"] for _, patch in writer.patched] == [2]


async def test_what_was_said_is_forgotten_and_makes_room() -> None:
    record, writer, clock = recorder()
    for number in range(MAX_PER_OBJECT):
        await record.record(Notice(ROLLOUT, "Failed", f"pod {number}"))
        clock.now += timedelta(seconds=1)
    clock.now += timedelta(minutes=10) - timedelta(seconds=MAX_PER_OBJECT - 1)
    await record.record(Notice(ROLLOUT, "Failed", "another"))
    await record.record(Notice(ROLLOUT, "Failed", "and another"))
    await record.record(Notice(ROLLOUT, "Failed", "one too many"))
    assert len(writer.created) == MAX_PER_OBJECT + 2


async def test_the_thousandth_costs_what_the_first_did() -> None:
    record, _, _ = recorder()

    async def seconds(first: int) -> float:
        began = time.thread_time()  # by the clock it would cost what others on the machine do
        for number in range(first, first + 300):
            about = Reference("v1", "Pod", f"p{number}", f"u{number}", "ns")
            await record.record(Notice(about, "WeightsActivating", "v1"))
        return time.thread_time() - began

    windows = [await seconds(first) for first in range(0, 6000, 300)]
    assert min(windows[-4:]) < 5 * min(windows[:4]), (
        "it was twenty times as much when each looked at all before it"
    )
