"""The unhappy path: whatever failed, went away or was taken back, a good version reaches every pod that can take it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from hotweights_crds.conditions import find
from hotweights_crds.nodeweights import PodAssignment, StagedVersion
from hotweights_crds.weightrollout import VersionStatus, WeightRolloutStatus
from hotweights_operator import revision
from hotweights_operator.actions import RolloutDecision
from hotweights_operator.decide import decide
from hotweights_operator.model import Pod, Refusal, Rollout
from hotweights_operator.observed import Observed
from tests.operator.worlds import (
    AT_NEW,
    DONE,
    NEW,
    NOW,
    OLD,
    OTHER,
    Fields,
    asked_to_prepare,
    engine,
    gave_up,
    order,
    orders,
    pod,
    prepared,
    rollout,
    state,
    told,
    told_to_change,
    version,
    world,
)

LENIENT = {"failurePolicy": {"maxFailed": 1}}
BACK: Fields = {
    "revision": 3,
    "target": {"name": "old", "version": "old", "digest": OLD},
    "stable": {"name": "old", "version": "old", "digest": OLD},
    "lastProgressAt": "2026-01-01T11:59:00Z",
}
"""The status of a rollback to the old version."""


def status_of(decision: RolloutDecision) -> WeightRolloutStatus:
    """The status; every decision about a rollout has one."""
    if decision.status is None:
        raise LookupError("a decision without a status")
    return decision.status


def next_pass(known: Rollout, decision: RolloutDecision) -> Rollout:
    """The rollout when the status was written."""
    return replace(known, status=status_of(decision))


# -- failures belong to the version and the revision (F1) ----------------------------------------------------------------


@pytest.mark.parametrize("spec", [{}, LENIENT, {"paused": True}, {"failurePolicy": {"action": "Abort"}}])
def test_a_pod_that_gave_up_its_order_is_told_what_it_serves_whatever_holds(spec: Fields) -> None:
    failed = engine(0, OLD, phase="Failed", failed=gave_up())
    seen = world([pod(0, gate=False, ready=False)], [state("n0", [failed], {"p0": NEW})])
    given = orders(decide(rollout(AT_NEW, **spec), seen, NOW))["p0"]
    assert (given.digest, given.token, given.prepare) == (OLD, 2, "")


def test_a_failure_of_the_version_before_is_not_charged_to_the_one_gone_back_to() -> None:
    failed = engine(0, OLD, phase="Failed", failed=gave_up())
    seen = world([pod(0, ready=False, gate=False)], [state("n0", [failed], {"p0": NEW})])
    back = rollout(BACK, versionRef={"name": "old"})
    decision = decide(back, seen, NOW)
    assert told(decision)["p0"] == OLD
    assert status_of(decision).pods.failed == 0
    assert status_of(decision).phase != "Stalled"


def test_what_failed_in_an_earlier_revision_is_tried_again_in_this_one() -> None:
    failed = engine(0, OLD, failed=gave_up(revision=1))
    seen = world([pod(0)], [state("n0", [failed], {"p0": order("p0", OLD, prepare="", revision=1)})])
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert status_of(decision).pods.failed == 0
    assert asked_to_prepare(decision) == {"p0"}


def test_a_commit_that_goes_on_while_one_goes_back_is_let_end_and_then_led_back() -> None:
    back = rollout(BACK, versionRef={"name": "old"})
    committing = engine(0, "", phase="Committing")
    seen = world([pod(0, ready=False, gate=False)], [state("n0", [committing], {"p0": NEW})])
    assert told(decide(back, seen, NOW)).get("p0", NEW) == NEW
    ended = engine(0, NEW)
    seen = world([pod(0, shows=NEW)], [state("n0", [ended], {"p0": NEW})])
    assert orders(decide(back, seen, NOW))["p0"].prepare == OLD


def test_an_order_that_nobody_wants_any_more_is_taken_back_before_it_begins() -> None:
    back = rollout(BACK, versionRef={"name": "old"})
    about_to = engine(0, OLD, phase="Prepared", prepared=NEW)
    seen = world([pod(0, ready=False, gate=False)], [state("n0", [about_to], {"p0": NEW})])
    assert told(decide(back, seen, NOW))["p0"] == OLD


def test_a_failed_pod_does_not_hold_the_others_and_is_not_tried_again_in_this_revision() -> None:
    failed = engine(0, OLD, failed=gave_up())
    engines = [failed, *prepared(2)[1:]]
    seen = world([pod(0), pod(1)], [state("n0", engines, {"p0": order("p0", OLD, prepare=""), "p1": OLD})])
    running = rollout(AT_NEW, **LENIENT)
    decision = decide(running, seen, NOW)
    assert (told_to_change(decision), asked_to_prepare(decision)) == ({"p1"}, set())
    # Its engine starts anew and has forgotten; the status has not.
    forgot = [engine(0, OLD), *prepared(2)[1:]]
    later = world([pod(0), pod(1)], [state("n0", forgot, {"p0": order("p0", OLD, prepare=""), "p1": OLD})])
    again = decide(next_pass(running, decision), later, NOW)
    assert status_of(again).pods.failed == 1
    assert "p0" not in asked_to_prepare(again) | told_to_change(again)


def test_a_new_pod_of_the_same_name_has_failed_nothing() -> None:
    known = {**AT_NEW, "failures": [{"pod": "p0", "podUID": "an-earlier-p0", "reason": "ProbeMismatch"}]}
    seen = world([pod(0)], [state("n0", prepared(1), {"p0": OLD})])
    decision = decide(rollout(known), seen, NOW)
    assert (status_of(decision).pods.failed, told_to_change(decision)) == (0, {"p0"})


def test_a_dirty_engine_is_repaired_with_what_is_stable() -> None:
    dirty = engine(0, "", phase="Dirty", failed=gave_up())
    seen = world([pod(0, ready=False, gate=False)], [state("n0", [dirty], {"p0": NEW})])
    assert told(decide(rollout(AT_NEW), seen, NOW))["p0"] == OLD


# -- given up stays given up (F2) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["Pause", "Abort"])
def test_given_up_stays_given_up_when_the_evidence_is_gone(action: str) -> None:
    failed = engine(0, OLD, phase="Failed", failed=gave_up())
    running = rollout(AT_NEW, failurePolicy={"action": action})
    first = decide(
        running,
        world([pod(0), pod(1)], [state("n0", [failed, *prepared(2)[1:]], {"p0": NEW, "p1": OLD})]),
        NOW,
    )
    well = world([pod(0), pod(1)], [state("n0", prepared(2), {"p0": OLD, "p1": OLD})])
    again = decide(next_pass(running, first), well, NOW)
    assert (told_to_change(again), asked_to_prepare(again)) == (set(), set())
    assert status_of(again).most_failed == 1
    assert "ProbeMismatch" in status_of(again).message


def test_an_edit_of_something_else_does_not_resume_what_was_paused_for_its_failures() -> None:
    held = rollout({**AT_NEW, "mostFailed": 1})
    seen = world([pod(0)], [state("n0", prepared(1), {"p0": OLD})])
    for edited in (held, replace(held, generation=9), rollout(held.status.to_dict(), progressDeadlineSeconds=60)):
        assert told_to_change(decide(edited, seen, NOW)) == set()
    assert told_to_change(decide(rollout(held.status.to_dict(), **LENIENT), seen, NOW)) == {"p0"}


@pytest.mark.parametrize("status", [{**AT_NEW, "mostFailed": 1}, {**AT_NEW, "abortedRevision": 2}])
def test_a_retry_is_a_revision_of_its_own_and_asked_for_once(status: Fields) -> None:
    seen = world([pod(0)], [state("n0", prepared(1, failed=gave_up()), {"p0": OLD})])
    asked = replace(rollout(status), retry="once")
    decision = decide(asked, seen, NOW)
    assert (status_of(decision).revision, status_of(decision).retried, status_of(decision).most_failed) == (
        3,
        "once",
        0,
    )
    assert orders(decision)["p0"].revision == 3
    assert status_of(decide(next_pass(asked, decision), seen, NOW)).revision == 3


def test_a_retry_of_what_is_complete_is_none() -> None:
    done = {**AT_NEW, "history": [{"revision": 2, "version": "new", "outcome": "Complete"}]}
    seen = world([pod(0, shows=NEW)], [state("n0", [engine(0, NEW)], {"p0": NEW})])
    status = status_of(decide(replace(rollout(done), retry="x"), seen, NOW))
    assert (status.revision, status.retried) == (2, "x")


def test_a_complete_revision_is_not_given_up_for_a_pod_that_dies_later() -> None:
    done = {**AT_NEW, "history": [{"revision": 2, "version": "new", "outcome": "Complete"}]}
    done |= {"stable": AT_NEW["target"]}
    broken = pod(1, ready=False, gate=False, shows="", restarts=5, last_run_seconds=5.0)
    engines = [engine(0, NEW), engine(1, "", phase="Booting")]
    seen = world([pod(0, shows=NEW), broken], [state("n0", engines, {"p0": NEW, "p1": order("p1", NEW, prepare="")})])
    status = status_of(decide(rollout(done, failurePolicy={"action": "Abort"}), seen, NOW))
    assert (status.phase, status.aborted_revision) == ("Stalled", 0)
    stalled = find(status.conditions, "Stalled")
    assert stalled is not None
    assert stalled.reason == "CrashLooping"


# -- stable and held (F3) ------------------------------------------------------------------------------------------------


def test_what_never_was_complete_is_never_stable_and_never_previous() -> None:
    new, old, other = version("new", NEW), version("old", OLD), version("other", OTHER)
    at_new = rollout(AT_NEW)
    back = revision.revised(at_new, old, NOW)
    assert (back.target.digest, back.stable.digest, back.previous.digest) == (OLD, OLD, "")
    assert [v.digest for v in back.held] == [NEW]
    further = revision.revised(replace(at_new, status=back), other, NOW)
    assert (further.target.digest, further.stable.digest, further.previous.digest) == (OTHER, OLD, OLD)
    assert [v.digest for v in revision.kept(further)] == [OTHER, OLD]
    forth = revision.revised(replace(at_new, status=back), new, NOW)
    assert (forth.target.digest, forth.stable.digest) == (NEW, OLD)


def test_what_was_complete_is_kept_for_the_way_back() -> None:
    done = revision.completed(rollout(AT_NEW).status, NOW)
    assert (done.stable.digest, done.previous.digest) == (NEW, OLD)
    assert [v.digest for v in revision.kept(done)] == [NEW, OLD]
    assert revision.completed(done, NOW) == done


def test_setting_a_complete_version_back_keeps_it_staged() -> None:
    done = {**AT_NEW, "history": [{"revision": 2, "version": "new", "outcome": "Complete"}], "stable": AT_NEW["target"]}
    back = rollout(done, versionRef={"name": "old"})
    seen = world([pod(0, shows=NEW)], [state("n0", [engine(0, NEW)], {"p0": NEW})])
    status = status_of(decide(back, seen, NOW))
    assert (status.revision, status.target.digest, status.previous.digest) == (3, OLD, NEW)
    assert (status.stable.digest, status.history[0].outcome) == (NEW, "Complete")


def test_a_status_of_an_earlier_release_tells_what_is_stable() -> None:
    before = {k: v for k, v in AT_NEW.items() if k != "stable"}
    assert revision.stable(rollout(before).status) == VersionStatus(name="old", version="old", digest=OLD)
    done = {**before, "history": [{"revision": 2, "version": "new", "outcome": "Complete"}]}
    assert revision.stable(rollout(done).status).digest == NEW


def test_new_pods_get_what_is_stable_while_a_rollback_is_paused() -> None:
    back = rollout(
        {**BACK, "stable": {"digest": OLD}, "held": [{"digest": NEW}]}, paused=True, versionRef={"name": "old"}
    )
    fresh = pod(1, ready=False, was_ready=False, gate=False)
    assert told(decide(back, world([fresh], [state("n0", [], {"p0": NEW})]), NOW))["p1"] == OLD


# -- crash loops and refusals at boot (F4) -------------------------------------------------------------------------------


def looping(number: int, restarts: int, **more: Any) -> Pod:
    """A pod whose container ends soon after it starts."""
    return pod(number, ready=False, gate=False, shows="", restarts=restarts, last_run_seconds=5.0, **more)


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
    seen = world([often], [state("n0", [engine(0, "", phase="Booting")], {"p0": order("p0", NEW, prepare="")})])
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert status_of(decision).pods.failed == 0
    assert told(decision).get("p0", NEW) == NEW


def test_a_version_refused_at_boot_makes_room_for_the_stable_one() -> None:
    refused = engine(
        0, "", phase="Refused", confirmed_at="", failed=gave_up(step="Prepare", booting=True, reason="ShapeMismatch")
    )
    fresh = pod(0, ready=False, was_ready=False, gate=False)
    seen = world([fresh], [state("n0", [refused], {"p0": order("p0", NEW, prepare="")})])
    decision = decide(rollout(AT_NEW, **LENIENT), seen, NOW)
    assert told(decision)["p0"] == OLD
    assert [f.reason for f in status_of(decision).failures] == ["ShapeMismatch"]


def test_a_looping_pod_holds_up_nobody() -> None:
    engines = [engine(0, "", phase="Booting"), *prepared(4)[1:]]
    orders_: dict[str, str | PodAssignment] = {"p0": order("p0", OLD, prepare=""), **{f"p{n}": OLD for n in (1, 2, 3)}}
    known = {**AT_NEW, "failures": [{"pod": "p0", "podUID": "p0", "reason": "CrashLooping"}], "preparedRevision": 2}
    seen = world([looping(0, 3), *(pod(n) for n in (1, 2, 3))], [state("n0", engines, orders_)])
    assert told_to_change(decide(rollout(known, **LENIENT), seen, NOW)) == {"p1"}


def test_a_container_that_starts_again_once_while_it_prepares_is_not_led_into_the_new_version() -> None:
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
    fetching = [StagedVersion(digest=OLD, phase="Fetching"), StagedVersion(digest=NEW, phase="Staged")]
    once = pod(0, ready=False, gate=False, restarts=1, last_run_seconds=30.0)
    seen = world([once], [state("n0", [engine(0, "", phase="Booting")], {"p0": order("p0", OLD)}, staged=fetching)])
    assert told(decide(rollout(AT_NEW, paused=held), seen, NOW)).get("p0", OLD) == (OLD if held else NEW)


def test_a_pod_goes_back_to_what_it_holds_rather_than_wait_for_what_it_does_not() -> None:
    fetching = [StagedVersion(digest=OLD, phase="Staged"), StagedVersion(digest=NEW, phase="Fetching")]
    restarted = pod(0, ready=False, gate=False, restarts=1, last_run_seconds=7200.0)
    told_old = order("p0", OLD, prepare="", revision=1)
    seen = world([restarted], [state("n0", [engine(0, "", phase="Booting")], {"p0": told_old}, staged=fetching)])
    assert told(decide(rollout(AT_NEW), seen, NOW))["p0"] == OLD


def test_what_loops_by_itself_is_not_asked_to_prepare_until_it_is_calm_and_nobody_waits_for_it() -> None:
    young = pod(0, restarts=3, last_run_seconds=20.0, engine_started_at=NOW - timedelta(seconds=60))
    idle = order("p0", OLD, prepare="", revision=1, restarts=3)
    engines = [engine(0, confirmed_at="2026-01-01T11:59:30Z"), *prepared(2)[1:]]
    seen = world([young, pod(1)], [state("n0", engines, {"p0": idle, "p1": OLD})], clock=lambda: NOW)
    running = rollout(AT_NEW)
    decision = decide(running, seen, NOW + timedelta(seconds=20))
    assert (asked_to_prepare(decision), told_to_change(decision)) == (set(), {"p1"})
    assert decision.again_in_seconds == pytest.approx(40.0)
    assert "1 restarted" in status_of(decision).message
    assert "p0" in asked_to_prepare(decide(running, seen, NOW + timedelta(seconds=60)))


def test_that_a_container_restarted_once_is_forgotten_when_it_has_lived_for_a_minute() -> None:
    """Whatever the pod shows meanwhile: the commit before took its label away and gave it another one."""
    clock = [NOW - timedelta(seconds=70)]
    once = pod(0, shows="", restarts=1, last_run_seconds=97.0, engine_started_at=NOW - timedelta(seconds=80))
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
    """Its commit succeeded a moment before it was set back; else it would be asked to prepare what it serves, for ever."""
    keeps = order("p0", "", prepare="")
    seen = world([pod(0, shows=NEW), pod(1)], [state("n0", [engine(0, NEW), engine(1)], {"p0": keeps, "p1": OLD})])
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert (told(decision)["p0"], asked_to_prepare(decision)) == (NEW, {"p1"})


# -- preparing has a budget, and the gate is passed once (F5, F6) --------------------------------------------------------


def test_engines_prepare_in_waves_that_grow_with_what_went_well() -> None:
    pods = [pod(n) for n in range(8)]
    idle = {f"p{n}": order(f"p{n}", OLD, prepare="") for n in range(8)}

    def asked(ready: int) -> int:
        engines = [*prepared(ready), *(engine(n) for n in range(ready, 8))]
        given = {**idle, **{f"p{n}": order(f"p{n}", OLD) for n in range(ready)}}
        decision = decide(rollout(AT_NEW), world(pods, [state("n0", engines, given)]), NOW)
        return len(asked_to_prepare(decision)) - ready

    assert [asked(ready) for ready in (0, 1, 2, 4)] == [1, 1, 2, 4]


def test_back_to_what_is_stable_all_prepare_at_once_and_nobody_waits_for_the_others() -> None:
    back = rollout(BACK, versionRef={"name": "old"})
    pods = [pod(n, shows=NEW) for n in range(4)]
    engines = [engine(0, NEW, phase="Prepared", prepared=OLD), *(engine(n, NEW) for n in (1, 2, 3))]
    given = {f"p{n}": order(f"p{n}", NEW, prepare="") for n in range(4)}
    decision = decide(back, world(pods, [state("n0", engines, given)]), NOW)
    assert told_to_change(decision, OLD) == {"p0"}
    assert asked_to_prepare(decision, OLD) == {"p1", "p2", "p3"}


@pytest.mark.parametrize(("goes_to", "at_once"), [("old", True), ("another", False)])
def test_back_to_what_was_complete_before_all_prepare_at_once_too(goes_to: str, at_once: bool) -> None:
    """The new version is complete: going back to the one before it is a way back, though that is not what is stable."""
    versions = [version("old", OLD), version("new", NEW), version("another", OTHER)]
    digest = {"old": OLD, "another": OTHER}[goes_to]
    pods = [pod(n, shows=NEW) for n in range(3)]
    engines = [engine(n, NEW) for n in range(3)]
    given = {f"p{n}": order(f"p{n}", NEW, prepare="") for n in range(3)}
    back = rollout(DONE, versionRef={"name": goes_to})
    seen = world(pods, [state("n0", engines, given, listed=(OLD, NEW, OTHER))], versions=versions)
    decision = decide(back, seen, NOW)
    assert asked_to_prepare(decision, digest) == ({"p0", "p1", "p2"} if at_once else {"p0"})
    assert status_of(decision).goes_back is at_once
    going = replace(back, status=status_of(decision))
    ready = [engine(0, NEW, phase="Prepared", prepared=digest), *engines[1:]]
    asked = {f"p{n}": order(f"p{n}", NEW, prepare=digest, revision=3) for n in range(3)}
    seen = world(pods, [state("n0", ready, asked, listed=(OLD, NEW, OTHER))], versions=versions)
    assert told_to_change(decide(going, seen, NOW), digest) == ({"p0"} if at_once else set())


def test_a_pause_withdraws_what_is_not_prepared_yet() -> None:
    engines = [*prepared(1), engine(1, phase="Preparing")]
    seen = world([pod(0), pod(1)], [state("n0", engines, {"p0": OLD, "p1": OLD})])
    assert asked_to_prepare(decide(rollout(AT_NEW, paused=True), seen, NOW)) == {"p0"}


@pytest.mark.parametrize(("restarts", "oom", "reason"), [(2, False, "CrashedPreparing"), (2, True, "OutOfMemory")])
def test_an_engine_that_dies_of_preparing_has_failed(restarts: int, oom: bool, reason: str) -> None:
    dead = pod(0, ready=False, gate=False, restarts=restarts, last_run_seconds=20.0, oom_killed=oom)
    seen = world([dead, pod(1)], [state("n0", [engine(0, "", phase="Booting"), engine(1)], {"p0": OLD, "p1": OLD})])
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert [f.reason for f in status_of(decision).failures] == [reason]
    assert asked_to_prepare(decision) == set()
    assert told(decision)["p0"] == OLD


def test_a_pod_that_ended_while_it_prepared_is_left_alone_until_it_is_calm_and_the_end_is_remembered() -> None:
    once = pod(0, ready=False, gate=False, restarts=1, last_run_seconds=20.0, engine_started_at=NOW)
    idle = order("p1", OLD, prepare="")
    seen = world(
        [once, pod(1)],
        [state("n0", [engine(0, "", phase="Booting"), engine(1)], {"p0": OLD, "p1": idle})],
        clock=lambda: NOW,
    )
    decision = decide(rollout(AT_NEW), seen, NOW)
    left = orders(decision)["p0"]
    assert (left.digest, left.prepare, left.ended_preparing, left.restarts) == (OLD, "", 1, 1)
    assert (asked_to_prepare(decision), status_of(decision).pods.failed) == ({"p1"}, 0)
    # It serves again: asked when it is calm, and not before.
    serving = engine(0, confirmed_at="2026-01-01T12:00:10Z")
    given = {"p0": left, "p1": order("p1", OLD)}
    calm = replace(once, ready=True, gate=True, labels=pod(0).labels)
    seen = world([calm, pod(1)], [state("n0", [serving, *prepared(2)[1:]], given)], clock=lambda: NOW)
    assert "p0" not in asked_to_prepare(decide(rollout(AT_NEW), seen, NOW + timedelta(seconds=59)))
    again = orders(decide(rollout(AT_NEW), seen, NOW + timedelta(seconds=60)))["p0"]
    assert (again.prepare, again.ended_preparing) == (NEW, 1)
    # The second end speaks against the version, and goes on to do so without the status' memory.
    seen = world([replace(once, restarts=2)], [state("n0", [engine(0, "", phase="Booting")], {"p0": again})])
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert [f.reason for f in status_of(decision).failures] == ["CrashedPreparing"]
    assert (told(decision)["p0"], orders(decision)["p0"].ended_preparing) == (OLD, 2)
    # In another revision it says nothing.
    later = rollout({**AT_NEW, "revision": 3})
    assert status_of(decide(later, seen, NOW)).pods.failed == 0
    assert orders(decide(later, seen, NOW))["p0"].ended_preparing == 0


def test_a_pod_that_ends_again_unasked_ends_by_itself_and_boots_into_the_target() -> None:
    left = order("p0", OLD, prepare="", ended_preparing=1, restarts=1)
    seen = world([looping(0, 2)], [state("n0", [engine(0, "", phase="Booting")], {"p0": left})])
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert (told(decision)["p0"], status_of(decision).pods.failed) == (NEW, 0)


def test_the_gate_is_passed_once() -> None:
    engines = [engine(0, NEW), *prepared(3)[1:2], engine(2)]
    given = {"p0": NEW, "p1": OLD, "p2": OLD}
    pods = [pod(0, shows=NEW), pod(1), pod(2)]
    before = decide(rollout(AT_NEW), world(pods, [state("n0", engines, given)]), NOW)
    assert told_to_change(before) == set()
    after = decide(rollout({**AT_NEW, "preparedRevision": 2}), world(pods, [state("n0", engines, given)]), NOW)
    assert told_to_change(after) == {"p1"}


def test_that_the_gate_was_passed_is_remembered_with_the_first_change() -> None:
    seen = world([pod(0)], [state("n0", prepared(1), {"p0": OLD})])
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert (told_to_change(decision), status_of(decision).prepared_revision) == ({"p0"}, 2)


def test_only_engines_that_are_there_are_asked_to_prepare() -> None:
    pods = [pod(0), pod(1, "n1")]
    states = [state(f"n{n}", [engine(n)], {f"p{n}": order(f"p{n}", OLD, prepare="")}) for n in (0, 1)]
    seen = world(pods, states, agents={"n0": False, "n1": True})
    assert asked_to_prepare(decide(rollout(AT_NEW), seen, NOW)) == {"p1"}


def test_nobody_waits_for_a_pod_that_cannot_be_told_anything() -> None:
    states = [state("n0", prepared(1), {"p0": OLD}), state("n1", [engine(1)], {"p1": order("p1", OLD, prepare="")})]
    seen = world([pod(0), pod(1, "n1")], states)
    assert told_to_change(decide(rollout(AT_NEW), seen, NOW)) == set()
    seen.refusals["r", "n1"] = Refusal("Invalid", "too many items")
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert told_to_change(decision) == {"p0"}
    assert [(f.node, f.reason) for f in status_of(decision).failures] == [("n1", "WriteRefused")]


def test_a_node_that_refuses_takes_nobody_s_turn() -> None:
    idle = {n: order(f"p{n}", OLD, prepare="") for n in (0, 1)}
    states = [state(f"n{n}", [engine(n)], {f"p{n}": idle[n]}) for n in (0, 1)]
    seen = world([pod(0), pod(1, "n1")], states)
    assert asked_to_prepare(decide(rollout(AT_NEW), seen, NOW)) == {"p0"}
    seen.refusals["r", "n0"] = Refusal("Invalid", "too many items")
    assert asked_to_prepare(decide(rollout(AT_NEW), seen, NOW)) == {"p1"}
    seen.refusals["r", "n0"] = Refusal("Invalid", "too many items", is_due=True)
    assert asked_to_prepare(decide(rollout(AT_NEW), seen, NOW)) == {"p0"}


def test_a_pod_that_is_ready_does_not_boot_though_its_agent_is_away() -> None:
    once = pod(0, restarts=1, last_run_seconds=9.0)
    states = [state("n0", [engine(0)], {"p0": order("p0", OLD, prepare="", revision=1)})]
    seen = world([once], states, agents={"n0": False})
    for spec in ({}, {"paused": True}):
        assert told(decide(rollout(AT_NEW, **spec), seen, NOW)).get("p0", OLD) == OLD


# -- a budget in the truth (F12, F13) ------------------------------------------------------------------------------------


def changed(number: int, **more: Any) -> Pod:
    """A pod whose engine has just confirmed the new version."""
    return pod(number, **{"shows": NEW, **more})


MOMENT = datetime(2026, 1, 1, 11, 59, 58, tzinfo=UTC)


@pytest.mark.parametrize(
    ("shown", "goes_on"),
    [
        ({"shows": OLD}, False),  # the engine's word came before the pod's
        ({"gate": False}, False),
        ({"gate": False, "told": ""}, False),
        ({"told": "", "phase": "Dirty"}, False),
        ({"phase": "Committing"}, False),
        ({"ready": False}, False),
        (
            {"gate_since": MOMENT, "ready_since": MOMENT - timedelta(hours=1)},
            False,
        ),  # the kubelet has yet to see the gate
        ({"gate_since": MOMENT, "ready_since": MOMENT}, False),  # by a clock that may have been changed in between
        ({}, True),
    ],
)
def test_the_next_pod_waits_until_the_pod_object_shows_that_the_last_one_is_of_service(
    shown: Fields, goes_on: bool
) -> None:
    shown = dict(shown)
    engines = [engine(0, NEW, phase=shown.pop("phase", "Serving")), *prepared(2)[1:]]
    given: dict[str, str | PodAssignment] = {"p0": shown.pop("told", NEW), "p1": OLD}
    seen = world(
        [changed(0, **shown), pod(1)],
        [state("n0", engines, given)],
        clock=lambda: NOW,
    )
    decision = decide(rollout({**AT_NEW, "preparedRevision": 2}), seen, NOW)
    assert (told_to_change(decision) == {"p1"}) is goes_on
    assert goes_on or not shown.get("gate_since") or decision.again_in_seconds == pytest.approx(2.0)


def test_a_pod_that_was_seen_to_become_ready_with_its_gate_is_waited_for_no_more() -> None:
    engines = [engine(0, NEW), *prepared(2)[1:]]
    shown: Fields = {"gate_since": MOMENT, "ready_since": MOMENT - timedelta(hours=1)}
    seen = world(
        [changed(0, ready=False, **shown), pod(1)],
        [state("n0", engines, {"p0": NEW, "p1": OLD})],
        clock=lambda: NOW,
    )
    running = rollout({**AT_NEW, "preparedRevision": 2})
    assert told_to_change(decide(running, seen, NOW)) == set()
    seen.put("pod", "p0", changed(0, **shown))
    assert told_to_change(decide(running, seen, NOW)) == {"p1"}
    seen.put("pod", "p0", changed(0, gate=False, ready=False, **shown))
    seen.put(
        "pod", "p0", changed(0, gate_since=NOW)
    )  # another gate, and the kubelet's word may still be of the one before
    assert told_to_change(decide(running, seen, NOW)) == set()


def test_a_pod_must_be_ready_for_as_long_as_the_spec_says() -> None:
    engines = [engine(0, NEW), *prepared(2)[1:]]
    since = NOW - timedelta(seconds=20)
    pods = [changed(0, gate_since=since, ready_since=since), pod(1, ready_since=NOW - timedelta(hours=1))]
    seen = world(pods, [state("n0", engines, {"p0": NEW, "p1": OLD})], clock=lambda: since)
    slow = rollout({**AT_NEW, "preparedRevision": 2}, minReadySeconds=30)
    assert told_to_change(decide(slow, seen, NOW)) == set()
    assert decide(slow, seen, NOW).again_in_seconds == pytest.approx(10.0)
    assert told_to_change(decide(slow, seen, NOW + timedelta(seconds=10))) == {"p1"}
    # The kubelet never saw the gate False: Ready is as old as ever.
    pods = [changed(0, gate_since=since, ready_since=NOW - timedelta(hours=1)), pod(1)]
    seen = world(pods, [state("n0", engines, {"p0": NEW, "p1": OLD})], clock=lambda: since)
    assert told_to_change(decide(slow, seen, NOW)) == set()


def test_pods_that_are_being_replaced_count_as_a_deployment_counts_them() -> None:
    going = [pod(n, terminating=True) for n in (0, 1, 2)]
    coming = [pod(n, ready=False, was_ready=False, gate=False, shows="") for n in (3, 4, 5)]
    serving = [pod(n) for n in (6, 7, 8)]
    engines = [engine(n, phase="Prepared", prepared=NEW) for n in (6, 7, 8)]
    given = {f"p{n}": OLD for n in (0, 1, 2, 6, 7, 8)}
    seen = world([*going, *coming, *serving], [state("n0", engines, given)], clock=lambda: NOW)
    running = rollout({**AT_NEW, "preparedRevision": 2})
    assert told_to_change(decide(running, seen, NOW)) & {"p6", "p7", "p8"} == set()


def test_the_last_pod_that_serves_is_not_switched_unless_all_may_go_at_once() -> None:
    pods = [pod(0), *(pod(n, ready=False, gate=False) for n in (1, 2))]
    seen = world(pods, [state("n0", prepared(1), {f"p{n}": OLD for n in range(3)})], clock=lambda: NOW)
    running = {**AT_NEW, "preparedRevision": 2}
    wide = {"type": "Rolling", "rolling": {"maxUnavailable": 2}}
    assert told_to_change(decide(rollout(running, strategy=wide), seen, NOW)) == set()
    assert told_to_change(decide(rollout(running, strategy={"type": "AllAtOnce"}), seen, NOW)) == {"p0"}


def test_a_pod_that_is_of_no_service_for_five_minutes_is_named_and_left_out() -> None:
    dead = pod(1, ready=False, gate=False)
    given: dict[str, str | PodAssignment] = {"p0": OLD, "p1": order("p1", NEW, prepare="")}
    seen = world([pod(0), dead], [state("n0", prepared(1), given)], clock=lambda: NOW)
    running = rollout({**AT_NEW, "preparedRevision": 2})
    first = decide(running, seen, NOW + timedelta(seconds=299))
    assert told_to_change(first) == set()
    assert first.again_in_seconds is not None
    assert first.again_in_seconds <= 1.1
    assert told_to_change(decide(running, seen, NOW + timedelta(seconds=300))) == {"p0"}


def test_a_pod_that_runs_no_engine_of_ours_is_left_out_after_a_minute() -> None:
    stranger = pod(1, ready=False, was_ready=False, gate=False)
    given: dict[str, str | PodAssignment] = {"p0": OLD, "p1": order("p1", NEW, prepare="")}
    running = rollout({**AT_NEW, "preparedRevision": 2})
    seen = world([pod(0), stranger], [state("n0", prepared(1), given)], clock=lambda: NOW)
    assert told_to_change(decide(running, seen, NOW + timedelta(seconds=59))) == set()
    assert told_to_change(decide(running, seen, NOW + timedelta(seconds=60))) == {"p0"}
    starts = [*prepared(1), engine(1, "", phase="Booting", confirmed_at="")]
    seen.put("state", "n0", state("n0", starts, given))
    assert told_to_change(decide(running, seen, NOW + timedelta(seconds=60))) == set()
    seen.put("state", "n0", state("n0", [*prepared(1), engine(1, "", phase="Disconnected")], given))
    assert told_to_change(decide(running, seen, NOW + timedelta(seconds=60))) == set(), "it was heard of"
    seen = world([stranger], [state("n0", starts, given)], clock=lambda: NOW)
    seen.put("pod", "p0", pod(0))
    assert told_to_change(decide(running, seen, NOW + timedelta(seconds=60))) == set()


# -- deadlines, clocks, ends (F15 and others) ----------------------------------------------------------------------------


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
    stalled = find(status_of(decide(running, seen, NOW + timedelta(seconds=600))).conditions, "Stalled")
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
    seen = world([pod(0, shows=NEW, engine_started_at=later)], [state("n0", [engine(0, NEW)], {"p0": NEW})])
    failure = status_of(decide(rollout(AT_NEW), seen, NOW)).failures[0]
    assert (failure.reason, "clock of node n0" in failure.message) == ("ClockSetBack", True)


def test_what_an_earlier_life_confirmed_proves_nothing_though_the_clock_was_set_back() -> None:
    seen = world([pod(0, shows=NEW)], [state("n0", [engine(0, NEW)], {"p0": NEW})])
    assert status_of(decide(rollout(AT_NEW), seen, NOW)).pods.updated == 1
    earlier = datetime(2026, 1, 1, 9, tzinfo=UTC)  # by a clock that went back two hours
    seen.put("pod", "p0", pod(0, shows=NEW, restarts=1, engine_started_at=earlier))
    assert status_of(decide(rollout(AT_NEW), seen, NOW)).pods.updated == 0
    again = engine(0, NEW, confirmed_at="2026-01-01T09:30:00Z")
    seen.put("state", "n0", state("n0", [again], {"p0": NEW}))
    assert status_of(decide(rollout(AT_NEW), seen, NOW)).pods.updated == 1


def test_what_a_new_life_confirmed_before_its_start_was_seen_counts_once_the_pod_is_marked_anew() -> None:
    seen = world([pod(0, shows=NEW)], [state("n0", [engine(0, NEW)], {"p0": NEW})])
    # The agent's word of the new life comes first, then the pod's.
    again = engine(0, NEW, confirmed_at="2026-01-01T11:40:00Z")
    seen.put("state", "n0", state("n0", [again], {"p0": NEW}))
    lives: Fields = {"restarts": 1, "engine_started_at": datetime(2026, 1, 1, 11, 39, tzinfo=UTC)}
    for shown, updated in (
        (pod(0, shows=NEW, ready=False, **lives), 0),
        (pod(0, shows="", ready=False, gate=False, **lives), 0),
        (pod(0, shows=OLD, **lives), 0),
        (pod(0, shows=NEW, **lives), 1),
    ):
        seen.put("pod", "p0", shown)
        assert status_of(decide(rollout(AT_NEW), seen, NOW)).pods.updated == updated


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
