"""What boots is given what the rollout wants now, or what is stable; and whose fault it is when a
container ends again and again.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from hotweights_crds.nodeweights import PodAssignment, StagedVersion
from hotweights_operator.decide.rollouts import decide
from tests.operator.worlds import (
    AT_NEW,
    BACK,
    LENIENT,
    NEW,
    NOW,
    OLD,
    OTHER,
    Fields,
    asked_to_prepare,
    engine,
    gave_up,
    looping,
    order,
    orders,
    pod,
    prepared,
    rollout,
    state,
    status_of,
    told,
    told_to_change,
    world,
)


@pytest.mark.parametrize("phase", ["Booting", "Disconnected"])
def test_a_pod_that_loops_on_the_version_left_boots_into_the_one_gone_to(phase: str) -> None:
    back = rollout(BACK, versionRef={"name": "old"})
    bad = order("p0", NEW, prepare="", revision=2, restarts=0)
    seen = world([looping(0, 2)], [state("n0", [engine(0, "", phase=phase)], {"p0": bad})])
    assert told(decide(back, seen, NOW))["p0"] == OLD


def test_a_pod_that_loops_on_the_old_version_boots_into_the_fix() -> None:
    looped = order("p0", OLD, prepare="", revision=1)
    seen = world([looping(0, 4)], [state("n0", [engine(0, "", phase="Booting")], {"p0": looped})])
    given = orders(decide(rollout(AT_NEW), seen, NOW))["p0"]
    assert (given.digest, given.restarts) == (NEW, 4)


def test_three_short_lives_on_a_version_are_a_failure_of_it_and_what_is_stable_comes_back() -> None:
    told_new = order("p0", NEW, prepare="")
    seen = world([looping(0, 3)], [state("n0", [engine(0, "", phase="Booting")], {"p0": told_new})])
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert [f.reason for f in status_of(decision).failures] == ["CrashLooping"]
    assert told(decision)["p0"] == OLD


def test_lives_that_last_are_no_loop() -> None:
    often = pod(0, ready=False, gate=False, restarts=9, last_run_seconds=86400.0)
    seen = world(
        [often],
        [state("n0", [engine(0, "", phase="Booting")], {"p0": order("p0", NEW, prepare="")})],
    )
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert status_of(decision).pods.failed == 0
    assert told(decision).get("p0", NEW) == NEW


def test_a_version_refused_at_boot_makes_room_for_the_stable_one() -> None:
    refused = engine(
        0,
        "",
        phase="Refused",
        confirmed_at="",
        failed=gave_up(step="Prepare", booting=True, reason="ShapeMismatch"),
    )
    fresh = pod(0, ready=False, was_ready=False, gate=False)
    seen = world([fresh], [state("n0", [refused], {"p0": order("p0", NEW, prepare="")})])
    decision = decide(rollout(AT_NEW, **LENIENT), seen, NOW)
    assert told(decision)["p0"] == OLD
    assert [f.reason for f in status_of(decision).failures] == ["ShapeMismatch"]


def test_a_looping_pod_holds_up_nobody() -> None:
    engines = [engine(0, "", phase="Booting"), *prepared(4)[1:]]
    orders_: dict[str, str | PodAssignment] = {
        "p0": order("p0", OLD, prepare=""),
        **{f"p{n}": OLD for n in (1, 2, 3)},
    }
    known = {
        **AT_NEW,
        "failures": [{"pod": "p0", "podUID": "p0", "reason": "CrashLooping"}],
        "preparedRevision": 2,
    }
    seen = world([looping(0, 3), *(pod(n) for n in (1, 2, 3))], [state("n0", engines, orders_)])
    assert told_to_change(decide(rollout(known, **LENIENT), seen, NOW)) == {"p1"}


def test_a_container_that_starts_again_once_while_it_prepares_is_not_led_into_the_new_version() -> (
    None
):
    once = pod(0, ready=False, gate=False, restarts=1, last_run_seconds=30.0)
    seen = world([once], [state("n0", [engine(0, "", phase="Booting")], {"p0": order("p0", OLD)})])
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert told(decision).get("p0", OLD) == OLD
    assert status_of(decision).pods.failed == 0


def test_what_ends_on_a_version_that_never_was_complete_boots_into_the_target_at_once() -> None:
    between = order("p0", OTHER)
    seen = world([looping(0, 1)], [state("n0", [engine(0, "", phase="Booting")], {"p0": between})])
    assert told(decide(rollout(AT_NEW), seen, NOW))["p0"] == NEW


@pytest.mark.parametrize("held", [True, False])
def test_what_is_held_back_is_not_booted_into_though_it_is_all_that_is_here(held: bool) -> None:
    fetching = [
        StagedVersion(digest=OLD, phase="Fetching"),
        StagedVersion(digest=NEW, phase="Staged"),
    ]
    once = pod(0, ready=False, gate=False, restarts=1, last_run_seconds=30.0)
    seen = world(
        [once],
        [state("n0", [engine(0, "", phase="Booting")], {"p0": order("p0", OLD)}, staged=fetching)],
    )
    assert told(decide(rollout(AT_NEW, paused=held), seen, NOW)).get("p0", OLD) == (
        OLD if held else NEW
    )


def test_a_pod_goes_back_to_what_it_holds_rather_than_wait_for_what_it_does_not() -> None:
    fetching = [
        StagedVersion(digest=OLD, phase="Staged"),
        StagedVersion(digest=NEW, phase="Fetching"),
    ]
    restarted = pod(0, ready=False, gate=False, restarts=1, last_run_seconds=7200.0)
    told_old = order("p0", OLD, prepare="", revision=1)
    seen = world(
        [restarted],
        [state("n0", [engine(0, "", phase="Booting")], {"p0": told_old}, staged=fetching)],
    )
    assert told(decide(rollout(AT_NEW), seen, NOW))["p0"] == OLD


def test_what_loops_by_itself_is_not_asked_to_prepare_until_it_is_calm_and_nobody_waits_for_it() -> (
    None
):
    young = pod(0, restarts=3, last_run_seconds=20.0, engine_started_at=NOW - timedelta(seconds=60))
    idle = order("p0", OLD, prepare="", revision=1, restarts=3)
    engines = [engine(0, confirmed_at="2026-01-01T11:59:30Z"), *prepared(2)[1:]]
    seen = world(
        [young, pod(1)], [state("n0", engines, {"p0": idle, "p1": OLD})], clock=lambda: NOW
    )
    running = rollout(AT_NEW)
    decision = decide(running, seen, NOW + timedelta(seconds=20))
    assert (asked_to_prepare(decision), told_to_change(decision)) == (set(), {"p1"})
    assert decision.again_in_seconds == pytest.approx(40.0)
    assert "1 restarted" in status_of(decision).message
    assert "p0" in asked_to_prepare(decide(running, seen, NOW + timedelta(seconds=60)))


def test_that_a_container_restarted_once_is_forgotten_when_it_has_lived_for_a_minute() -> None:
    """Whatever the pod shows meanwhile: the commit before took its label away and gave it another
    one.
    """
    clock = [NOW - timedelta(seconds=70)]
    once = pod(
        0,
        shows="",
        restarts=1,
        last_run_seconds=97.0,
        engine_started_at=NOW - timedelta(seconds=80),
    )
    alive = engine(0, confirmed_at="2026-01-01T11:59:00Z")
    idle = order("p0", OLD, prepare="", revision=1, restarts=1)
    seen = world([once], [state("n0", [alive], {"p0": idle})], clock=lambda: clock[0])
    clock[0] = NOW - timedelta(seconds=1)
    seen.put("pod", "p0", replace(once, labels=pod(0).labels))
    assert asked_to_prepare(decide(rollout(AT_NEW), seen, NOW)) == {"p0"}


def test_what_ends_while_it_prepares_the_stable_version_is_not_blamed_on_that() -> None:
    back = rollout(BACK, versionRef={"name": "old"})
    asked = order("p0", NEW, prepare=OLD, revision=3)
    seen = world([looping(0, 2)], [state("n0", [engine(0, "", phase="Booting")], {"p0": asked})])
    decision = decide(back, seen, NOW)
    assert (status_of(decision).pods.failed, told(decision)["p0"]) == (0, OLD)


@pytest.mark.parametrize("spec", [{}, {"paused": True}])
def test_what_loops_on_a_version_that_never_was_stable_gets_what_is(spec: Fields) -> None:
    between = order("p0", OTHER, prepare="", revision=1)
    seen = world([looping(0, 3)], [state("n0", [engine(0, "", phase="Booting")], {"p0": between})])
    assert told(decide(rollout(AT_NEW, **spec), seen, NOW))["p0"] == (OLD if spec else NEW)


def test_a_pod_that_may_keep_what_it_serves_is_told_what_that_is() -> None:
    """Its commit succeeded a moment before it was set back; else it would be asked to prepare what
    it serves, for ever.
    """
    keeps = order("p0", "", prepare="")
    seen = world(
        [pod(0, shows=NEW), pod(1)],
        [state("n0", [engine(0, NEW), engine(1)], {"p0": keeps, "p1": OLD})],
    )
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert (told(decision)["p0"], asked_to_prepare(decision)) == (NEW, {"p1"})
