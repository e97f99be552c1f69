"""Namespaces keep apart: a rollout knows the pods, the versions and the rollouts of its own one,
and no others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hotweights_crds.nodeweights import RolloutAssignment, StageItem
from hotweights_operator.decide.rollouts import conflicts, decide
from hotweights_operator.model.actions import Assign, RolloutDecision
from hotweights_operator.model.selectors import selects
from tests.operator.worlds import (
    AT_NEW,
    NEW,
    NOW,
    OLD,
    OTHER,
    engine,
    order,
    orders,
    pod,
    prepared,
    rollout,
    state,
    version,
    world,
)


def theirs(number: int) -> Any:
    """A pod of another namespace, with the same labels."""
    return replace(pod(number), namespace="team-b")


def staged_from(decision: RolloutDecision) -> set[str]:
    """The sources that nodes are told to read."""
    entries = [
        action.entry for action in decision.actions if isinstance(action, Assign) and action.entry
    ]
    return {item.uri for entry in entries for item in entry.stage}


def test_pods_of_another_namespace_are_not_changed_though_their_labels_are_the_same() -> None:
    seen = world([pod(0), theirs(1)], [state("n0", prepared(2), {"p0": OLD})])
    decision = decide(rollout(AT_NEW), seen, NOW)
    assert set(orders(decision)) == {"p0"}
    assert decision.status is not None
    assert decision.status.pods.desired == 1


def test_a_rollout_of_another_namespace_is_no_conflict() -> None:
    older = replace(
        rollout(AT_NEW), uid="older", name="older", created_at="2025", namespace="team-b"
    )
    seen = world(
        [pod(0), theirs(1)],
        [state("n0", prepared(2), {"p0": OLD})],
        rollouts=[older, rollout(AT_NEW)],
    )
    assert conflicts(rollout(AT_NEW), seen) == []
    assert [known.uid for known in seen.owners.rollouts_in("models")] == ["r"]


def test_a_version_of_another_namespace_is_not_used_by_its_name() -> None:
    seen = world(
        [pod(0)],
        [state("n0", [engine(0)], {"p0": OLD})],
        versions=[version("new", OTHER, "team-b")],
    )
    status = decide(rollout(AT_NEW), seen, NOW).status
    assert status is not None
    assert (status.revision, status.message) == (
        2,
        "WeightVersion new does not exist in namespace models: create it",
    )


def test_a_source_of_another_namespace_is_not_read_by_its_digest() -> None:
    versions = [replace(version("new", NEW, "team-b"), name="theirs"), version("new", NEW)]
    secret = replace(
        versions[0],
        spec=versions[0].spec.model_copy(
            update={"source": versions[0].spec.source.model_copy(update={"uri": "file:///secret"})}
        ),
    )
    item = StageItem(digest=NEW, namespace="team-b", model="m", version="new", uri="file:///secret")
    served = {"p0": order("p0", NEW, prepare="", revision=1)}
    bare = state("n0", [engine(0, NEW)], served, listed=(OLD,))
    with_theirs = [
        *bare.spec.rollouts,
        RolloutAssignment(uid="t", namespace="team-b", name="t", stage=[item]),
    ]
    node = replace(bare, spec=bare.spec.model_copy(update={"rollouts": with_theirs}))
    assert "file:///secret" not in staged_from(
        decide(rollout(AT_NEW), world([pod(0)], [node], versions=[]), NOW)
    )
    bare = state("n0", [engine(0)], {"p0": order("p0", OLD, prepare="", revision=1)}, listed=(OLD,))
    for known in ([secret], []):
        with_theirs = [
            *bare.spec.rollouts,
            RolloutAssignment(uid="t", namespace="team-b", name="t", stage=[item]),
        ]
        node = replace(bare, spec=bare.spec.model_copy(update={"rollouts": with_theirs}))
        running = {**AT_NEW, "preparedRevision": 2}
        decision = decide(rollout(running), world([pod(0)], [node], versions=known), NOW)
        assert "file:///secret" not in staged_from(decision)
    decision = decide(rollout(AT_NEW), world([pod(0)], [bare], versions=[secret, versions[1]]), NOW)
    assert staged_from(decision) == {"file:///old", "file:///new"}


def test_what_is_being_deleted_is_neither_rolled_out_nor_owns_anything() -> None:
    going = replace(version("new", OTHER), terminating=True)
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": OLD})], versions=[going])
    status = decide(rollout(AT_NEW), seen, NOW).status
    assert status is not None
    assert (status.revision, status.target.digest, status.phase) == (2, NEW, "Pending")
    older = replace(rollout(AT_NEW), uid="older", name="older", created_at="2025", terminating=True)
    seen = world(
        [pod(0)], [state("n0", prepared(1), {"p0": OLD})], rollouts=[older, rollout(AT_NEW)]
    )
    owner = seen.owners.owner("p0")
    assert owner is not None
    assert (owner.uid, conflicts(rollout(AT_NEW), seen)) == ("r", [])


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({"matchLabels": {"a": "1"}}, True),
        ({"matchLabels": {"a": "1", "b": "3"}}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["2"]}]}, False),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, False),
        ({"matchExpressions": [{"key": "c", "operator": "NotIn", "values": ["1"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, True),
        ({"matchExpressions": [{"key": "c", "operator": "Exists"}]}, False),
        ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, False),
        (
            {
                "matchLabels": {"a": "1"},
                "matchExpressions": [{"key": "b", "operator": "DoesNotExist"}],
            },
            False,
        ),
    ],
)
def test_selectors_mean_what_they_mean_in_kubernetes(
    selector: dict[str, Any], expected: bool
) -> None:
    known = rollout(target={"selector": selector}).spec.target.selector
    assert selects(known, {"a": "1", "b": "2"}) is expected
