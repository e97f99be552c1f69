"""When a rollout is stuck, and what is told of it: progress, deadlines, and news."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from hotweights_crds.nodeweights import NodeWeightsStatus, StagedVersion
from hotweights_operator.decide import rollout_status
from hotweights_operator.decide.rollouts import decide
from hotweights_operator.model.actions import Event
from hotweights_operator.model.objects import NodeState, Rollout
from hotweights_operator.model.observed import Observed
from tests.operator.worlds import (
    AT_NEW,
    DONE,
    NEW,
    NOW,
    OLD,
    Fields,
    after,
    engine,
    gave_up,
    order,
    pod,
    reason_of,
    rollout,
    served,
    state,
    status_after,
    version,
    world,
)

LENIENT: Fields = {"failurePolicy": {"maxFailed": 9}}
HOUR = timedelta(hours=1)


# -- deadlines ----------------------------------------------------------------------------------

IDLE = world([pod(0)], [state("n0", [engine(0, phase="Preparing")], {"p0": OLD})])


def staging(done: int) -> Observed:
    """So much of the version has come."""
    staged = [
        StagedVersion(digest=OLD, phase="Staged"),
        StagedVersion(digest=NEW, phase="Fetching", bytes_done=done, bytes_total=99),
    ]
    return world([pod(0)], [state("n0", [engine(0)], {"p0": OLD}, staged=staged)])


def fleet(ready: int, updated: int, available: int) -> Observed:
    """Three pods of which so many have prepared, serve, and are of service with it."""
    engines = [engine(n, NEW) if n < updated else engine(n) for n in range(3)]
    engines = [
        engine(n, phase="Prepared", prepared=NEW) if updated <= n < ready else e
        for n, e in enumerate(engines)
    ]
    pods = [pod(n, shows=NEW, ready=n < available) if n < updated else pod(n) for n in range(3)]
    return world(
        pods, [state("n0", engines, {f"p{n}": NEW if n < updated else OLD for n in range(3)})]
    )


@pytest.mark.parametrize(
    "steps",
    [
        [staging(0), staging(30), staging(60)],
        [fleet(0, 0, 0), fleet(1, 0, 0), fleet(2, 0, 0)],
        [fleet(3, 0, 0), fleet(3, 1, 0), fleet(3, 2, 0)],
        [fleet(3, 2, 0), fleet(3, 2, 1), fleet(3, 2, 2)],
    ],
    ids=["bytes", "prepared", "updated", "of service"],
)
def test_each_step_further_is_progress(steps: list[Observed]) -> None:
    known, now = rollout(AT_NEW), NOW
    for seen in steps:
        known, now = after(known, seen, now), now + timedelta(seconds=400)
        assert known.status.phase != "Stalled"


def test_a_pod_that_goes_to_and_fro_is_none() -> None:
    known, now = rollout(AT_NEW), NOW
    for step in range(5):
        known, now = after(known, fleet(3, 1 + step % 2, 1), now), now + timedelta(seconds=400)
    assert reason_of(known.status, "Stalled") == "ProgressDeadlineExceeded"


def begins_anew(before: Rollout, seen: Observed, onwards: Rollout) -> None:
    """Whatever was before lasted an hour; then it goes on, and has all of its time."""
    known = after(before, seen)
    known = replace(onwards, status=after(known, seen, NOW + HOUR).status)
    assert status_after(known, IDLE, NOW + HOUR).phase != "Stalled"
    assert (
        status_after(
            after(known, IDLE, NOW + HOUR), IDLE, NOW + HOUR + timedelta(seconds=599)
        ).phase
        != "Stalled"
    )


def test_the_clock_begins_anew_after_a_pause() -> None:
    begins_anew(rollout(AT_NEW, paused=True), IDLE, rollout(AT_NEW))


def test_a_pause_has_no_deadline() -> None:
    assert decide(rollout(AT_NEW, paused=True), IDLE, NOW).again_in_seconds is None


def test_the_clock_begins_anew_when_the_version_is_there() -> None:
    waits = world(
        [pod(0)],
        [state("n0", [engine(0, phase="Preparing")], {"p0": OLD})],
        versions=[version("new", "")],
    )
    begins_anew(rollout(AT_NEW), waits, rollout(AT_NEW))


def test_the_clock_begins_anew_when_a_complete_rollout_loses_a_pod() -> None:
    begins_anew(rollout(DONE), served(engine(0, NEW)), rollout(AT_NEW))


def test_progress_by_a_clock_that_is_ahead_does_not_put_the_deadline_off() -> None:
    known = after(rollout(AT_NEW), IDLE, NOW)
    ahead = replace(
        known, status=known.status.model_copy(update={"last_progress_at": "2027-01-01T00:00:00Z"})
    )
    assert decide(ahead, IDLE, NOW).again_in_seconds == pytest.approx(601)


def test_only_bytes_are_mere_progress() -> None:
    first = status_after(rollout(AT_NEW), staging(30))
    assert rollout_status.is_progress(first, status_after(rollout(AT_NEW), staging(60)))
    assert not rollout_status.is_progress(
        first, status_after(rollout(AT_NEW, paused=True), staging(60))
    )
    assert not rollout_status.is_progress(first, status_after(rollout(AT_NEW), fleet(1, 0, 0)))


# -- news ---------------------------------------------------------------------------------------


def news(known: Rollout, seen: Observed) -> list[Event]:
    """What is told."""
    return list(decide(known, seen, NOW).events)


def test_what_is_no_news_is_not_told() -> None:
    seen = world(
        [pod(0)], [state("n0", [engine(0, failed=gave_up())], {"p0": order("p0", OLD, prepare="")})]
    )
    known = rollout(AT_NEW)
    assert [event.regarding.kind for event in news(known, seen)] == ["WeightRollout", "Pod"]
    assert news(after(known, seen, NOW), seen) == []


def test_trouble_is_told_as_a_warning_on_the_rollout_and_on_its_pod() -> None:
    seen = world(
        [pod(0)], [state("n0", [engine(0, failed=gave_up())], {"p0": order("p0", OLD, prepare="")})]
    )
    told = news(rollout(AT_NEW), seen)
    assert [(e.regarding.name, e.reason, e.warning) for e in told] == [
        ("llm", "ProbeMismatch", True),
        ("p0", "ProbeMismatch", True),
    ]
    assert [e.warning for e in news(rollout(AT_NEW), IDLE)] == [False]


def test_a_source_that_cannot_be_read_is_told_on_the_pods_that_wait_for_it() -> None:
    staged = [StagedVersion(digest=NEW, phase="Failed", reason="ChecksumMismatch")]
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": OLD}, staged=staged)])
    assert [e.regarding.uid for e in news(rollout(AT_NEW), seen) if e.regarding.kind == "Pod"] == [
        "p0"
    ]


def test_a_failure_is_told_on_the_pod_that_failed_and_not_on_its_namesake() -> None:
    namesake = replace(pod(1), name="p0")
    engines = [engine(0, failed=gave_up()), engine(1)]
    given = {"p0": order("p0", OLD, prepare=""), "p1": order("p1", OLD, prepare="", name="p0")}
    seen = world(
        [namesake, pod(0, "n1")],
        [
            state("n0", engines[1:], {"p1": given["p1"]}),
            state("n1", engines[:1], {"p0": given["p0"]}),
        ],
    )
    assert [
        e.regarding.uid for e in news(rollout(AT_NEW, **LENIENT), seen) if e.regarding.kind == "Pod"
    ] == ["p0"]


@pytest.mark.parametrize(
    ("name", "retry", "words"),
    [
        ("old", "", "Revision 3: old (a rollback)"),
        ("new", "again", "Revision 3: new"),
        ("x", "", "Revision 3: x"),
    ],
)
def test_a_rollback_is_called_one(name: str, retry: str, words: str) -> None:
    versions = [version("old", OLD), version("new", NEW), version("x", "sha256:x")]
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": OLD})], versions=versions)
    known = replace(rollout(AT_NEW, versionRef={"name": name}), retry=retry)
    assert next(event.message for event in news(known, seen)) == words


def test_a_node_whose_agent_has_said_nothing_yet_says_nothing() -> None:
    silent = NodeState(
        "n0",
        5,
        "50",
        state("n0", [], {"p0": NEW}).spec,
        NodeWeightsStatus(engines=[engine(0, NEW)]),
    )
    status = status_after(rollout(AT_NEW), world([pod(0, shows=NEW)], [silent]))
    assert (status.pods.updated, status.failures[0].reason) == (0, "AgentMissing")
