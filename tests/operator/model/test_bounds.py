"""Sizes: what strangers or many rollouts can make grow is cut where it is written, and what does
not fit is named.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from hotweights_crds.nodeweights import (
    MAX_PODS,
    MAX_STAGE,
    MAX_TOKEN,
    EngineStatus,
    NodeWeightsSpec,
    PodAssignment,
    RolloutAssignment,
    StagedVersion,
)
from hotweights_crds.weightrollout import MAX_FAILURES
from hotweights_operator.decide import nodes
from hotweights_operator.decide.rollouts import decide
from hotweights_operator.model import fencing
from hotweights_operator.model.actions import Assign
from hotweights_operator.model.objects import NodeState, Pod
from hotweights_operator.model.observed import Observed
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
    rollout,
    state,
    world,
)


def crowd(count: int) -> Observed:
    """So many pods of one rollout on one node; the engines of the first 512 are listed."""
    engines = [engine(n, phase="Prepared", prepared=NEW) for n in range(min(count, MAX_PODS))]
    told = {f"p{n}": OLD for n in range(min(count, MAX_PODS))}
    return world([pod(n) for n in range(count)], [state("n0", engines, told)])


def test_three_hundred_pods_of_a_rollout_on_one_node() -> None:
    decision = decide(rollout(AT_NEW, strategy={"type": "AllAtOnce"}), crowd(300), NOW)
    assert len(orders(decision)) == 300
    assert decision.status is not None
    assert decision.status.failures == []


def test_pods_beyond_what_an_entry_holds_are_named_and_the_others_go_on() -> None:
    decision = decide(rollout(AT_NEW, strategy={"type": "AllAtOnce"}), crowd(MAX_PODS + 7), NOW)
    told = orders(decision)
    assert len(told) == MAX_PODS
    assert set(told) == {f"p{n}" for n in range(MAX_PODS)}, (
        "those that stand in it keep their place"
    )
    status = decision.status
    assert status is not None
    assert {f.reason for f in status.failures} == {"TooManyPods"}
    assert (status.failures_total, len(status.failures)) == (7, 7)


def test_failures_are_counted_and_only_the_first_are_named() -> None:
    engines = [engine(n, phase="Failed", failed=gave_up()) for n in range(50)]
    seen = world(
        [pod(n) for n in range(50)], [state("n0", engines, {f"p{n}": OLD for n in range(50)})]
    )
    status = decide(rollout(AT_NEW, failurePolicy={"maxFailed": 100}), seen, NOW).status
    assert status is not None
    assert (len(status.failures), status.failures_total, status.pods.failed, status.most_failed) == (
        MAX_FAILURES, 50, 50, 50,
    )  # fmt: skip


def test_pods_on_forty_versions_of_their_own() -> None:
    """Left over from rollouts that came and went: a node is told to hold what it has room for, the
    rollout's own versions first.
    """
    digests = [f"sha256:{n}" for n in range(40)]
    engines = [engine(n, digests[n]) for n in range(40)]
    told = {f"p{n}": order(f"p{n}", digests[n], prepare="", revision=1) for n in range(40)}
    seen = world(
        [pod(n, shows=digests[n]) for n in range(40)], [state("n0", engines, told, listed=[OLD])]
    )
    decision = decide(rollout(AT_NEW), seen, NOW)
    (action,) = decision.actions
    assert isinstance(action, Assign)
    assert action.entry is not None
    assert len(action.entry.pods) == 40
    assert {NEW, OLD} <= {item.digest for item in action.entry.stage}
    assert len(action.entry.stage) <= MAX_STAGE


def test_a_hundred_rollouts_on_one_node() -> None:
    rollouts, pods, entries = [], [], []
    engines: list[EngineStatus] = []
    for n in range(100):
        name, app = f"llm-{n}", f"app-{n}"
        made = rollout({**AT_NEW}, target={"selector": {"matchLabels": {"app": app}}})
        rollouts.append(replace(made, uid=f"r{n}", name=name))
        known: Pod = pod(n)
        pods.append(replace(known, labels={**known.labels, "app": app}))
        engines.append(engine(n, phase="Prepared", prepared=NEW))
        entries.append(
            RolloutAssignment(
                uid=f"r{n}", namespace="models", name=name, pods=[order(f"p{n}", OLD)]
            )
        )
    plain = state("n0", engines)
    seen = world(pods, [replace(plain, spec=NodeWeightsSpec(rollouts=entries))], rollouts=rollouts)
    for each in rollouts:
        assert next(iter(orders(decide(each, seen, NOW)).values())).digest == NEW
    assert nodes.decide("n0", seen).actions == ()


@pytest.mark.parametrize("said", [MAX_TOKEN, MAX_TOKEN - 1])
def test_a_token_never_exceeds_what_can_be_written(said: int) -> None:
    known = NodeState("n0", status=state("n0", [engine(0, token=said)]).status)
    wanted = PodAssignment(uid="p0", name="p0", namespace="models", digest=NEW)
    assert fencing.next_token(known, 0, wanted, "r").token == MAX_TOKEN


def test_texts_of_others_are_cut() -> None:
    failed = gave_up(reason="X" * 64, message="y" * 512)
    long = StagedVersion(digest=NEW, phase="Failed", reason="Z" * 64, message="z" * 512)
    for known in (
        state("n0", [engine(0, phase="Failed", failed=failed)], {"p0": OLD}),
        state("n0", [engine(0)], {"p0": OLD}, staged=[long]),
    ):
        status = decide(rollout(AT_NEW), world([pod(0)], [known]), NOW).status
        assert status is not None
        assert len(status.message) <= 1024
        assert all(len(condition.message) <= 1024 for condition in status.conditions)
