"""What a status says: counts that are proved, the one phase, and conditions as kstatus reads
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from hotweights_crds.conditions import find, is_true
from hotweights_crds.nodeweights import EngineStatus, StagedVersion
from hotweights_crds.weightrollout import MAX_FAILURES
from hotweights_operator.decide.rollouts import decide
from hotweights_operator.model.objects import Rollout
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
    prepared,
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


# -- counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", [{"ready": False}, {"gate": False}, {"shows": OLD}])
def test_a_pod_that_serves_and_is_not_of_service_completes_nothing(shown: Fields) -> None:
    pods = [pod(0, shows=NEW), pod(1, **{"shows": NEW, **shown})]
    seen = world(pods, [state("n0", [engine(0, NEW), engine(1, NEW)], {"p0": NEW, "p1": NEW})])
    status = status_after(rollout(AT_NEW), seen)
    assert (status.pods.updated, status.pods.ready, status.pods.available) == (2, 1, 1)
    assert (status.phase, is_true(status.conditions, "Ready"), status.history) == (
        "Activating",
        False,
        [],
    )


def test_a_pod_that_is_of_service_with_the_old_version_completes_nothing() -> None:
    seen = world(
        [pod(0, shows=NEW), pod(1)],
        [state("n0", [engine(0, NEW), engine(1)], {"p0": NEW, "p1": OLD})],
    )
    status = status_after(rollout(AT_NEW), seen)
    assert (status.pods.updated, status.pods.ready, status.pods.available) == (1, 1, 2)
    assert not is_true(status.conditions, "Ready")


def clocked(since: Sequence[datetime], engines: Sequence[EngineStatus]) -> Observed:
    """Pods that show the new version, each since its own time."""
    now = since[0]
    known = state("n0", engines, {f"p{n}": NEW for n in range(len(engines))})
    seen = world([], [known], clock=lambda: now)
    for number, now in enumerate(since):  # noqa: B007 - the clock reads it
        seen.put("pod", f"p{number}", pod(number, shows=NEW))
    return seen


def test_each_pod_must_have_been_of_service_for_long_enough_by_itself() -> None:
    seen = clocked([NOW - HOUR, NOW - timedelta(seconds=20)], [engine(0, NEW), engine(1, NEW)])
    slow = rollout(AT_NEW, minReadySeconds=30)
    status = status_after(slow, seen)
    assert (status.pods.ready, status.phase, status.history) == (1, "Activating", [])
    assert decide(slow, seen, NOW).again_in_seconds == pytest.approx(10.0)
    assert status_after(slow, seen, NOW + timedelta(seconds=10)).phase == "Complete"


def test_what_was_complete_stays_so_when_the_operator_starts_again() -> None:
    just_seen = clocked([NOW], [engine(0, NEW)])
    assert status_after(rollout(DONE, minReadySeconds=30), just_seen).phase == "Complete"


def test_an_agent_that_is_away_proves_nothing() -> None:
    seen = world(
        [pod(0, shows=NEW)], [state("n0", [engine(0, NEW)], {"p0": NEW})], agents={"n0": False}
    )
    status = status_after(rollout(AT_NEW), seen)
    assert (status.pods.updated, status.nodes.staged, is_true(status.conditions, "Staged")) == (
        0,
        0,
        False,
    )


def test_a_pod_of_service_without_an_order_needs_no_gate() -> None:
    seen = world([pod(0, gate=False, shows="")], [state("n0", [engine(0)])])
    assert status_after(rollout(AT_NEW), seen).pods.available == 1


def test_a_node_that_is_still_fetching_holds_nothing() -> None:
    staged = [
        StagedVersion(digest=OLD, phase="Staged"),
        StagedVersion(digest=NEW, phase="Fetching", bytes_done=3),
    ]
    seen = world([pod(0), pod(1, "")], [state("n0", [engine(0)], {"p0": OLD}, staged=staged)])
    status = status_after(rollout(AT_NEW), seen)
    assert (status.nodes.summary, status.phase, is_true(status.conditions, "Staged")) == (
        "0/1",
        "Staging",
        False,
    )


def test_no_more_bytes_are_there_than_there_are() -> None:
    known = version("new", NEW)
    known = replace(known, status=known.status.model_copy(update={"nbytes": 10}))
    staged = [StagedVersion(digest=NEW, phase="Fetching", bytes_done=30, bytes_total=10)]
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": OLD}, staged=staged)], versions=[known])
    assert status_after(rollout(AT_NEW), seen).staged_percent == "100%"


@pytest.mark.parametrize(("held", "rollback"), [((OLD, NEW), "Local"), ((NEW,), "NotLocal")])
def test_whether_one_can_go_back_without_the_network(held: tuple[str, ...], rollback: str) -> None:
    staged = [StagedVersion(digest=digest, phase="Staged") for digest in held]
    seen = world([pod(0, shows=NEW)], [state("n0", [engine(0, NEW)], {"p0": NEW}, staged=staged)])
    assert status_after(rollout(AT_NEW), seen).rollback == rollback


def test_only_so_many_failures_are_listed_and_all_are_counted() -> None:
    pods = [pod(n, "") for n in range(MAX_FAILURES + 3)]
    status = status_after(rollout(AT_NEW), world(pods, []))
    assert (len(status.failures), status.failures_total) == (MAX_FAILURES, MAX_FAILURES + 3)


def test_a_rollout_given_up_says_why_and_names_nobody_who_is_back() -> None:
    known = [{"pod": "a", "podUID": "a", "reason": r} for r in ("AgentMissing", "ProbeMismatch")]
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": OLD})])
    status = status_after(rollout({**AT_NEW, "mostFailed": 1, "failures": known}), seen)
    assert [failure.reason for failure in status.failures] == ["ProbeMismatch"]


# -- phases and conditions ----------------------------------------------------------------------

ABNORMAL = ("Paused", "Reconciling", "Stalled")


@pytest.mark.parametrize(
    ("known", "failed", "expected"),
    [
        (rollout(AT_NEW), False, {"Reconciling"}),
        (rollout(AT_NEW, paused=True), False, {"Paused"}),
        (rollout(AT_NEW), True, {"Paused", "Stalled"}),
        (rollout(AT_NEW, failurePolicy={"action": "Abort"}), True, {"Stalled"}),
        (rollout(AT_NEW, **LENIENT), True, {"Reconciling"}),
    ],
    ids=["works", "paused", "too many failures", "aborted", "within the policy"],
)
def test_what_kstatus_reads(known: Rollout, failed: bool, expected: set[str]) -> None:
    first = engine(0, failed=gave_up()) if failed else engine(0)
    seen = world(
        [pod(0), pod(1)],
        [state("n0", [first, engine(1)], {"p0": order("p0", OLD, prepare=""), "p1": OLD})],
    )
    status = status_after(known, seen)
    assert {type_ for type_ in ABNORMAL if is_true(status.conditions, type_)} == expected
    assert is_true(status.conditions, "Progressing") is ("Reconciling" in expected)


def test_a_paused_rollout_that_is_complete_says_both() -> None:
    status = status_after(rollout(DONE, paused=True), served(engine(0, NEW)))
    assert (status.phase, reason_of(status, "Paused"), reason_of(status, "Stalled")) == (
        "Complete",
        "Requested",
        "",
    )


def test_all_that_serve_in_the_end_are_complete_whatever_failed_before() -> None:
    status = status_after(rollout({**AT_NEW, "mostFailed": 3}), served(engine(0, NEW)))
    assert (status.phase, reason_of(status, "Paused"), reason_of(status, "Ready")) == (
        "Complete",
        "",
        "Complete",
    )


def test_available_allows_what_the_budget_allows() -> None:
    for unready, expected in ((1, True), (2, False)):
        pods = [pod(n, ready=n >= unready) for n in range(3)]
        seen = world(
            pods, [state("n0", [engine(n) for n in range(3)], {f"p{n}": OLD for n in range(3)})]
        )
        assert is_true(status_after(rollout(AT_NEW), seen).conditions, "Available") is expected


def test_only_failed_pods_are_left() -> None:
    engines = [engine(0, NEW), engine(1, failed=gave_up())]
    given = {"p0": order("p0", NEW, prepare=""), "p1": order("p1", OLD, prepare="")}
    seen = world([pod(0, shows=NEW), pod(1)], [state("n0", engines, given)])
    status = status_after(rollout(AT_NEW, **LENIENT), seen)
    assert (status.phase, reason_of(status, "Stalled")) == ("Stalled", "ProbeMismatch")
    assert "the others failed" in status.message


def test_conditions_tell_when_they_changed_and_of_which_spec_they_are() -> None:
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": OLD})])
    first = after(rollout(AT_NEW), seen, NOW)
    later = after(replace(first, generation=4), seen, NOW + HOUR / 10)
    for type_ in ("Ready", "Available"):
        then, now = find(first.status.conditions, type_), find(later.status.conditions, type_)
        assert then is not None
        assert now is not None
        assert now.last_transition_time == then.last_transition_time
        assert (then.observed_generation, now.observed_generation) == (3, 4)
    assert later.status.observed_generation == 4
    done = status_after(later, served(engine(0, NEW)), NOW + HOUR / 5)
    ready = find(done.conditions, "Ready")
    assert ready is not None
    assert (ready.status, ready.last_transition_time) == ("True", "2026-01-01T12:12:00Z")


def test_a_condition_has_the_words_of_now() -> None:
    def seen(ready: int) -> Observed:
        engines = [*prepared(ready), *(engine(n) for n in range(ready, 3))]
        return world(
            [pod(n) for n in range(3)], [state("n0", engines, {f"p{n}": OLD for n in range(3)})]
        )

    for known in (
        status_after(rollout(AT_NEW), seen(2)),
        status_after(after(rollout(AT_NEW), seen(1)), seen(2)),
    ):
        ready = find(known.conditions, "Ready")
        assert ready is not None
        assert ready.message == "2 of 3 pods have prepared new"


def test_the_transport_is_that_of_the_nodes_of_now() -> None:
    known = rollout(AT_NEW, staging={"transport": "UCX"})
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": OLD})])
    words = find(status_after(known, seen).conditions, "Staged")
    seen.put("pod", "p1", pod(1, "n1"))
    seen.put("node", "n1", replace(seen.nodes["n0"], name="n1"))
    again = find(status_after(known, seen).conditions, "Staged")
    other = find(status_after(rollout(AT_NEW), seen).conditions, "Staged")
    assert words is not None
    assert again is not None
    assert other is not None
    assert "over UCX between 0 of 1 nodes" in words.message
    assert "UCX" in again.message
    assert "UCX" not in other.message
