"""The unhappy path: whatever failed, went away or was taken back, a good version reaches every pod
that can take it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from hotweights_crds.conditions import find
from hotweights_operator.decide.rollouts import decide
from tests.operator.worlds import (
    AT_NEW,
    BACK,
    LENIENT,
    NEW,
    NOW,
    OLD,
    Fields,
    asked_to_prepare,
    engine,
    gave_up,
    next_pass,
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

# -- failures belong to the version and the revision (F1) ---------------------------------------


@pytest.mark.parametrize(
    "spec", [{}, LENIENT, {"paused": True}, {"failurePolicy": {"action": "Abort"}}]
)
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
    seen = world(
        [pod(0)], [state("n0", [failed], {"p0": order("p0", OLD, prepare="", revision=1)})]
    )
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
    seen = world(
        [pod(0), pod(1)], [state("n0", engines, {"p0": order("p0", OLD, prepare=""), "p1": OLD})]
    )
    running = rollout(AT_NEW, **LENIENT)
    decision = decide(running, seen, NOW)
    assert (told_to_change(decision), asked_to_prepare(decision)) == ({"p1"}, set())
    # Its engine starts anew and has forgotten; the status has not.
    forgot = [engine(0, OLD), *prepared(2)[1:]]
    later = world(
        [pod(0), pod(1)], [state("n0", forgot, {"p0": order("p0", OLD, prepare=""), "p1": OLD})]
    )
    again = decide(next_pass(running, decision), later, NOW)
    assert status_of(again).pods.failed == 1
    assert "p0" not in asked_to_prepare(again) | told_to_change(again)


def test_a_new_pod_of_the_same_name_has_failed_nothing() -> None:
    known = {
        **AT_NEW,
        "failures": [{"pod": "p0", "podUID": "an-earlier-p0", "reason": "ProbeMismatch"}],
    }
    seen = world([pod(0)], [state("n0", prepared(1), {"p0": OLD})])
    decision = decide(rollout(known), seen, NOW)
    assert (status_of(decision).pods.failed, told_to_change(decision)) == (0, {"p0"})


def test_a_dirty_engine_is_repaired_with_what_is_stable() -> None:
    dirty = engine(0, "", phase="Dirty", failed=gave_up())
    seen = world([pod(0, ready=False, gate=False)], [state("n0", [dirty], {"p0": NEW})])
    assert told(decide(rollout(AT_NEW), seen, NOW))["p0"] == OLD


# -- given up stays given up (F2) ---------------------------------------------------------------


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
    for edited in (
        held,
        replace(held, generation=9),
        rollout(held.status.to_dict(), progressDeadlineSeconds=60),
    ):
        assert told_to_change(decide(edited, seen, NOW)) == set()
    assert told_to_change(decide(rollout(held.status.to_dict(), **LENIENT), seen, NOW)) == {"p0"}


@pytest.mark.parametrize("status", [{**AT_NEW, "mostFailed": 1}, {**AT_NEW, "abortedRevision": 2}])
def test_a_retry_is_a_revision_of_its_own_and_asked_for_once(status: Fields) -> None:
    seen = world([pod(0)], [state("n0", prepared(1, failed=gave_up()), {"p0": OLD})])
    asked = replace(rollout(status), retry="once")
    decision = decide(asked, seen, NOW)
    assert (
        status_of(decision).revision,
        status_of(decision).retried,
        status_of(decision).most_failed,
    ) == (
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
    seen = world(
        [pod(0, shows=NEW), broken],
        [state("n0", engines, {"p0": NEW, "p1": order("p1", NEW, prepare="")})],
    )
    status = status_of(decide(rollout(done, failurePolicy={"action": "Abort"}), seen, NOW))
    assert (status.phase, status.aborted_revision) == ("Stalled", 0)
    stalled = find(status.conditions, "Stalled")
    assert stalled is not None
    assert stalled.reason == "CrashLooping"
