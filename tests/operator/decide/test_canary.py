"""A canary's steps: how many pods may take the target, which of them, and what ends a step."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from hotweights_crds.nodeweights import EngineStatus, PodAssignment
from hotweights_crds.weightrollout import CanaryStep
from hotweights_operator.decide.rollouts import decide
from hotweights_operator.decide.strategy import canary
from hotweights_operator.model.actions import RolloutDecision
from hotweights_operator.model.node_totals import TotalsQuery
from hotweights_operator.model.objects import Node, Pod, Rollout
from hotweights_operator.model.observed import Observed
from tests.operator.worlds import (
    AT_NEW,
    BACK,
    DONE,
    NEW,
    NOW,
    OLD,
    Fields,
    after,
    asked_to_prepare,
    engine,
    gave_up,
    looping,
    order,
    orders,
    pod,
    prepared,
    reason_of,
    rollout,
    state,
    status_of,
    told,
    told_to_change,
    world,
)

ONE: dict[str, Any] = {"setReplicas": 1}
PAUSE: dict[str, Any] = {"pause": {}}
HALF: dict[str, Any] = {"setReplicas": "50%"}
IDLE = "idle"


def steps(*given: Fields, kind: str = "AllAtOnce") -> Fields:
    """A strategy with these steps; all pods of a step at once, so that the steps alone hold back."""
    return {"strategy": {"type": kind, "canary": {"steps": list(given)}}}


def at(step: int, of: int, **more: Any) -> Fields:
    """The status at a step that began a minute ago."""
    began = "2026-01-01T11:59:00Z"
    return {**AT_NEW, "canary": {"step": step, "steps": of, "stepStartedAt": began}, **more}


def fleet(*kinds: str, nodes: int = 1) -> Observed:
    """Pods by what they are at: idle, asked, prepared, new (serves it), booting."""
    pods: list[Pod] = []
    engines: dict[str, list[EngineStatus]] = {f"n{n}": [] for n in range(nodes)}
    given: dict[str, dict[str, PodAssignment]] = {f"n{n}": {} for n in range(nodes)}
    for number, kind in enumerate(kinds):
        node, uid = f"n{number % nodes}", f"p{number}"
        boots = kind == "booting"
        shown = NEW if kind == "new" else OLD
        pods.append(
            pod(number, node, shows="" if boots else shown, ready=not boots, was_ready=not boots)
        )
        told_digest = NEW if kind == "new" else OLD
        asked = NEW if kind in ("asked", "prepared") else ""
        if not boots:
            given[node][uid] = order(uid, told_digest, prepare=asked)
        engines[node].append(
            prepared(number + 1)[number]
            if kind == "prepared"
            else engine(
                number, "" if boots else told_digest, phase="Booting" if boots else "Serving"
            )
        )
    return world(pods, [state(node, engines[node], given[node]) for node in engines])


def step_of(decision: RolloutDecision) -> int:
    return status_of(decision).canary.step


def test_only_the_pods_of_the_step_prepare_and_change() -> None:
    known = rollout(AT_NEW, **steps(ONE, PAUSE))
    decision = decide(known, fleet(IDLE, IDLE, IDLE), NOW)
    assert asked_to_prepare(decision) == {"p0"}
    found = status_of(decision).canary
    assert (found.step, found.steps, found.allowed, found.waits_for) == (0, 2, 1, "Pods")
    assert found.step_started_at == "2026-01-01T12:00:00Z"
    # the others are not waited for: what they have not prepared costs them no memory
    assert told_to_change(decide(known, fleet("prepared", IDLE, IDLE), NOW)) == {"p0"}


def test_nobody_of_a_step_changes_before_all_of_it_have_prepared() -> None:
    known = rollout(AT_NEW, **steps({"setReplicas": 2}))
    assert told_to_change(decide(known, fleet("prepared", "asked", IDLE), NOW)) == set()
    assert told_to_change(decide(known, fleet("prepared", "prepared", IDLE), NOW)) == {"p0", "p1"}


def test_each_step_has_a_gate_of_its_own() -> None:
    known = rollout(at(0, 2, preparedRevision=2), **steps(ONE, {"setReplicas": 3}))
    status = status_of(decide(known, fleet("new", IDLE, IDLE), NOW))
    assert (status.canary.step, status.canary.allowed, status.prepared_revision) == (1, 3, 0)
    known = replace(known, status=status)
    assert told_to_change(decide(known, fleet("new", "prepared", "asked"), NOW)) == set()


def test_where_nobody_may_change_the_gate_is_not_passed() -> None:
    known = rollout(AT_NEW, **steps({"setReplicas": 0}, PAUSE))
    decision = decide(known, fleet(IDLE, IDLE), NOW)
    assert (asked_to_prepare(decision), status_of(decision).prepared_revision) == (set(), 0)
    assert step_of(decision) == 1  # that none does is so at once


def test_a_step_ends_when_its_pods_serve_and_have_been_ready_for_long_enough() -> None:
    known = rollout(at(0, 2), **steps(ONE, PAUSE), minReadySeconds=7200)
    assert step_of(decide(known, fleet("new", IDLE), NOW)) == 0
    later = NOW + timedelta(hours=2)
    assert step_of(decide(known, fleet("new", IDLE), later)) == 1
    assert step_of(decide(known, fleet("prepared", IDLE), later)) == 0


@pytest.mark.parametrize(
    ("value", "desired", "allowed"),
    [(0, 5, 0), (3, 5, 3), (9, 5, 5), ("0%", 5, 0), ("1%", 5, 1), ("20%", 6, 2), ("100%", 3, 3)],
)
def test_a_percentage_rounds_up(value: int | str, desired: int, allowed: int) -> None:
    assert canary.allowance([CanaryStep(set_replicas=value)], 0, desired) == allowed


def test_before_anything_is_set_nobody_may_change_and_a_pause_keeps_what_was_set() -> None:
    given = [CanaryStep.from_dict(step) for step in (PAUSE, ONE, PAUSE)]
    assert [canary.allowance(given, step, 4) for step in range(3)] == [0, 1, 1]


def test_a_pause_is_paused_until_somebody_promotes_and_no_deadline_runs() -> None:
    known = rollout(at(1, 3), **steps(ONE, PAUSE, HALF), progressDeadlineSeconds=10)
    seen = fleet("new", IDLE, IDLE)
    for hours in (0, 1, 100):
        decision = decide(known, seen, NOW + timedelta(hours=hours))
        status = status_of(decision)
        assert (status.phase, status.canary.waits_for) == ("Paused", "Promotion")
        assert (reason_of(status, "Paused"), reason_of(status, "Stalled")) == ("CanaryPause", "")
        assert 'hotweights.dev/command="promote 2"' in status.message
        assert (told_to_change(decision), asked_to_prepare(decision)) == (set(), set())
        if hours:  # and what is so does not become new by looking again
            assert status == known.status
        known = replace(known, status=status)


def test_a_timed_pause_ends_by_itself_and_wakes_the_rollout() -> None:
    timed = {"pause": {"durationSeconds": 600}}
    known = rollout(at(1, 3), **steps(ONE, timed, HALF))
    decision = decide(known, fleet("new", IDLE, IDLE, IDLE), NOW)
    assert (step_of(decision), status_of(decision).canary.waits_for) == (1, "Time")
    assert decision.again_in_seconds == 541.0
    later = NOW + timedelta(seconds=541)
    moved = status_of(decide(known, fleet("new", IDLE, IDLE, IDLE), later)).canary
    assert (moved.step, moved.allowed, moved.waits_for) == (2, 2, "Pods")


def test_a_clock_that_was_ahead_makes_a_pause_no_longer() -> None:
    timed = rollout(
        {**at(0, 1), "canary": {"step": 0, "steps": 1, "stepStartedAt": "2027-01-01T00:00:00Z"}},
        **steps({"pause": {"durationSeconds": 60}}),
    )
    assert (decide(timed, fleet(IDLE), NOW).again_in_seconds or 0) <= 61


def test_the_deadline_has_its_whole_time_after_a_pause() -> None:
    known = after(rollout(at(1, 3), **steps(ONE, PAUSE, HALF)), fleet("new", IDLE, IDLE, IDLE))
    at_next = {**known.status.canary.model_dump(), "step": 2, "waits_for": "Pods"}
    status = known.status.model_copy(
        update={"canary": known.status.canary.model_copy(update=at_next)}
    )
    later = NOW + timedelta(hours=5)
    found = status_of(decide(replace(known, status=status), fleet("new", IDLE, IDLE, IDLE), later))
    assert (found.phase, found.last_progress_at) == ("Activating", "2026-01-01T17:00:00Z")


def test_after_the_last_step_all_change_and_only_then_it_is_complete() -> None:
    known = rollout(at(1, 2), **steps(HALF, PAUSE))
    status = status_of(decide(known, fleet("new", "new"), NOW))
    assert (status.phase, status.stable.digest) == ("Paused", OLD)
    done = rollout(at(2, 2, preparedRevision=2), **steps(HALF, PAUSE))
    assert told_to_change(decide(done, fleet("new", "prepared", "prepared"), NOW)) == {"p1", "p2"}
    status = status_of(decide(done, fleet("new", "new"), NOW))
    assert (status.phase, status.stable.digest, status.canary.allowed) == ("Complete", NEW, 2)


# -- which pods ---------------------------------------------------------------------------------


def zoned(zones: dict[str, str], *kinds: str) -> Observed:
    """A fleet on two nodes of each zone."""
    seen = fleet(*kinds, nodes=len(zones))
    for node, zone in zones.items():
        seen.put("node", node, Node(node, f"uid-{node}", zone=zone))
    return seen


def test_canaries_are_spread_over_zones_then_nodes_then_by_name() -> None:
    zones = {"n0": "a", "n1": "a", "n2": "b"}
    seen, query = zoned(zones, *[IDLE] * 9), TotalsQuery(NEW, 2, False, OLD, 0)
    all_totals = [seen.node_totals("r", node, query) for node in seen.nodes_of("r")]
    order_of = [t.pod.name for t in canary.spread(all_totals)]
    # p0, p3, p6 on n0; p1, p4, p7 on n1; p2, p5, p8 on n2
    assert order_of == ["p0", "p2", "p1", "p5", "p3", "p8", "p4", "p6", "p7"]
    decision = decide(rollout(AT_NEW, **steps({"setReplicas": 2})), zoned(zones, *[IDLE] * 9), NOW)
    assert asked_to_prepare(decision) == {"p0", "p2"}


@pytest.mark.parametrize("kind", ["asked", "prepared", "new"])
def test_a_pod_that_was_chosen_stays_the_canary(kind: str) -> None:
    """As the entries say, which an operator that starts finds as they were."""
    decision = decide(rollout(at(0, 2), **steps(ONE, PAUSE)), fleet(IDLE, IDLE, kind), NOW)
    asked = asked_to_prepare(decision) | told_to_change(decision)
    assert asked <= {"p2"}


@pytest.mark.parametrize(("crashes", "asked"), [(1, set()), (3, {"p1"})])
def test_a_canary_that_ends_while_it_prepares_keeps_its_place(
    crashes: int, asked: set[str]
) -> None:
    """Else a version that kills engines kills one after the other, each for the first time."""
    known = rollout(at(0, 1), **steps(ONE), failurePolicy={"maxFailed": 1})
    given = {"p0": order("p0", OLD), "p1": order("p1", OLD, prepare="")}
    away = engine(0, "", phase="Disconnected")
    states = [state("n0", [away, engine(1)], given)]
    seen = world([looping(0, crashes), pod(1)], states, clock=lambda: NOW)
    # it counts as ended though what it was to prepare is withdrawn until it is calm
    for told_now in (order("p0", OLD), order("p0", OLD, prepare="", ended_preparing=crashes)):
        seen.put("state", "n0", state("n0", [away, engine(1)], {**given, "p0": told_now}))
        assert asked_to_prepare(decide(known, seen, NOW + timedelta(seconds=99))) == asked
    # nobody waits for it for ever
    assert asked_to_prepare(decide(known, seen, NOW + timedelta(minutes=6))) == {"p1"}


def test_a_canary_whose_agent_is_away_holds_nobody_back() -> None:
    known = rollout(at(0, 1), **steps(ONE))
    states = [
        state("n0", [engine(0)], {"p0": order("p0", OLD)}),
        state("n1", [engine(1)], {"p1": order("p1", OLD, prepare="")}),
    ]
    seen = world([pod(0), pod(1, "n1")], states, agents={"n0": False, "n1": True})
    assert asked_to_prepare(decide(known, seen, NOW)) == {"p1"}


def test_what_is_told_the_target_counts_though_nothing_is_heard_of_it() -> None:
    seen = fleet(IDLE, "new")
    seen.put("pod", "p1", replace(seen.pods["p1"], ready=False))
    known = rollout(at(0, 1), **steps(ONE))
    seen.put(
        "state", "n0", state("n0", [engine(0)], {"p0": order("p0", OLD, prepare=""), "p1": NEW})
    )
    assert asked_to_prepare(decide(known, seen, NOW)) == set()


def test_a_new_pod_boots_into_what_is_stable_unless_the_step_has_room() -> None:
    known = rollout(at(1, 2), **steps(ONE, PAUSE))
    assert told(decide(known, fleet("new", IDLE, "booting"), NOW))["p2"] == OLD
    # the canary is gone: it costs the new one nothing to take its place, also in a pause
    decision = decide(known, fleet(IDLE, IDLE, "booting"), NOW)
    assert (told(decision)["p2"], asked_to_prepare(decision)) == (NEW, set())


def test_a_canary_that_failed_gives_its_place_to_another() -> None:
    known = rollout(at(0, 1), **steps(ONE), failurePolicy={"maxFailed": 1})
    refusing = engine(0, phase="Refused", failed=gave_up(step="Prepare"))
    given = {"p0": order("p0", OLD), "p1": order("p1", OLD, prepare="")}
    seen = world([pod(0), pod(1)], [state("n0", [refusing, engine(1)], given)])
    decision = decide(known, seen, NOW)
    assert asked_to_prepare(decision) == {"p1"}
    assert status_of(decision).pods.failed == 1


def test_a_version_that_fails_everywhere_ends_no_step() -> None:
    known = rollout(at(0, 2), **steps(ONE, PAUSE), failurePolicy={"maxFailed": 5})
    refusing = engine(0, phase="Refused", failed=gave_up(step="Prepare"))
    seen = world([pod(0)], [state("n0", [refusing], {"p0": order("p0", OLD)})])
    assert (step_of(decide(known, seen, NOW)), status_of(decide(known, seen, NOW)).phase) == (
        0,
        "Stalled",
    )


def test_a_failed_canary_holds_the_rollout_by_the_failure_policy() -> None:
    known = rollout(at(0, 1), **steps(ONE))
    refusing = engine(0, phase="Refused", failed=gave_up(step="Prepare"))
    given = {"p0": order("p0", OLD), "p1": order("p1", OLD, prepare="")}
    seen = world([pod(0), pod(1)], [state("n0", [refusing, engine(1)], given)])
    decision = decide(known, seen, NOW)
    assert asked_to_prepare(decision) == set()
    assert reason_of(status_of(decision), "Paused") == "TooManyFailures"


def test_the_budget_holds_within_a_step() -> None:
    known = rollout(at(0, 1, preparedRevision=2), **steps({"setReplicas": 3}, kind="Rolling"))
    assert len(told_to_change(decide(known, fleet(*["prepared"] * 3, IDLE), NOW))) == 1


# -- the spec is edited, and where there are no steps ------------------------------------------


@pytest.mark.parametrize(
    ("step", "of", "now_has", "found"),
    [(2, 3, 2, 1), (2, 2, 3, 3), (1, 3, 3, 1), (0, 0, 2, 0), (0, 0, 0, 0)],
    ids=["beyond the end", "all done", "the same", "steps are added", "none"],
)
def test_an_edit_of_the_steps_is_followed(step: int, of: int, now_has: int, found: int) -> None:
    given = steps(*[PAUSE] * now_has) if now_has else {}
    status = status_of(decide(rollout(at(step, of), **given), fleet(IDLE, IDLE), NOW))
    assert (status.canary.step, status.canary.steps) == (found, now_has)


def test_a_way_back_takes_no_steps() -> None:
    back = rollout(BACK, versionRef={"name": "old"}, **steps(ONE, PAUSE))
    pods = [pod(n, shows=NEW) for n in range(3)]
    given = {f"p{n}": order(f"p{n}", NEW, prepare="") for n in range(3)}
    seen = world(pods, [state("n0", [engine(n, NEW) for n in range(3)], given)])
    decision = decide(back, seen, NOW)
    assert asked_to_prepare(decision, OLD) == {"p0", "p1", "p2"}
    assert status_of(decision).canary.step == 2


def test_what_was_complete_is_limited_no_more() -> None:
    known: Rollout = rollout(DONE, **steps(ONE, PAUSE))
    decision = decide(known, fleet("new", "new", "booting"), NOW)
    assert told(decision)["p2"] == NEW


def test_a_step_of_a_newer_release_waits_for_somebody() -> None:
    unknown = CanaryStep()
    assert canary.kind_of(unknown) is canary.KINDS["pause"]


def test_a_pause_by_the_spec_keeps_the_step_where_it_is() -> None:
    timed = {"pause": {"durationSeconds": 1}}
    known = rollout(at(0, 1), **steps(timed), paused=True)
    decision = decide(known, fleet(IDLE), NOW)
    assert (step_of(decision), reason_of(status_of(decision), "Paused")) == (0, "Requested")
    assert orders(decision) == {}


def test_steps_are_told_as_events() -> None:
    decision = decide(rollout(at(0, 2), **steps(ONE, PAUSE)), fleet("new", IDLE), NOW)
    (event,) = [event for event in decision.events if event.reason == "CanaryStep"]
    assert event.message.startswith("Step 2 of 2: waits for a promotion")
    again = replace(rollout(at(0, 2), **steps(ONE, PAUSE)), status=status_of(decision))
    assert [
        e for e in decide(again, fleet("new", IDLE), NOW).events if e.reason == "CanaryStep"
    ] == []
