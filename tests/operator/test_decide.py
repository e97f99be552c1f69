"""One step of a rollout, case by case: what is observed, and what is done and said about it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from hotweights_crds.conditions import find, is_true
from hotweights_crds.nodeweights import EngineStatus, NodeWeightsStatus, PodAssignment, RolloutAssignment, StagedVersion
from hotweights_crds.weightrollout import Strategy, WeightRolloutSpec, WeightRolloutStatus
from hotweights_crds.weightversion import WeightVersionSpec, WeightVersionStatus
from hotweights_operator import nodes, versions
from hotweights_operator.actions import AskResolve, Assign, CreateNodeWeights, RolloutDecision
from hotweights_operator.decide import decide
from hotweights_operator.model import Node, NodeState, Observed, Pod, Rollout, Version

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
OLD, NEW = "sha256:old", "sha256:new"
CONFIRMED = "2026-01-01T11:00:00Z"
Ready = dict[str, Any]


def version(name: str, digest: str) -> Version:
    spec = WeightVersionSpec.from_dict({"model": "m", "version": name, "source": {"uri": f"file:///{name}"}})
    ready = {"type": "Ready", "status": "True", "reason": "Resolved", "lastTransitionTime": "x"}
    status = WeightVersionStatus.from_dict({"digest": digest, "conditions": [ready] if digest else []})
    return Version(f"uid-{name}", name, "models", 1, "1", spec, status)


def rollout(status: Ready | None = None, **spec: Any) -> Rollout:
    full = {"versionRef": {"name": "new"}, "target": {"selector": {"matchLabels": {"app": "llm"}}}, **spec}
    return Rollout(
        "r",
        "llm",
        "models",
        3,
        "1",
        "2026",
        WeightRolloutSpec.from_dict(full),
        WeightRolloutStatus.from_dict(status or {}),
    )


def pod(number: int, node: str = "n0", **more: Any) -> Pod:
    started = datetime(2026, 1, 1, 10, tzinfo=UTC)
    base = Pod(f"p{number}", f"p{number}", "models", node, {"app": "llm"}, True, True, started)
    return replace(base, **more)


def engine(number: int, digest: str = OLD, **more: Any) -> EngineStatus:
    values = {
        "pod_uid": f"p{number}",
        "phase": "Serving",
        "digest": digest,
        "confirmed_at": CONFIRMED,
        "token": 1,
        **more,
    }
    return EngineStatus(**values)


def state(
    node: str, engines: list[EngineStatus], digests: dict[str, str], entry: str = "r", **staged: Any
) -> NodeState:
    """A node that holds both versions, with the given assignments."""
    held = [StagedVersion(digest=digest, phase="Staged", bytes_done=1, bytes_total=1) for digest in (OLD, NEW)]
    orders = [
        PodAssignment(uid=u, name=u, namespace="models", token=1, digest=d, prepare=NEW) for u, d in digests.items()
    ]
    spec = NodeState("x").spec.model_copy(update={"rollouts": [RolloutAssignment(uid=entry, pods=orders)]})
    status = NodeWeightsStatus(
        observed_generation=5,
        boot_id="b",
        endpoint=f"tcp://{node}:1",
        staged=staged.get("staged", held),
        engines=engines,
    )
    return NodeState(node, 5, "50", spec, status)


def world(pods: list[Pod], states: list[NodeState], **more: Any) -> Observed:
    names = {p.node for p in pods} | {s.name for s in states}
    values: dict[str, Any] = {
        "rollouts": [rollout()],
        "versions": [version("old", OLD), version("new", NEW)],
        "nodes": {name: Node(name, f"uid-{name}") for name in names},
        "agents": dict.fromkeys(names, True),
        "states": {s.name: s for s in states},
        "pods": pods,
    }
    return Observed(**{**values, **more})


AT_NEW: Ready = {
    "revision": 2,
    "target": {"name": "new", "version": "new", "digest": NEW},
    "previous": {"name": "old", "version": "old", "digest": OLD},
    "lastProgressAt": "2026-01-01T11:59:00Z",
}


def orders(decision: RolloutDecision) -> dict[str, tuple[int, str]]:
    """Pod → token and digest, over all writes."""
    return {
        order.uid: (order.token, order.digest)
        for action in decision.actions
        if isinstance(action, Assign) and action.entry
        for order in action.entry.pods
    }


def prepared(count: int, **more: Any) -> list[EngineStatus]:
    return [engine(number, phase="Prepared", prepared=NEW, **more) for number in range(count)]


def told_to_change(decision: RolloutDecision) -> set[str]:
    return {uid for uid, (token, digest) in orders(decision).items() if digest == NEW and token == 2}


def test_a_new_version_begins_a_revision_and_nothing_else_happens_in_that_step() -> None:
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": OLD})])
    decision = decide(rollout(), seen, NOW)
    assert decision.actions == ()
    assert decision.again_in_seconds == 0
    assert decision.status is not None
    assert (decision.status.revision, decision.status.target.digest) == (1, NEW)
    assert next(event.reason for event in decision.events) == "RevisionStarted"


@pytest.mark.parametrize(("budget", "count"), [(1, 1), (2, 2), ("50%", 2), ("10%", 1), ("100%", 4)])
def test_rolling_changes_as_many_as_the_budget_says(budget: int | str, count: int) -> None:
    seen = world([pod(n) for n in range(4)], [state("n0", prepared(4), {f"p{n}": OLD for n in range(4)})])
    changed = decide(rollout(AT_NEW, strategy={"type": "Rolling", "rolling": {"maxUnavailable": budget}}), seen, NOW)
    assert len(told_to_change(changed)) == count


def test_a_pod_that_is_not_ready_costs_the_budget_and_changes_first() -> None:
    pods = [pod(0), pod(1), pod(2, ready=False)]
    seen = world(pods, [state("n0", prepared(3), {f"p{n}": OLD for n in range(3)})])
    assert told_to_change(decide(rollout(AT_NEW), seen, NOW)) == {"p2"}


def test_an_activation_that_is_not_confirmed_costs_the_budget() -> None:
    engines = [engine(0, phase="Committing"), *prepared(2)[1:]]
    seen = world([pod(0), pod(1)], [state("n0", engines, {"p0": NEW, "p1": OLD})])
    assert told_to_change(decide(rollout(AT_NEW), seen, NOW)) == set()


def test_all_at_once_changes_all() -> None:
    seen = world([pod(n) for n in range(3)], [state("n0", prepared(3), {f"p{n}": OLD for n in range(3)})])
    assert len(told_to_change(decide(rollout(AT_NEW, strategy={"type": "AllAtOnce"}), seen, NOW))) == 3


def test_nobody_changes_before_everybody_has_prepared() -> None:
    engines = [*prepared(1), engine(1, phase="Preparing")]
    seen = world([pod(0), pod(1)], [state("n0", engines, {"p0": OLD, "p1": OLD})])
    assert told_to_change(decide(rollout(AT_NEW, strategy=Strategy(type="AllAtOnce").to_dict()), seen, NOW)) == set()


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


REFUSED = engine(0, phase="Refused", reason="ShapeMismatch", message="lm_head.weight: (2, 3) into (2, 4)")


@pytest.mark.parametrize(("action", "phase", "paused"), [("Pause", "Stalled", True), ("Abort", "Aborted", False)])
def test_a_refusal_beyond_the_policy_holds_the_rollout_and_says_why(action: str, phase: str, paused: bool) -> None:
    seen = world([pod(0), pod(1)], [state("n0", [REFUSED, *prepared(2)[1:]], {"p0": OLD, "p1": OLD})])
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
    seen = world([pod(0), pod(1)], [state("n0", [REFUSED, *prepared(2)[1:]], {"p0": OLD, "p1": OLD})])
    assert told_to_change(decide(rollout(AT_NEW, failurePolicy={"maxFailed": 1}), seen, NOW)) == {"p1"}


def test_a_damaged_source_stalls_with_the_agent_s_words() -> None:
    failed = [
        StagedVersion(digest=OLD, phase="Staged"),
        StagedVersion(digest=NEW, phase="Failed", reason="ChecksumMismatch", message="model.safetensors, chunk 3"),
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


def test_a_new_pod_gets_the_rollout_s_version_at_once_and_the_last_complete_one_while_it_holds() -> None:
    fresh = pod(1, ready=False, was_ready=False)
    seen = world([pod(0), fresh], [state("n0", prepared(1), {"p0": OLD})])
    assert orders(decide(rollout(AT_NEW), seen, NOW))["p1"] == (1, NEW)
    assert orders(decide(rollout(AT_NEW, paused=True), seen, NOW))["p1"] == (1, OLD)
    aborted = {**AT_NEW, "abortedRevision": 2}
    assert orders(decide(rollout(aborted), seen, NOW))["p1"] == (1, OLD)


def test_the_deadline_counts_from_the_last_progress() -> None:
    seen = world([pod(0)], [state("n0", [engine(0, phase="Preparing")], {"p0": OLD})])
    first = decide(rollout(AT_NEW), seen, NOW).status
    assert first is not None
    running = rollout(first.to_dict())
    again = decide(running, seen, NOW + timedelta(seconds=100))
    assert again.again_in_seconds == pytest.approx(501)
    status = decide(running, seen, NOW + timedelta(seconds=600)).status
    assert status is not None
    stalled = find(status.conditions, "Stalled")
    assert stalled is not None
    assert stalled.reason == "ProgressDeadlineExceeded"


def test_complete_is_what_every_engine_has_proved() -> None:
    engines = [engine(0, NEW), engine(1, NEW)]
    seen = world([pod(0), pod(1)], [state("n0", engines, {"p0": NEW, "p1": NEW})])
    status = decide(rollout(AT_NEW), seen, NOW).status
    assert status is not None
    assert (status.phase, status.rollback, status.progress) == ("Complete", "Local", "2/2")
    assert is_true(status.conditions, "Ready")
    assert find(status.conditions, "Reconciling") is None
    assert (status.history[0].outcome, status.history[0].revision) == ("Complete", 2)


def test_a_container_that_started_again_has_proved_nothing_yet() -> None:
    later = datetime(2026, 1, 1, 11, 30, tzinfo=UTC)
    seen = world([pod(0, engine_started_at=later)], [state("n0", [engine(0, NEW)], {"p0": NEW})])
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


def test_setting_the_version_back_keeps_the_other_one_staged() -> None:
    done = {**AT_NEW, "history": [{"revision": 2, "version": "new", "outcome": "Complete"}]}
    back = rollout(done, versionRef={"name": "old"})
    status = decide(back, world([pod(0)], [state("n0", [engine(0, NEW)], {"p0": NEW})]), NOW).status
    assert status is not None
    assert (status.revision, status.target.digest, status.previous.digest) == (3, OLD, NEW)


def test_a_version_made_anew_under_its_name_is_a_new_revision() -> None:
    seen = world([pod(0)], [state("n0", [engine(0, NEW)], {"p0": NEW})], versions=[version("new", "sha256:other")])
    status = decide(rollout(AT_NEW), seen, NOW).status
    assert status is not None
    assert (status.revision, status.target.digest) == (3, "sha256:other")
    assert status.history[0].outcome == "Superseded"


def test_an_aborted_pod_is_set_back_to_what_it_serves() -> None:
    failed = engine(0, OLD, phase="Failed", reason="CommitFailed")
    seen = world([pod(0)], [state("n0", [failed], {"p0": NEW})])
    decision = decide(rollout(AT_NEW, failurePolicy={"action": "Abort"}), seen, NOW)
    assert orders(decision)["p0"] == (2, OLD)


# -- nodes and versions ------------------------------------------------------------------------------------------------


def test_a_node_with_opted_in_pods_gets_its_object() -> None:
    seen = world([pod(0)], [])
    assert nodes.decide("n0", seen).actions == (CreateNodeWeights("n0", "uid-n0"),)


def test_a_pod_without_a_rollout_is_told_to_keep_what_it_boots() -> None:
    seen = world([pod(0)], [state("n0", [], {})], rollouts=[])
    (action,) = nodes.decide("n0", seen).actions
    assert isinstance(action, Assign)
    assert action.entry is not None
    assert [(p.uid, p.digest) for p in action.entry.pods] == [("p0", "")]


def test_a_version_is_resolved_by_one_agent_and_another_one_when_that_dies() -> None:
    states = [state("n0", [], {}), state("n1", [], {})]
    seen = world([], states)
    (first,) = versions.decide(version("v", ""), seen, NOW).actions
    assert isinstance(first, AskResolve)
    asked = states[int(first.node[1])]
    spec = asked.spec.model_copy(update={"resolve": [first.item]})
    others = {s.name: s for s in states} | {asked.name: replace(asked, spec=spec)}
    dead = replace(seen, states=others, agents={"n0": True, "n1": True, asked.name: False})
    again = versions.decide(version("v", ""), dead, NOW).actions
    assert {(a.node == asked.name, a.item is None) for a in again if isinstance(a, AskResolve)} == {
        (True, True),
        (False, False),
    }
