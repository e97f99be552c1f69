"""Repetition raises a count, and one object cannot bury the API server."""

from __future__ import annotations

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
        if self.error:
            raise self.error
        self.created.append(body)
        return body

    async def merge_patch(self, resource: Resource, name: str, patch: Body, *, namespace: str | None = None) -> Body:
        if self.error:
            raise self.error
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
