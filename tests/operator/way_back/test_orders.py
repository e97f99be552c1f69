"""What each pod is told: to keep what it has, to boot into something, to prepare, to change; and
what never goes on while it holds.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from hotweights_crds.nodeweights import StagedVersion
from hotweights_operator.decide.rollouts import decide
from hotweights_operator.model.objects import Pod, Refusal
from tests.operator.worlds import (
    AT_NEW,
    LENIENT,
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

PASSED: Fields = {**AT_NEW, "preparedRevision": 2}
AT_ONCE: Fields = {"strategy": {"type": "AllAtOnce"}}
FAILED_BEFORE: Fields = {"failures": [{"pod": "p0", "podUID": "p0", "reason": "ProbeMismatch"}]}


def fresh(number: int, **more: Any) -> Pod:
    """A pod that has never been of service."""
    return pod(number, **{"ready": False, "was_ready": False, "gate": False, "shows": "", **more})


def restarted(number: int, restarts: int = 1, seconds: float = 5.0, **more: Any) -> Pod:
    """A pod whose container ended, after so long a life, and boots."""
    return pod(
        number,
        ready=False,
        gate=False,
        shows="",
        restarts=restarts,
        last_run_seconds=seconds,
        **more,
    )


def booting(number: int = 0) -> Any:
    """Its engine asks what to load."""
    return engine(number, "", phase="Booting", confirmed_at="")


def holding(*digests: str, fetching: str = "", failed: str = "") -> list[StagedVersion]:
    """What a node has, and what it has not."""
    found = [StagedVersion(digest=digest, phase="Staged") for digest in digests]
    found += [StagedVersion(digest=fetching, phase="Fetching")] if fetching else []
    return found + (
        [StagedVersion(digest=failed, phase="Failed", reason="ChecksumMismatch")] if failed else []
    )


# -- what a pod keeps ---------------------------------------------------------------------------


def test_a_pod_that_failed_is_told_what_it_serves_though_its_engine_has_forgotten() -> None:
    seen = world([pod(0, gate=False)], [state("n0", [engine(0)], {"p0": NEW})])
    for spec in ({}, LENIENT):
        assert told(decide(rollout({**AT_NEW, **FAILED_BEFORE}, **spec), seen, NOW))["p0"] == OLD


def test_what_a_failed_pod_serves_need_not_be_what_is_stable() -> None:
    failed = engine(0, OTHER, phase="Failed", failed=gave_up())
    seen = world([pod(0, gate=False)], [state("n0", [failed], {"p0": NEW})])
    assert told(decide(rollout(AT_NEW), seen, NOW))["p0"] == OTHER


def test_an_order_that_is_tried_again_is_not_given_up_for_what_failed_before() -> None:
    again = order("p0", NEW, prepare="", token=2, revision=3)
    seen = world(
        [pod(0, gate=False)], [state("n0", [engine(0, failed=gave_up(token=1))], {"p0": again})]
    )
    assert told(decide(rollout({**PASSED, "revision": 3}), seen, NOW)).get("p0", NEW) == NEW


@pytest.mark.parametrize(("given", "expected"), [(OTHER, OLD), (NEW, NEW), (OLD, OLD)])
def test_a_dirty_engine_repairs_itself_with_what_is_wanted_still_or_with_what_is_stable(
    given: str, expected: str
) -> None:
    dirty = engine(0, "", phase="Dirty")
    known = state("n0", [dirty], {"p0": order("p0", given, prepare="")}, listed=(OLD, NEW, OTHER))
    seen = world([pod(0, ready=False, gate=False)], [known])
    assert told(decide(rollout(AT_NEW, paused=True), seen, NOW)).get("p0", given) == expected


@pytest.mark.parametrize("phase", ["Dirty", "Committing", "Failed"])
def test_an_engine_that_is_not_settled_says_nothing_about_what_its_pod_serves(phase: str) -> None:
    seen = world([pod(0)], [state("n0", [engine(0, OTHER, phase=phase)])])
    assert "p0" not in told(decide(rollout(AT_NEW), seen, NOW))


def test_a_pod_whose_agent_is_away_keeps_its_order() -> None:
    seen = world(
        [pod(0, shows=NEW)], [state("n0", [engine(0, NEW)], {"p0": NEW})], agents={"n0": False}
    )
    for paused in (False, True):
        assert told(decide(rollout(AT_NEW, paused=paused), seen, NOW)).get("p0", NEW) == NEW


def test_an_engine_that_refused_to_prepare_is_not_led_elsewhere_though_its_pod_is_not_ready() -> (
    None
):
    refused = engine(0, OTHER, phase="Refused", failed=gave_up(step="Prepare"))
    given = order("p0", OTHER, prepare="", revision=1)
    known = state("n0", [refused], {"p0": given}, staged=holding(OLD, OTHER), listed=(OLD, OTHER))
    decision = decide(
        rollout({**AT_NEW, "abortedRevision": 2}), world([pod(0, ready=False)], [known]), NOW
    )
    assert told(decision).get("p0", OTHER) == OTHER


# -- what a pod boots into ----------------------------------------------------------------------


@pytest.mark.parametrize("held", [{"mostFailed": 1}, {"abortedRevision": 2}])
def test_what_was_given_up_is_not_booted_into_though_it_is_all_that_the_node_has(
    held: Fields,
) -> None:
    given = order("p0", NEW, prepare="")
    for known in (restarted(0, seconds=7200.0), fresh(0)):
        seen = world(
            [known], [state("n0", [booting()], {"p0": given}, staged=holding(NEW, fetching=OLD))]
        )
        assert told(decide(rollout({**AT_NEW, **held}), seen, NOW))["p0"] == OLD


def test_a_pause_leads_no_pod_back_that_had_changed() -> None:
    seen = world([restarted(0)], [state("n0", [booting()], {"p0": order("p0", NEW, prepare="")})])
    assert told(decide(rollout(AT_NEW, paused=True), seen, NOW)).get("p0", NEW) == NEW


def test_a_pod_that_loops_on_what_never_was_stable_gets_what_is_while_the_rollout_is_paused() -> (
    None
):
    given = order("p0", OTHER, prepare="", revision=1)
    known = state(
        "n0", [booting()], {"p0": given}, staged=holding(OLD, NEW, OTHER), listed=(OLD, NEW, OTHER)
    )
    assert (
        told(decide(rollout(AT_NEW, paused=True), world([restarted(0, 3)], [known]), NOW))["p0"]
        == OLD
    )
    assert told(decide(rollout(AT_NEW, paused=True), world([restarted(0, 2)], [known]), NOW)).get(
        "p0"
    ) in (None, OTHER)


def test_an_order_of_the_revision_before_diverts_nobody_from_the_target() -> None:
    before = order("p0", OLD, prepare="", revision=1)
    seen = world([restarted(0, seconds=7200.0)], [state("n0", [booting()], {"p0": before})])
    assert told(decide(rollout(AT_NEW), seen, NOW))["p0"] == NEW


def test_a_pod_that_starts_goes_on_with_what_it_was_told_in_this_revision() -> None:
    seen = world([fresh(0)], [state("n0", [booting()], {"p0": order("p0", OLD, prepare="")})])
    assert told(decide(rollout(AT_NEW), seen, NOW)).get("p0", OLD) == OLD


def test_a_pod_on_its_way_to_what_cannot_come_is_given_what_can() -> None:
    staged = holding(fetching=NEW, failed=OLD)
    known = state("n0", [booting()], {"p0": order("p0", OLD, prepare="")}, staged=staged)
    assert told(decide(rollout(AT_NEW), world([fresh(0)], [known]), NOW))["p0"] == NEW


def test_a_pod_that_is_told_what_cannot_come_does_not_boot_into_the_target_while_paused() -> None:
    lost = order("p0", OTHER, prepare="")
    seen = world([restarted(0, seconds=7200.0)], [state("n0", [booting()], {"p0": lost})])
    assert told(decide(rollout(AT_NEW, paused=True), seen, NOW))["p0"] == OLD


def test_what_can_come_is_waited_for_rather_than_what_failed_to() -> None:
    given = order("p0", OTHER, prepare="", revision=1)
    staged = holding(fetching=OLD, failed=OTHER)
    known = state("n0", [booting()], {"p0": given}, staged=staged, listed=(OLD, OTHER))
    assert (
        told(decide(rollout(AT_NEW, paused=True), world([restarted(0)], [known]), NOW))["p0"] == OLD
    )


def test_a_version_that_a_node_was_not_told_of_yet_is_no_lost_one() -> None:
    seen = world([fresh(0)], [state("n0", [booting()], staged=[])])
    assert told(decide(rollout(AT_NEW), seen, NOW))["p0"] == NEW


def test_a_version_that_is_gone_before_it_came_is_not_waited_for() -> None:
    lost = order("p0", NEW, prepare="")
    known = state("n0", [engine(0)], {"p0": lost}, staged=holding(OLD), listed=(OLD,))
    seen = world([pod(0, gate=False)], [known], versions=[version("old", OLD)])
    assert told(decide(rollout(PASSED), seen, NOW))["p0"] == OLD


def test_what_was_refused_at_boot_is_not_told_again_though_it_is_not_the_target() -> None:
    given = order("p0", OTHER, prepare="")
    refused = engine(
        0, "", phase="Refused", confirmed_at="", failed=gave_up(OTHER, step="Prepare", booting=True)
    )
    known = state("n0", [refused], {"p0": given}, staged=holding(OLD, OTHER), listed=(OLD, OTHER))
    assert (
        told(decide(rollout(AT_NEW, paused=True), world([restarted(0)], [known]), NOW))["p0"] == OLD
    )


def test_a_pod_that_loops_on_what_is_stable_goes_on_with_it_until_the_target_is_there() -> None:
    given = order("p0", OLD, prepare="", revision=1)
    for staged, expected in ((holding(OLD, fetching=NEW), OLD), (holding(OLD, NEW), NEW)):
        seen = world([restarted(0, 4)], [state("n0", [booting()], {"p0": given}, staged=staged)])
        assert told(decide(rollout(AT_NEW), seen, NOW))["p0"] == expected


BACK: Fields = {
    "revision": 3,
    "target": {"digest": OLD},
    "stable": {"digest": OLD},
    "held": [{"digest": NEW}],
}


@pytest.mark.parametrize(
    ("known", "paused"), [(fresh(0), True), (restarted(0), False)], ids=["new", "ended once"]
)
def test_on_the_way_back_a_pod_boots_into_what_is_stable_whatever_it_was_told(
    known: Pod, paused: bool
) -> None:
    given = order("p0", NEW, prepare=OLD, revision=2 if paused else 3)
    back = rollout(BACK, versionRef={"name": "old"}, paused=paused)
    assert (
        told(decide(back, world([known], [state("n0", [booting()], {"p0": given})]), NOW))["p0"]
        == OLD
    )


# -- who prepares -------------------------------------------------------------------------------


def test_nobody_begins_to_prepare_while_the_rollout_is_paused() -> None:
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": order("p0", OLD, prepare="")})])
    assert asked_to_prepare(decide(rollout(AT_NEW, paused=True), seen, NOW)) == set()
    assert asked_to_prepare(decide(rollout(AT_NEW), seen, NOW)) == {"p0"}


def test_those_that_prepare_take_the_wave_s_room() -> None:
    engines = [engine(0, phase="Preparing"), engine(1), engine(2)]
    given = {"p0": order("p0", OLD), **{f"p{n}": order(f"p{n}", OLD, prepare="") for n in (1, 2)}}
    seen = world([pod(n) for n in range(3)], [state("n0", engines, given)])
    assert asked_to_prepare(decide(rollout(AT_NEW), seen, NOW)) <= {"p0"}


def test_those_that_went_away_while_they_prepared_do_not() -> None:
    engines = [engine(0, phase="Disconnected"), engine(1)]
    seen = world(
        [pod(0), pod(1)], [state("n0", engines, {"p0": OLD, "p1": order("p1", OLD, prepare="")})]
    )
    assert "p1" in asked_to_prepare(decide(rollout(AT_NEW), seen, NOW))


@pytest.mark.parametrize(
    ("ran_seconds", "ready", "alive_seconds", "asked"),
    [
        (86400.0, True, 300, {"p0"}),
        (20.0, True, 300, set()),
        (20.0, False, 300, set()),
        (20.0, True, 600, {"p0"}),
    ],
    ids=[
        "it ran for a day before",
        "it ran for a moment",
        "and was of no service since",
        "it lives for long",
    ],
)
def test_what_ended_after_a_day_is_asked_at_once_and_what_is_of_no_service_is_not_calm(
    ran_seconds: float, ready: bool, alive_seconds: float, asked: set[str]
) -> None:
    began = NOW - timedelta(seconds=alive_seconds)
    known = pod(0, restarts=3, last_run_seconds=ran_seconds, ready=ready, engine_started_at=began)
    idle = order("p0", OLD, prepare="", revision=1, restarts=3)
    its_engine = engine(0, confirmed_at="2026-01-01T11:56:00Z")
    clock = NOW if ready else began
    seen = world([known], [state("n0", [its_engine], {"p0": idle})], clock=lambda: clock)
    assert asked_to_prepare(decide(rollout(AT_NEW), seen, NOW)) == asked


# -- who is waited for, and who changes ---------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "its_engine", "given"),
    [
        (restarted(1, seconds=7200.0), booting(1), order("p1", OLD, prepare="")),
        (pod(1, ready=False), engine(1, phase="Committing"), order("p1", OTHER, prepare="")),
        (pod(1, gate=False), engine(1), order("p1", NEW, prepare="")),
        (pod(1), engine(1, phase="Disconnected"), order("p1", OLD, prepare="")),
    ],
    ids=["it boots", "it is in the middle of another switch", "it was told already", "it is away"],
)
def test_nobody_waits_at_the_gate_for_one_that_cannot_prepare_now(
    other: Pod, its_engine: Any, given: Any
) -> None:
    known = state(
        "n0", [*prepared(1), its_engine], {"p0": OLD, "p1": given}, listed=(OLD, NEW, OTHER)
    )
    assert "p0" in told_to_change(
        decide(rollout(AT_NEW, **AT_ONCE), world([pod(0), other], [known]), NOW)
    )


def test_the_gate_of_an_earlier_revision_is_not_this_one_s() -> None:
    engines = [*prepared(1), engine(1)]
    seen = world(
        [pod(0), pod(1)], [state("n0", engines, {"p0": OLD, "p1": order("p1", OLD, prepare="")})]
    )
    assert told_to_change(decide(rollout({**AT_NEW, "preparedRevision": 1}), seen, NOW)) == set()


@pytest.mark.parametrize("paused", [True, False])
def test_the_gate_is_not_passed_by_those_who_do_not_stand_before_it(paused: bool) -> None:
    unprepared = world([pod(0)], [state("n0", [engine(0)], {"p0": order("p0", OLD, prepare="")})])
    for seen in (unprepared, world([], [])):
        status = decide(rollout(AT_NEW, paused=paused), seen, NOW).status
        assert status is not None
        assert status.prepared_revision == 0


def test_pods_change_by_node_and_name() -> None:
    states = [
        state("n1", prepared(1), {"p0": OLD}),
        state("n0", prepared(13), {f"p{n}": OLD for n in (12, 21)}),
    ]
    engines = [engine(n, phase="Prepared", prepared=NEW) for n in (12, 21)]
    states[1] = state("n0", engines, {f"p{n}": OLD for n in (12, 21)})
    pods = [pod(0, "n1"), pod(21), pod(12)]
    assert told_to_change(decide(rollout(AT_NEW), world(pods, states), NOW)) == {"p12"}


def test_no_pod_changes_to_what_its_node_does_not_hold() -> None:
    seen = world(
        [pod(0)], [state("n0", prepared(1), {"p0": OLD}, staged=holding(OLD, fetching=NEW))]
    )
    assert told_to_change(decide(rollout(AT_NEW), seen, NOW)) == set()


def test_a_node_that_refuses_takes_no_place_in_the_budget() -> None:
    states = [state(f"n{n}", [prepared(2)[n]], {f"p{n}": OLD}) for n in (0, 1)]
    seen = world([pod(0), pod(1, "n1")], states)
    seen.refusals["r", "n0"] = Refusal("Invalid", "too many items")
    assert told_to_change(decide(rollout(AT_NEW), seen, NOW)) & {"p0", "p1"} == {"p1"}


def test_what_an_agent_that_is_away_said_moves_nobody() -> None:
    seen = world([pod(0)], [state("n0", prepared(1), {"p0": OLD})], agents={"n0": False})
    assert told_to_change(decide(rollout(PASSED), seen, NOW)) == set()


def test_orders_say_how_to_switch() -> None:
    seen = world([pod(0)], [state("n0", prepared(1), {"p0": OLD})])
    how = {"mode": "Abort", "drainTimeoutSeconds": 17, "commitTimeoutSeconds": 23}
    how |= {"memory": "InPause", "maxPauseSeconds": 9}
    given = orders(decide(rollout(AT_NEW, activation=how), seen, NOW))["p0"]
    assert (given.mode, given.drain_timeout_seconds, given.commit_timeout_seconds) == (
        "Abort",
        17,
        23,
    )
    assert (given.memory, given.max_pause_seconds) == ("InPause", 9)


def test_a_failure_is_seen_though_nothing_else_has_changed_on_the_node() -> None:
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": order("p0", OLD, prepare="")})])
    assert asked_to_prepare(decide(rollout(AT_NEW, **LENIENT), seen, NOW)) == {"p0"}
    failed = rollout({**AT_NEW, **FAILED_BEFORE}, **LENIENT)
    assert asked_to_prepare(decide(failed, seen, NOW)) == set()
