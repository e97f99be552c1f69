"""One step of a rollout, case by case: what is observed, and what is done and said about it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from hotweights_crds.conditions import find, is_true
from hotweights_crds.nodeweights import StagedVersion
from hotweights_crds.weightrollout import Strategy
from hotweights_operator.decide.rollouts import decide
from tests.operator.worlds import (
    AT_NEW,
    NEW,
    NOW,
    OLD,
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


def test_a_new_version_begins_a_revision() -> None:
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": OLD})])
    decision = decide(rollout(), seen, NOW)
    assert decision.status is not None
    assert (decision.status.revision, decision.status.target.digest) == (1, NEW)
    assert next(event.reason for event in decision.events) == "RevisionStarted"


@pytest.mark.parametrize(("budget", "count"), [(1, 1), (2, 2), ("50%", 2), ("10%", 1), ("100%", 4)])
def test_rolling_changes_as_many_as_the_budget_says(budget: int | str, count: int) -> None:
    seen = world(
        [pod(n) for n in range(4)], [state("n0", prepared(4), {f"p{n}": OLD for n in range(4)})]
    )
    changed = decide(
        rollout(AT_NEW, strategy={"type": "Rolling", "rolling": {"maxUnavailable": budget}}),
        seen,
        NOW,
    )
    assert len(told_to_change(changed)) == count


def test_a_pod_that_is_not_ready_costs_the_budget_and_changes_first() -> None:
    pods = [pod(0), pod(1), pod(2, ready=False)]
    seen = world(
        pods, [state("n0", prepared(3), {f"p{n}": OLD for n in range(3)})], clock=lambda: NOW
    )
    assert told_to_change(decide(rollout(AT_NEW), seen, NOW)) == {"p2"}


def test_an_activation_that_is_not_confirmed_costs_the_budget() -> None:
    engines = [engine(0, phase="Committing"), *prepared(2)[1:]]
    seen = world([pod(0), pod(1)], [state("n0", engines, {"p0": NEW, "p1": OLD})])
    assert told_to_change(decide(rollout(AT_NEW), seen, NOW)) == set()


def test_all_at_once_changes_all() -> None:
    seen = world(
        [pod(n) for n in range(3)], [state("n0", prepared(3), {f"p{n}": OLD for n in range(3)})]
    )
    assert (
        len(told_to_change(decide(rollout(AT_NEW, strategy={"type": "AllAtOnce"}), seen, NOW))) == 3
    )


def test_nobody_changes_before_everybody_has_prepared() -> None:
    engines = [*prepared(1), engine(1, phase="Preparing")]
    seen = world([pod(0), pod(1)], [state("n0", engines, {"p0": OLD, "p1": OLD})])
    assert (
        told_to_change(
            decide(rollout(AT_NEW, strategy=Strategy(type="AllAtOnce").to_dict()), seen, NOW)
        )
        == set()
    )


def test_a_pod_without_an_engine_is_named_and_the_others_go_on() -> None:
    seen = world([pod(0), pod(1)], [state("n0", prepared(1), {"p0": OLD, "p1": ""})])
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert told_to_change(decision) == {"p0"}
    assert decision.status is not None
    assert [(f.pod, f.reason) for f in decision.status.failures] == [("p1", "EngineNotConnected")]
    assert decision.status.pods.failed == 0


def test_a_node_without_its_agent_is_named_and_the_others_go_on() -> None:
    states = [state("n0", prepared(1), {"p0": OLD}), state("n1", [engine(1)], {"p1": OLD})]
    seen = world([pod(0), pod(1, "n1")], states, agents={"n0": True, "n1": False})
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert told_to_change(decision) == {"p0"}
    assert decision.status is not None
    assert [(f.pod, f.reason) for f in decision.status.failures] == [("p1", "AgentMissing")]


REFUSED = engine(
    0,
    phase="Refused",
    failed=gave_up(
        step="Prepare", reason="ShapeMismatch", message="lm_head.weight: (2, 3) into (2, 4)"
    ),
)


@pytest.mark.parametrize(
    ("action", "phase", "paused"), [("Pause", "Stalled", True), ("Abort", "Aborted", False)]
)
def test_a_refusal_beyond_the_policy_holds_the_rollout_and_says_why(
    action: str, phase: str, paused: bool
) -> None:
    seen = world(
        [pod(0), pod(1)], [state("n0", [REFUSED, *prepared(2)[1:]], {"p0": OLD, "p1": OLD})]
    )
    decision = decide(rollout(AT_NEW, failurePolicy={"maxFailed": 0, "action": action}), seen, NOW)
    status = decision.status
    assert status is not None
    assert told_to_change(decision) == set()
    stalled = find(status.conditions, "Stalled")
    assert stalled is not None
    assert (status.phase, stalled.reason) == (phase, "ShapeMismatch")
    assert "lm_head.weight" in status.message
    assert is_true(status.conditions, "Paused") is paused
    assert status.aborted_revision == (2 if action == "Abort" else 0)
    assert status.pods.available == 2


def test_a_refusal_within_the_policy_lets_the_others_go_on() -> None:
    seen = world(
        [pod(0), pod(1)], [state("n0", [REFUSED, *prepared(2)[1:]], {"p0": OLD, "p1": OLD})]
    )
    assert told_to_change(decide(rollout(AT_NEW, failurePolicy={"maxFailed": 1}), seen, NOW)) == {
        "p1"
    }


def test_a_damaged_source_stalls_with_the_agent_s_words() -> None:
    failed = [
        StagedVersion(digest=OLD, phase="Staged"),
        StagedVersion(
            digest=NEW,
            phase="Failed",
            reason="ChecksumMismatch",
            message="model.safetensors, chunk 3",
        ),
    ]
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": OLD}, staged=failed)])
    status = decide(rollout(AT_NEW), seen, NOW).status
    assert status is not None
    stalled = find(status.conditions, "Stalled")
    assert stalled is not None
    assert stalled.reason == "ChecksumMismatch"
    assert "model.safetensors, chunk 3" in stalled.message


def test_paused_by_the_user_means_nothing_new() -> None:
    seen = world([pod(0)], [state("n0", prepared(1), {"p0": OLD})])
    decision = decide(rollout(AT_NEW, paused=True), seen, NOW + timedelta(days=1))
    assert told_to_change(decision) == set()
    assert decision.status is not None
    assert decision.status.phase == "Paused"
    assert not is_true(decision.status.conditions, "Stalled")


def test_a_new_pod_gets_the_rollout_s_version_at_once_and_the_stable_one_while_it_holds() -> None:
    fresh = pod(1, ready=False, was_ready=False, gate=False)
    seen = world([pod(0), fresh], [state("n0", prepared(1), {"p0": OLD})])
    assert told(decide(rollout(AT_NEW), seen, NOW))["p1"] == NEW
    assert told(decide(rollout(AT_NEW, paused=True), seen, NOW))["p1"] == OLD
    assert told(decide(rollout({**AT_NEW, "abortedRevision": 2}), seen, NOW))["p1"] == OLD


def test_complete_is_what_every_engine_has_proved() -> None:
    engines = [engine(0, NEW), engine(1, NEW)]
    seen = world(
        [pod(0, shows=NEW), pod(1, shows=NEW)], [state("n0", engines, {"p0": NEW, "p1": NEW})]
    )
    status = decide(rollout(AT_NEW), seen, NOW).status
    assert status is not None
    assert (status.phase, status.rollback, status.progress) == ("Complete", "Local", "2/2")
    assert is_true(status.conditions, "Ready")
    assert find(status.conditions, "Reconciling") is None
    assert (status.history[0].outcome, status.history[0].revision) == ("Complete", 2)
    assert (status.stable.digest, status.previous.digest) == (NEW, OLD)


def test_a_container_that_started_again_has_proved_nothing_yet() -> None:
    later = datetime.fromisoformat("2026-01-01T11:30:00+00:00")
    seen = world(
        [pod(0, shows=NEW, engine_started_at=later)], [state("n0", [engine(0, NEW)], {"p0": NEW})]
    )
    status = decide(rollout(AT_NEW), seen, NOW).status
    assert status is not None
    assert (status.pods.updated, is_true(status.conditions, "Ready")) == (0, False)


def test_the_younger_of_two_rollouts_for_one_pod_stalls() -> None:
    older = replace(rollout(), uid="older", name="older", created_at="2025")
    seen = world([pod(0)], [state("n0", prepared(1), {"p0": OLD})], rollouts=[rollout(), older])
    status = decide(rollout(AT_NEW), seen, NOW).status
    assert status is not None
    stalled = find(status.conditions, "Stalled")
    assert stalled is not None
    assert stalled.reason == "TargetConflict"
    assert "older" in stalled.message


def test_without_pods_it_says_so_and_is_not_ready() -> None:
    status = decide(rollout(AT_NEW), world([], []), NOW).status
    assert status is not None
    ready = find(status.conditions, "Ready")
    assert ready is not None
    assert (ready.status, ready.reason) == ("False", "NoTargets")


def test_a_version_made_anew_under_its_name_is_a_new_revision() -> None:
    seen = world(
        [pod(0)],
        [state("n0", [engine(0, NEW)], {"p0": NEW})],
        versions=[version("new", "sha256:other")],
    )
    status = decide(rollout(AT_NEW), seen, NOW).status
    assert status is not None
    assert (status.revision, status.target.digest) == (3, "sha256:other")
    assert status.history[0].outcome == "Superseded"


def test_every_order_says_of_which_revision_it_is_and_how_often_the_container_had_restarted() -> (
    None
):
    seen = world(
        [pod(0, restarts=4)], [state("n0", prepared(1), {"p0": order("p0", OLD, revision=1)})]
    )
    given = orders(decide(rollout(AT_NEW), seen, NOW))["p0"]
    assert (given.digest, given.token, given.revision, given.restarts) == (NEW, 2, 2, 4)
