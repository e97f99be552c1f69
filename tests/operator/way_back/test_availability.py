"""The budget as a Service sees it: who is available, for how long, and who is left out."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from hotweights_crds.nodeweights import PodAssignment
from hotweights_operator.decide.rollouts import decide
from hotweights_operator.model.objects import Pod
from tests.operator.worlds import (
    AT_NEW,
    NEW,
    NOW,
    OLD,
    Fields,
    engine,
    order,
    pod,
    prepared,
    rollout,
    state,
    told_to_change,
    world,
)


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
        # by a clock that may have been changed in between
        ({"gate_since": MOMENT, "ready_since": MOMENT}, False),
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
    pods = [
        changed(0, gate_since=since, ready_since=since),
        pod(1, ready_since=NOW - timedelta(hours=1)),
    ]
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
    seen = world(
        pods, [state("n0", prepared(1), {f"p{n}": OLD for n in range(3)})], clock=lambda: NOW
    )
    running = {**AT_NEW, "preparedRevision": 2}
    wide = {"type": "Rolling", "rolling": {"maxUnavailable": 2}}
    assert told_to_change(decide(rollout(running, strategy=wide), seen, NOW)) == set()
    assert told_to_change(decide(rollout(running, strategy={"type": "AllAtOnce"}), seen, NOW)) == {
        "p0"
    }


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
    assert told_to_change(decide(running, seen, NOW + timedelta(seconds=60))) == set(), (
        "it was heard of"
    )
    seen = world([stranger], [state("n0", starts, given)], clock=lambda: NOW)
    seen.put("pod", "p0", pod(0))
    assert told_to_change(decide(running, seen, NOW + timedelta(seconds=60))) == set()
