"""How often the API server is written to, and that what pods show comes about whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from hotweights_agent.kube.pod_status import BURST, GATE, PodStatusWriter, patch_for, shown
from hotweights_agent.kube.status_writer import StatusWriter, WriteLimits
from hotweights_agent.session.effects import PodStatus
from hotweights_agent.session.messages import Pod
from hotweights_agent.session.retry import TokenBucket
from hotweights_common.backoff import Backoff
from hotweights_crds.nodeweights import NodeWeightsStatus, StagedVersion
from hotweights_kube.errors import Conflict, Invalid, NotFound, Unavailable
from tests.agent.fake_engine import until
from tests.agent.world import digest

POD = Pod("uid", "ns", "vllm-0")
ASSIGNED = PodStatus(True, "Assigned", "serves v1", "v1", "1" * 16)
COMMITTING = PodStatus(False, "Committing", "v2: committing")


def status(done: int) -> NodeWeightsStatus:
    staged = StagedVersion(digest=digest(1), phase="Fetching", bytes_done=done, bytes_total=1000)
    return NodeWeightsStatus(boot_id="b", staged=[staged])


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def running(part: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(part.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def test_a_bucket_lets_a_burst_through_and_then_the_rate() -> None:
    bucket = TokenBucket(per_second=0.5, burst=3, now=0.0)
    for _ in range(3):
        assert bucket.wait_seconds(0.0) == 0.0
        bucket.take()
    assert bucket.wait_seconds(0.0) == 2.0
    assert bucket.wait_seconds(1.5) == 0.5
    assert bucket.wait_seconds(100.0) == 0.0


class Written:
    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.errors: list[Exception] = []

    async def __call__(self, body: Any) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.bodies.append(body["status"])


PACE = WriteLimits(coalesce_seconds=0.0, retry=Backoff(0.01, 8.0))


async def test_progress_waits_and_what_matters_does_not() -> None:
    written, clock = Written(), Clock()
    writer = StatusWriter(written, clock, lambda: "t", PACE)
    async with running(writer):
        writer.offer(status(0), urgent=True)
        await until(lambda: len(written.bodies) == 1)
        assert writer.wait_seconds(status(50)) == 15.0
        assert writer.wait_seconds(status(100)) == 0.0
        clock.now = 20.0
        assert writer.wait_seconds(status(1)) == 0.0
        clock.now = 1.0
        writer.offer(status(10), urgent=False)
        writer.offer(status(20), urgent=False)
        await asyncio.sleep(0.02)
        assert len(written.bodies) == 1
        writer.offer(status(30), urgent=True)
        await until(lambda: len(written.bodies) == 2)
    assert written.bodies[1]["staged"][0]["bytesDone"] == 30
    assert [c["type"] for c in written.bodies[1]["conditions"]] == ["Ready"]


async def test_a_write_that_failed_is_done_again_with_the_newest() -> None:
    written = Written()
    written.errors = [Unavailable("away"), Conflict("no")]

    async def write(body: Any) -> None:
        if written.errors:
            writer.offer(status(9 - len(written.errors)), urgent=True)  # while it is written
        await written(body)

    writer = StatusWriter(write, Clock(), lambda: "t", PACE)
    async with running(writer):
        writer.offer(status(0), urgent=True)
        await until(lambda: bool(written.bodies))
    assert written.errors == []
    assert [body["staged"][0]["bytesDone"] for body in written.bodies] == [8]


async def test_an_object_that_comes_later_gets_the_status_then() -> None:
    written = Written()
    written.errors = [NotFound("none")]
    writer = StatusWriter(written, Clock(), lambda: "t", PACE)
    async with running(writer):
        writer.offer(status(7), urgent=True)
        await until(lambda: not written.errors)
        await asyncio.sleep(0.02)
        assert written.bodies == []
        writer.again()
        await until(lambda: bool(written.bodies))
    assert [body["staged"][0]["bytesDone"] for body in written.bodies] == [7]


class Pods:
    """An API server with one pod, other people's conditions and labels in it."""

    def __init__(self) -> None:
        self.version = 1
        self.errors: list[Exception] = []
        self.writes = 0
        self.labels = {"app": "vllm"}
        self.conditions: list[Any] = [{"type": "Ready", "status": "False"}]
        self.told: list[tuple[str, str]] = []

    def body(self) -> Any:
        metadata = {
            "uid": "uid",
            "name": "vllm-0",
            "resourceVersion": str(self.version),
            "labels": dict(self.labels),
        }
        return {"metadata": metadata, "status": {"conditions": list(self.conditions)}}

    async def apply(self, body: Any) -> Any:
        if self.errors:
            raise self.errors.pop(0)
        self.writes += 1
        self.version += 1
        self.labels = {k: v for k, v in self.labels.items() if "hotweights" not in k} | body[
            "metadata"
        ]["labels"]
        self.conditions = [c for c in self.conditions if c["type"] != GATE] + body["status"][
            "conditions"
        ]
        return self.body()

    async def tell(self, uid: str, label: str) -> None:
        self.told.append((uid, label))

    def pod_status(self) -> PodStatusWriter:
        return PodStatusWriter(
            self.apply, self.tell, asyncio.get_running_loop().time, lambda: "t", resync_seconds=0.05
        )


async def test_gate_and_labels_come_in_one_write_and_are_told() -> None:
    pods = Pods()
    pod_status = pods.pod_status()
    async with running(pod_status):
        await pod_status.saw(pods.body())
        pod_status.want(POD, ASSIGNED)
        await until(lambda: shown(pods.body()) == ASSIGNED)
        pod_status.want(POD, COMMITTING)
        await until(lambda: shown(pods.body()) == COMMITTING)
        await until(lambda: pods.told == [("uid", "1" * 16), ("uid", "")])
    assert pods.writes == 2
    assert pods.labels == {"app": "vllm"}
    assert pods.conditions[0]["type"] == "Ready"


async def test_it_comes_about_through_errors_and_against_others() -> None:
    pods = Pods()
    pods.errors = [Unavailable("away"), NotFound("not yet")]
    pod_status = pods.pod_status()
    async with running(pod_status):
        pod_status.want(POD, ASSIGNED)
        await until(lambda: shown(pods.body()) == ASSIGNED)
        assert pods.errors == []
        pods.labels = {"app": "vllm"}  # somebody took the labels away
        pods.version += 1
        assert shown(pods.body()) != ASSIGNED
        await pod_status.saw(pods.body())
        await until(lambda: shown(pods.body()) == ASSIGNED)
        pod_status.gone("uid")
        pod_status.forget("uid")


async def test_an_older_state_of_a_pod_changes_nothing() -> None:
    pods = Pods()
    pod_status = pods.pod_status()
    old = pods.body()
    await pod_status.saw(await pods.apply(patch_for(POD, ASSIGNED, None, "t")))
    await pod_status.saw(old)
    assert pods.told == [("uid", "1" * 16)]


def test_the_transition_time_stays_while_the_status_does() -> None:
    first = patch_for(POD, ASSIGNED, None, "then")
    again = patch_for(POD, PodStatus(True, "Assigned", "serves v2", "v2", "2" * 16), first, "now")
    other = patch_for(POD, COMMITTING, first, "now")
    times = [
        body["status"]["conditions"][0]["lastTransitionTime"] for body in (first, again, other)
    ]
    assert times == ["then", "then", "now"]
    assert other["metadata"] == {"name": "vllm-0", "namespace": "ns", "uid": "uid", "labels": {}}


async def test_a_pod_of_a_restored_etcd_is_marked_again() -> None:
    """It shows what it showed when the backup was made, at a resourceVersion of then."""
    pods = Pods()
    pod_status, old = pods.pod_status(), pods.body()
    async with running(pod_status):
        await pod_status.saw(old)
        pod_status.want(POD, ASSIGNED)
        await until(lambda: shown(pods.body()) == ASSIGNED)
        await pod_status.saw(pods.body())
        before = pods.writes
        pod_status.rewound()
        await pod_status.saw(old)
        await until(lambda: pods.writes > before)


async def test_an_engine_that_changes_its_word_all_the_time_is_written_now_and_then() -> None:
    written, clock = Written(), Clock()
    pace = WriteLimits(coalesce_seconds=0.0, urgent_burst=5, urgent_per_second=2.0)
    writer = StatusWriter(written, clock, lambda: "t", pace)
    async with running(writer):
        for number in range(200):
            writer.offer(status(number), urgent=True)
            await asyncio.sleep(0)
        await asyncio.sleep(0.02)
        assert len(written.bodies) == 5
        clock.now = 0.6
        writer.offer(status(999), urgent=True)
        await until(lambda: len(written.bodies) == 6)
    assert written.bodies[-1]["staged"][0]["bytesDone"] == 999


async def test_a_status_that_is_refused_for_long_is_trouble_and_one_that_nobody_takes_is_not() -> (
    None
):
    written, clock, results = Written(), Clock(), list[str]()
    writer = StatusWriter(written, clock, lambda: "t", PACE, counted=results.append)
    async with running(writer):
        written.errors = [Unavailable("away")]
        writer.offer(status(0), urgent=True)
        await until(lambda: results == ["failed", "written"])
        assert writer.trouble() == ""
        written.errors = [Invalid("token is too large")] * 1000
        writer.offer(status(1), urgent=True)
        await until(lambda: results[-1] == "refused")
        assert writer.trouble() == "", "not yet"
        clock.now = 61.0
        assert writer.trouble() == "the status has been refused for 61 s: token is too large"
        written.errors = []
        await until(lambda: results[-1] == "written")
        assert writer.trouble() == ""


async def test_a_pod_that_wants_other_marks_all_the_time_is_written_now_and_then() -> None:
    pods, now = Pods(), Clock()
    pod_status = PodStatusWriter(pods.apply, pods.tell, now, lambda: "t")
    async with running(pod_status):
        for number in range(100):
            pod_status.want(POD, PodStatus(True, "Assigned", f"serves v{number}"))
            await asyncio.sleep(0.001)
        assert pods.writes == BURST
        now.now = 1.5
        pod_status.want(POD, ASSIGNED)
        await until(lambda: shown(pods.body()) == ASSIGNED)
    assert pods.writes == BURST + 1
