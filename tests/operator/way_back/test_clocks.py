"""Deadlines, clocks that are set back, and other ends."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from hotweights_crds.conditions import find
from hotweights_crds.nodeweights import StagedVersion
from hotweights_operator.decide.rollouts import decide
from hotweights_operator.model.observed import Observed
from tests.operator.worlds import (
    AT_NEW,
    NEW,
    NOW,
    OLD,
    OTHER,
    engine,
    next_pass,
    order,
    orders,
    pod,
    prepared,
    rollout,
    state,
    status_of,
    told,
    world,
)


def test_going_to_and_fro_is_no_progress() -> None:
    def seen(done: int) -> Observed:
        staged = [StagedVersion(digest=NEW, phase="Fetching", bytes_done=done, bytes_total=100)]
        return world([pod(0)], [state("n0", [engine(0)], {"p0": OLD}, staged=staged)])

    running, now = rollout(AT_NEW), NOW
    for step in range(30):
        now += timedelta(seconds=60)
        running = next_pass(running, decide(running, seen(60 * (step % 2)), now))
    stalled = find(running.status.conditions, "Stalled")
    assert stalled is not None
    assert stalled.reason == "ProgressDeadlineExceeded"


def test_the_deadline_counts_from_the_last_progress() -> None:
    seen = world([pod(0)], [state("n0", [engine(0, phase="Preparing")], {"p0": OLD})])
    running = next_pass(rollout(AT_NEW), decide(rollout(AT_NEW), seen, NOW))
    again = decide(running, seen, NOW + timedelta(seconds=100))
    assert again.again_in_seconds == pytest.approx(501)
    stalled = find(
        status_of(decide(running, seen, NOW + timedelta(seconds=600))).conditions, "Stalled"
    )
    assert stalled is not None
    assert stalled.reason == "ProgressDeadlineExceeded"


def test_a_deadline_never_passes_by_the_clock_of_another_process() -> None:
    seen = world([pod(0)], [state("n0", [engine(0, phase="Preparing")], {"p0": OLD})])
    running = next_pass(rollout(AT_NEW), decide(rollout(AT_NEW), seen, NOW))
    ahead = NOW + timedelta(minutes=20)
    status = status_of(decide(running, seen, ahead, started_at=ahead))
    assert status.phase != "Stalled"
    later = ahead + timedelta(seconds=600)
    assert status_of(decide(running, seen, later, started_at=ahead)).phase == "Stalled"


def test_a_clock_that_was_set_back_is_named() -> None:
    later = datetime(2026, 1, 1, 11, 30, tzinfo=UTC)
    seen = world(
        [pod(0, shows=NEW, engine_started_at=later)], [state("n0", [engine(0, NEW)], {"p0": NEW})]
    )
    failure = status_of(decide(rollout(AT_NEW), seen, NOW)).failures[0]
    assert (failure.reason, "clock of node n0" in failure.message) == ("ClockSetBack", True)


def test_what_an_earlier_life_confirmed_proves_nothing_though_the_clock_was_set_back() -> None:
    seen = world([pod(0, shows="", gate=False)], [state("n0", [engine(0, NEW)], {"p0": NEW})])
    seen.put("pod", "p0", pod(0, shows=NEW))  # marked anew, and that in the life before
    assert status_of(decide(rollout(AT_NEW), seen, NOW)).pods.updated == 1
    earlier = datetime(2026, 1, 1, 9, tzinfo=UTC)  # by a clock that went back two hours
    seen.put("pod", "p0", pod(0, shows=NEW, restarts=1, engine_started_at=earlier))
    assert status_of(decide(rollout(AT_NEW), seen, NOW)).pods.updated == 0
    again = engine(0, NEW, confirmed_at="2026-01-01T09:30:00Z")
    seen.put("state", "n0", state("n0", [again], {"p0": NEW}))
    assert status_of(decide(rollout(AT_NEW), seen, NOW)).pods.updated == 1


def test_what_stands_as_confirmed_when_a_new_life_is_first_seen_is_asked_for_once_more() -> None:
    told_new = {"p0": order("p0", NEW, prepare="")}
    seen = world([pod(0, shows=NEW)], [state("n0", [engine(0, NEW)], told_new)])
    # The agent's word of the new life comes first, then the pod's.
    again = state("n0", [engine(0, NEW, confirmed_at="2026-01-01T11:40:00Z")], told_new)
    seen.put("state", "n0", again)
    started_at = datetime(2026, 1, 1, 11, 39, tzinfo=UTC)
    seen.put(
        "pod",
        "p0",
        pod(0, shows=NEW, restarts=1, last_run_seconds=5.0, engine_started_at=started_at),
    )
    decision = decide(rollout(AT_NEW), seen, NOW)
    given = orders(decision)["p0"]
    assert (status_of(decision).pods.updated, given.digest, given.token, given.restarts) == (
        0,
        NEW,
        2,
        0,
    )
    # It is written once, and counts when it is answered.
    entry = again.spec.rollouts[0].model_copy(update={"pods": [given]})
    written = replace(again, generation=6, spec=again.spec.model_copy(update={"rollouts": [entry]}))
    seen.put("state", "n0", written)
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert (status_of(decision).pods.updated, orders(decision)) == (0, {})
    answered = written.status.model_copy(update={"observed_generation": 6})
    seen.put("state", "n0", replace(written, status=answered))
    assert status_of(decide(rollout(AT_NEW), seen, NOW)).pods.updated == 1


def test_a_rollout_that_is_being_deleted_leaves_its_pods_as_they_are() -> None:
    going = replace(rollout(AT_NEW), terminating=True)
    seen = world([pod(0)], [state("n0", prepared(1), {"p0": OLD})], rollouts=[going])
    decision = decide(going, seen, NOW)
    assert decision.actions == ()
    ready = find(status_of(decision).conditions, "Ready")
    assert ready is not None
    assert (ready.status, ready.reason) == ("False", "Terminating")


def test_a_version_whose_source_nobody_knows_is_not_waited_for() -> None:
    lost = order("p0", OTHER, prepare="")
    seen = world([pod(0, ready=False, gate=False)], [state("n0", [engine(0, OLD)], {"p0": lost})])
    assert told(decide(rollout(AT_NEW), seen, NOW))["p0"] == OLD
