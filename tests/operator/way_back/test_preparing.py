"""Engines prepare in waves, the gate is passed once, and what ends while it prepares is counted."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from hotweights_operator.decide.rollouts import decide
from hotweights_operator.model.objects import Refusal
from tests.operator.worlds import (
    AT_NEW,
    BACK,
    DONE,
    NEW,
    NOW,
    OLD,
    OTHER,
    asked_to_prepare,
    engine,
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
    version,
    world,
)


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
def test_back_to_what_was_complete_before_all_prepare_at_once_too(
    goes_to: str, at_once: bool
) -> None:
    """The new version is complete: going back to the one before it is a way back, though that is
    not what is stable.
    """
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


@pytest.mark.parametrize(
    ("restarts", "oom", "reason"), [(2, False, "CrashedPreparing"), (2, True, "OutOfMemory")]
)
def test_an_engine_that_dies_of_preparing_has_failed(restarts: int, oom: bool, reason: str) -> None:
    dead = pod(0, ready=False, gate=False, restarts=restarts, last_run_seconds=20.0, oom_killed=oom)
    seen = world(
        [dead, pod(1)],
        [state("n0", [engine(0, "", phase="Booting"), engine(1)], {"p0": OLD, "p1": OLD})],
    )
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert [f.reason for f in status_of(decision).failures] == [reason]
    assert asked_to_prepare(decision) == set()
    assert told(decision)["p0"] == OLD


def test_a_pod_that_ended_while_it_prepared_is_left_alone_until_it_is_calm_and_the_end_is_remembered() -> (
    None
):
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
    seen = world(
        [calm, pod(1)], [state("n0", [serving, *prepared(2)[1:]], given)], clock=lambda: NOW
    )
    assert "p0" not in asked_to_prepare(decide(rollout(AT_NEW), seen, NOW + timedelta(seconds=59)))
    again = orders(decide(rollout(AT_NEW), seen, NOW + timedelta(seconds=60)))["p0"]
    assert (again.prepare, again.ended_preparing) == (NEW, 1)
    # The second end speaks against the version, and goes on to do so without the status' memory.
    seen = world(
        [replace(once, restarts=2)], [state("n0", [engine(0, "", phase="Booting")], {"p0": again})]
    )
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert [f.reason for f in status_of(decision).failures] == ["CrashedPreparing"]
    assert (told(decision)["p0"], orders(decision)["p0"].ended_preparing) == (OLD, 2)
    # In another revision it says nothing.
    later = rollout({**AT_NEW, "revision": 3})
    assert status_of(decide(later, seen, NOW)).pods.failed == 0
    assert orders(decide(later, seen, NOW))["p0"].ended_preparing == 0


def test_that_a_container_served_long_in_its_life_before_makes_it_no_calmer() -> None:
    now = [NOW - timedelta(hours=1)]
    idle = state(
        "n0", [engine(0, confirmed_at="2026-01-01T12:00:02Z")], {"p0": order("p0", OLD, prepare="")}
    )
    seen = world([pod(0)], [idle], clock=lambda: now[0])
    now[0] = NOW
    seen.put("pod", "p0", pod(0, restarts=1, last_run_seconds=20.0, engine_started_at=NOW))
    assert asked_to_prepare(decide(rollout(AT_NEW), seen, NOW + timedelta(seconds=59))) == set()
    assert asked_to_prepare(decide(rollout(AT_NEW), seen, NOW + timedelta(seconds=60))) == {"p0"}


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
    after = decide(
        rollout({**AT_NEW, "preparedRevision": 2}), world(pods, [state("n0", engines, given)]), NOW
    )
    assert told_to_change(after) == {"p1"}


def test_that_the_gate_was_passed_is_remembered_with_the_first_change() -> None:
    seen = world([pod(0)], [state("n0", prepared(1), {"p0": OLD})])
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert (told_to_change(decision), status_of(decision).prepared_revision) == ({"p0"}, 2)


def test_only_engines_that_are_there_are_asked_to_prepare() -> None:
    pods = [pod(0), pod(1, "n1")]
    states = [
        state(f"n{n}", [engine(n)], {f"p{n}": order(f"p{n}", OLD, prepare="")}) for n in (0, 1)
    ]
    seen = world(pods, states, agents={"n0": False, "n1": True})
    assert asked_to_prepare(decide(rollout(AT_NEW), seen, NOW)) == {"p1"}


def test_nobody_waits_for_a_pod_that_cannot_be_told_anything() -> None:
    states = [
        state("n0", prepared(1), {"p0": OLD}),
        state("n1", [engine(1)], {"p1": order("p1", OLD, prepare="")}),
    ]
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


def test_what_is_said_to_be_prepared_by_one_that_ended_since_is_of_its_life_before() -> None:
    ended = pod(
        0, ready=False, gate=False, restarts=1, last_run_seconds=20.0, engine_started_at=NOW
    )
    seen = world([ended], [state("n0", prepared(1), {"p0": OLD})], clock=lambda: NOW)
    decision = decide(rollout(AT_NEW), seen, NOW)
    left = orders(decision)["p0"]
    assert (left.digest, left.prepare, left.ended_preparing) == (OLD, "", 1)


def test_on_the_way_back_ends_are_counted_until_the_pod_is_told_something_else() -> None:
    """Its agent's word may be late: as long as it says Serving, the pod does not seem to boot."""
    back = rollout(BACK, versionRef={"name": "old"})
    given = order("p0", NEW, prepare=OLD, revision=3)
    ended = pod(0, ready=False, gate=False, shows="", restarts=1, last_run_seconds=20.0)
    seen = world([ended], [state("n0", [engine(0, NEW)], {"p0": given})])
    decision = decide(back, seen, NOW)
    assert orders(decision).get("p0", given).restarts == 0
    seen = world(
        [ended],
        [state("n0", [engine(0, "", phase="Booting")], {"p0": orders(decision).get("p0", given)})],
    )
    assert told(decide(back, seen, NOW))["p0"] == OLD


def test_ends_before_a_long_run_are_forgotten() -> None:
    ran = pod(0, restarts=1, last_run_seconds=7200.0)
    seen = world([ran], [state("n0", prepared(1), {"p0": OLD})])
    assert orders(decide(rollout(AT_NEW, paused=True), seen, NOW))["p0"].restarts == 1
