"""Pods without a rollout, the objects of nodes, and what is left over: all of it found by looking,
not by having seen it go.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hotweights_crds.nodeweights import (
    MAX_PODS,
    UNASSIGNED,
    PodAssignment,
    ResolveItem,
    RolloutAssignment,
)
from hotweights_operator.decide import nodes
from hotweights_operator.model.actions import AskResolve, Assign, CreateNodeWeights
from hotweights_operator.model.objects import Node, NodeState
from hotweights_operator.model.observed import Observed
from tests.operator.worlds import (
    OLD,
    OTHER,
    engine,
    gave_up,
    order,
    pod,
    state,
    version,
    world,
)


def both(first: NodeState, second: NodeState) -> NodeState:
    """One node with the entries of two."""
    spec = first.spec.model_copy(update={"rollouts": [*first.spec.rollouts, *second.spec.rollouts]})
    return replace(first, spec=spec)


# -- pods without a rollout, and what is left over ----------------------------------------------


def unassigned(seen: Observed) -> RolloutAssignment:
    """The entry that is written for them."""
    (action,) = nodes.decide("n0", seen).actions
    if not isinstance(action, Assign) or action.uid != UNASSIGNED or action.entry is None:
        raise LookupError(f"another action: {action}")
    return action.entry


def test_a_node_has_an_object_if_it_has_an_agent_or_a_pod_that_stays() -> None:
    create = (CreateNodeWeights("n0", "u"),)
    node = {"n0": Node("n0", "u")}
    assert nodes.decide("n0", world([], [], nodes=node, agents={"n0": True})).actions == create
    assert nodes.decide("n0", world([pod(0)], [], nodes=node, agents={})).actions == create
    assert (
        nodes.decide("n0", world([pod(0, terminating=True)], [], nodes=node, agents={})).actions
        == ()
    )
    assert nodes.decide("n0", world([], [], nodes=node, agents={})).actions == ()


def test_an_orphan_s_version_stays_staged() -> None:
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": OLD}, "gone")], rollouts=[])
    assert [item.digest for item in unassigned(seen).stage] == [OLD]


def test_an_orphan_that_does_what_it_is_told_is_not_told_anew_for_an_old_failure() -> None:
    given = order("p0", OLD, prepare="", revision=0, token=1)
    failed = engine(0, OLD, failed=gave_up(OLD, revision=0, token=1))
    known = state("n0", [failed], {"p0": given}, UNASSIGNED, listed=(OLD,))
    assert nodes.decide("n0", world([pod(0)], [known], rollouts=[])).actions == ()


def test_an_orphan_that_keeps_what_it_boots_goes_on_so_however_often_it_ended() -> None:
    given = order("p0", "", prepare="", revision=0, version="")
    known = state("n0", [engine(0, OTHER)], {"p0": given}, UNASSIGNED, listed=())
    ended = pod(0, restarts=3, last_run_seconds=4.0)
    assert nodes.decide("n0", world([ended], [known], rollouts=[])).actions == ()


@pytest.mark.parametrize("phase", ["Booting", "Committing"])
def test_a_pod_without_a_rollout_is_not_told_what_its_engine_said_in_the_middle_of_something(
    phase: str,
) -> None:
    seen = world([pod(0)], [state("n0", [engine(0, OTHER, phase=phase)])], rollouts=[])
    assert unassigned(seen).pods[0].digest == ""


def test_a_pod_stands_among_those_without_a_rollout_until_its_rollout_has_written() -> None:
    given = order("p0", OLD, prepare="", revision=0)
    known = state("n0", [engine(0)], {"p0": given}, UNASSIGNED, listed=(OLD,))
    assert nodes.decide("n0", world([pod(0)], [known])).actions == ()
    taken = both(known, state("n0", told={"p0": order("p0", OLD, token=2)}))
    assert nodes.decide("n0", world([pod(0)], [taken])).actions == (
        Assign("n0", "50", UNASSIGNED, None),
    )


def test_a_pod_that_has_ended_stands_nowhere() -> None:
    assert (
        nodes.decide("n0", world([pod(0, finished=True)], [state("n0")], rollouts=[])).actions == ()
    )


@pytest.mark.parametrize(
    "where", [[], [pod(0, "n1")], [pod(0, finished=True)]], ids=["gone", "elsewhere", "ended"]
)
def test_a_deleted_rollout_s_entry_goes_with_its_pods(where: Any) -> None:
    seen = world(where, [state("n0", [], {"p0": OLD}, "gone")], rollouts=[])
    assert nodes.decide("n0", seen).actions == (Assign("n0", "50", "gone", None),)


def test_a_deleted_rollout_s_entry_stays_until_its_pod_s_next_one_has_written() -> None:
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": OLD}, "gone")])
    assert nodes.decide("n0", seen).actions == ()


def test_a_living_rollout_s_entry_is_its_own_to_take_out() -> None:
    assert nodes.decide("n0", world([], [state("n0", [], {"p0": OLD})])).actions == ()


def test_requests_go_with_their_versions_and_one_write_at_a_time() -> None:
    def item(known: Any) -> ResolveItem:
        return ResolveItem(
            uid=known.uid,
            namespace="models",
            name=known.name,
            model="m",
            version="v",
            uri="file:///v",
        )

    here, gone = version("here", ""), version("gone", "")
    known = state("n0", [], {"p0": OLD}, "gone")
    known = replace(known, spec=known.spec.model_copy(update={"resolve": [item(here), item(gone)]}))
    seen = world([], [known], rollouts=[], versions=[here])
    first = nodes.decide("n0", seen)
    assert (first.actions, first.again_in_seconds) == ((Assign("n0", "50", "gone", None),), 0.0)
    after = replace(known, spec=known.spec.model_copy(update={"rollouts": []}))
    second = nodes.decide("n0", world([], [after], rollouts=[], versions=[here]))
    assert (second.actions, second.again_in_seconds) == (
        (AskResolve("n0", "50", gone.uid, None),),
        None,
    )


def test_those_who_stand_there_keep_their_place() -> None:
    numbers = range(100, 100 + MAX_PODS)
    given: dict[str, str | PodAssignment] = {
        f"p{n}": order(f"p{n}", "", prepare="", revision=0) for n in numbers
    }
    known = state("n0", [], given, UNASSIGNED, listed=())
    assert (
        nodes.decide(
            "n0", world([pod(0), *(pod(n) for n in numbers)], [known], rollouts=[])
        ).actions
        == ()
    )
