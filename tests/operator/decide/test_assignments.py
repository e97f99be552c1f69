"""Entries: no pod ever stands in none, nothing stays that nobody needs, and what a node is to
hold.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hotweights_crds.nodeweights import (
    MAX_STAGE,
)
from hotweights_operator.decide import assignments
from hotweights_operator.decide.rollouts import decide
from hotweights_operator.model.actions import Assign, RolloutDecision
from hotweights_operator.model.objects import Node, NodeState
from hotweights_operator.model.observed import Observed
from tests.operator.worlds import (
    AT_NEW,
    NEW,
    NOW,
    OLD,
    OTHER,
    Fields,
    engine,
    entry_on,
    order,
    pod,
    prepared,
    rollout,
    staged_on,
    state,
    version,
    world,
)

ELSEWHERE: Fields = {"target": {"selector": {"matchLabels": {"app": "another"}}}}


def pods_on(decision: RolloutDecision, node: str = "n0") -> set[str]:
    """Pods that stand in it."""
    entry = entry_on(decision, node)
    return {given.uid for given in entry.pods} if entry else set()


def both(first: NodeState, second: NodeState) -> NodeState:
    """One node with the entries of two."""
    spec = first.spec.model_copy(update={"rollouts": [*first.spec.rollouts, *second.spec.rollouts]})
    return replace(first, spec=spec)


# -- pods come and go ---------------------------------------------------------------------------


def test_a_pod_that_terminates_keeps_its_place_until_it_is_gone() -> None:
    known = state("n0", prepared(2), {"p0": OLD, "p1": OLD})
    seen = world([pod(0), pod(1, terminating=True)], [known])
    assert pods_on(decide(rollout(AT_NEW), seen, NOW)) == {"p0", "p1"}
    idle = rollout(AT_NEW, paused=True)
    assert decide(idle, seen, NOW).actions == ()
    seen.drop("pod", "p1", seen.pods["p1"])
    assert pods_on(decide(idle, seen, NOW)) == {"p0"}


def test_a_pod_that_terminates_stays_staged_and_leaves_with_its_entry() -> None:
    given = {"p0": order("p0", OTHER, prepare="")}
    known = state("n0", [engine(0, OTHER)], given, listed=(OLD, NEW, OTHER))
    seen = world([pod(0, terminating=True)], [known])
    assert decide(rollout(AT_NEW, paused=True), seen, NOW).actions == ()
    for gone in ([], [pod(0, finished=True)], [pod(0, "n1", terminating=True)]):
        left = world(
            gone, [known], nodes={n: Node(n, n) for n in ("n0", "n1")}, agents={"n0": True}
        )
        assert entry_on(decide(rollout(AT_NEW, paused=True), left, NOW)) is None


@pytest.mark.parametrize(("token", "goes"), [(1, False), (2, True)])
def test_a_pod_leaves_its_entry_when_another_one_has_given_it_a_newer_order(
    token: int, goes: bool
) -> None:
    ours = state("n0", [engine(0)], {"p0": OLD})
    theirs = state("n0", told={"p0": order("p0", OLD, token=token, prepare="")}, entry="other")
    other = replace(rollout(AT_NEW), uid="other", name="other")
    mine = rollout(AT_NEW, paused=True, **ELSEWHERE)
    seen = world([pod(0)], [both(ours, theirs)], rollouts=[mine, other])
    decision = decide(mine, seen, NOW)
    assert (decision.actions != ()) is goes
    assert not goes or entry_on(decision) is None


def test_whatever_order_a_list_has_it_is_the_same() -> None:
    known = state(
        "n0", [engine(0), engine(1)], {f"p{n}": order(f"p{n}", OLD, prepare="") for n in (1, 0)}
    )
    seen = world([pod(0), pod(1)], [known])
    assert decide(rollout(AT_NEW, paused=True), seen, NOW).actions == ()
    first, second = known.spec.rollouts[0], known.spec.rollouts[0]
    second = second.model_copy(update={"pods": first.pods[::-1], "stage": first.stage[::-1]})
    assert assignments.same(first, second)
    assert not assignments.same(first, second.model_copy(update={"pods": []}))


def test_a_write_is_fenced_by_what_it_was_decided_on_and_tells_of_those_who_change() -> None:
    pods, given = [pod(0), pod(1)], {"p0": OLD, "p1": OLD}
    decision = decide(rollout(AT_NEW), world(pods, [state("n0", prepared(2), given)]), NOW)
    (action,) = decision.actions
    assert isinstance(action, Assign)
    assert action.resource_version == "50"
    assert [(event.regarding.name, event.reason) for event in action.events] == [
        ("p0", "WeightsActivating")
    ]


SETTLED = {"p0": order("p0", NEW, prepare="")}
PASSED: Fields = {**AT_NEW, "preparedRevision": 2}


def settled() -> Observed:
    """A node that was found to be as it should be: its pod is about to change."""
    seen = world([pod(0, gate=False)], [state("n0", [engine(0)], SETTLED)])
    assert decide(rollout(PASSED, failurePolicy={"maxFailed": 1}), seen, NOW).actions == ()
    return seen


def test_what_was_settled_is_looked_at_when_a_failure_is_remembered() -> None:
    failed = [{"pod": "p0", "podUID": "p0", "reason": "ProbeMismatch"}]
    decision = decide(
        rollout({**PASSED, "failures": failed}, failurePolicy={"maxFailed": 1}), settled(), NOW
    )
    entry = entry_on(decision)
    assert entry is not None
    assert entry.pods[0].digest == OLD


def test_what_was_settled_is_looked_at_when_the_spec_is_another() -> None:
    how = {"failurePolicy": {"maxFailed": 1}, "activation": {"commitTimeoutSeconds": 99}}
    entry = entry_on(decide(rollout(PASSED, **how), settled(), NOW))
    assert entry is not None
    assert entry.pods[0].commit_timeout_seconds == 99


def test_what_was_settled_is_asked_when_its_turn_comes_though_nothing_happened_there() -> None:
    def node(number: int, prepare: str, **more: Any) -> NodeState:
        given = {f"p{number}": order(f"p{number}", OLD, prepare=prepare)}
        return state(f"n{number}", [engine(number, **more)], given)

    seen = world([pod(0), pod(1, "n1")], [node(0, NEW, phase="Preparing"), node(1, "")])
    assert decide(rollout(AT_NEW), seen, NOW).actions == ()
    seen.put("state", "n0", node(0, NEW, phase="Prepared", prepared=NEW))
    entry = entry_on(decide(rollout(AT_NEW), seen, NOW), "n1")
    assert entry is not None
    assert entry.pods[0].prepare == NEW


# -- what a node holds --------------------------------------------------------------------------

BARE = {"p0": order("p0", OLD, prepare="", revision=1)}


def test_every_node_gets_the_version_before_its_pods_prepare() -> None:
    states = [
        state(f"n{n}", [engine(n)], {f"p{n}": order(f"p{n}", OLD, prepare="")}, listed=(OLD,))
        for n in (0, 1)
    ]
    decision = decide(rollout(AT_NEW), world([pod(0), pod(1, "n1")], states), NOW)
    assert [set(staged_on(decision, f"n{n}")) for n in (0, 1)] == [{OLD, NEW}, {OLD, NEW}]


@pytest.mark.parametrize("held", [{"paused": True}, {"failurePolicy": {"maxFailed": 0}}])
def test_nothing_new_is_staged_while_the_rollout_holds(held: Fields) -> None:
    seen = world([pod(0)], [state("n0", [engine(0)], BARE, listed=(OLD,), staged=[])])
    decision = decide(rollout({**AT_NEW, "mostFailed": 1}, **held), seen, NOW)
    assert NEW not in staged_on(decision)


def test_a_pause_lets_go_of_nothing() -> None:
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": order("p0", OLD, prepare="")})])
    assert decide(rollout(AT_NEW, paused=True), seen, NOW).actions == ()


def test_what_single_pods_need_stays_with_what_is_held_everywhere() -> None:
    told_other = order("p0", OTHER, prepare="", revision=1)
    seen = world([pod(0)], [state("n0", [engine(0, OTHER)], {"p0": told_other}, listed=(OTHER,))])
    assert set(staged_on(decide(rollout(AT_NEW), seen, NOW))) == {OLD, NEW, OTHER}


def test_what_a_pod_has_prepared_stays_listed_while_paused() -> None:
    seen = world([pod(0)], [state("n0", prepared(1), {"p0": OLD}, listed=(OLD,))])
    assert set(staged_on(decide(rollout(AT_NEW, paused=True), seen, NOW))) == {OLD, NEW}


def test_what_pods_need_comes_before_what_is_only_kept() -> None:
    many = [f"sha256:{n}" for n in range(MAX_STAGE - 2)]
    given = {f"p{n}": order(f"p{n}", many[n], prepare="", revision=1) for n in range(len(many))}
    engines = [engine(n, many[n]) for n in range(len(many))]
    known = state("n0", engines, given, listed=(*many, OLD, NEW))
    held = {**AT_NEW, "held": [{"name": "x", "version": "x", "digest": OTHER}]}
    seen = world(
        [pod(n) for n in range(len(many))],
        [known],
        versions=[version("new", NEW), version("x", OTHER)],
    )
    (action,) = decide(rollout(held), seen, NOW).actions
    assert isinstance(action, Assign)
    assert action.entry is not None
    assert {item.digest for item in action.entry.stage} == {*many, OLD, NEW}


def test_a_version_whose_object_is_gone_is_staged_from_what_nodes_were_told() -> None:
    states = [state("n0", [engine(0)], BARE), state("n1", [engine(1)])]
    seen = world([pod(0), pod(1, "n1")], states, versions=[version("new", NEW)])
    assert OLD in staged_on(decide(rollout(AT_NEW), seen, NOW), "n1")


def test_what_is_staged_anew_says_how_long_it_may_take_and_has_a_name() -> None:
    seen = world([pod(0)], [state("n0", [engine(0)], BARE, listed=(OLD,))])
    entry = entry_on(decide(rollout(AT_NEW, staging={"timeoutSeconds": 123}), seen, NOW))
    assert entry is not None
    assert {item.digest: (item.version, item.timeout_seconds) for item in entry.stage}[NEW] == (
        "new",
        123,
    )


@pytest.mark.parametrize(
    "known", [[version("new", NEW), version("third", OTHER)], [version("new", NEW)]]
)
def test_an_order_has_the_name_of_its_version_whoever_knows_it(known: Any) -> None:
    given = order("p0", OTHER, prepare="", revision=1, version="")
    seen = world(
        [pod(0)], [state("n0", [engine(0, OTHER)], {"p0": given}, listed=(OTHER,))], versions=known
    )
    entry = entry_on(decide(rollout(AT_NEW), seen, NOW))
    assert entry is not None
    assert entry.pods[0].version == ("third" if len(known) > 1 else "other")
