"""Entries: no pod ever stands in none, nothing stays that nobody needs, and what a node is to hold, from where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from hotweights_crds.nodeweights import (
    MAX_PODS,
    MAX_STAGE,
    UNASSIGNED,
    Endpoint,
    Peer,
    PodAssignment,
    ResolveItem,
    RolloutAssignment,
    StagedVersion,
    StageItem,
)
from hotweights_operator import entries, nodes
from hotweights_operator.actions import AskResolve, Assign, CreateNodeWeights, RolloutDecision
from hotweights_operator.decide import decide
from hotweights_operator.model import Node, NodeState, Rollout
from hotweights_operator.observed import Observed
from tests.operator.worlds import (
    AT_NEW,
    NEW,
    NOW,
    OLD,
    OTHER,
    Fields,
    engine,
    gave_up,
    order,
    pod,
    prepared,
    rollout,
    state,
    version,
    world,
)

ELSEWHERE: Fields = {"target": {"selector": {"matchLabels": {"app": "another"}}}}
DONE: Fields = {
    **AT_NEW,
    "stable": AT_NEW["target"],
    "preparedRevision": 2,
    "history": [{"revision": 2, "version": "new", "outcome": "Complete"}],
}


def entry_on(decision: RolloutDecision, node: str = "n0") -> RolloutAssignment | None:
    """What is written for a node. Raises `LookupError` when nothing is."""
    written = [action.entry for action in decision.actions if isinstance(action, Assign) and action.node == node]
    if not written:
        raise LookupError(f"nothing is written to {node}")
    return written[0]


def pods_on(decision: RolloutDecision, node: str = "n0") -> set[str]:
    """Pods that stand in it."""
    entry = entry_on(decision, node)
    return {given.uid for given in entry.pods} if entry else set()


def staged_on(decision: RolloutDecision, node: str = "n0") -> list[str]:
    """Versions that the node is to hold."""
    entry = entry_on(decision, node)
    return [item.digest for item in entry.stage] if entry else []


def both(first: NodeState, second: NodeState) -> NodeState:
    """One node with the entries of two."""
    spec = first.spec.model_copy(update={"rollouts": [*first.spec.rollouts, *second.spec.rollouts]})
    return replace(first, spec=spec)


# -- pods come and go ----------------------------------------------------------------------------------------------------


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
        left = world(gone, [known], nodes={n: Node(n, n) for n in ("n0", "n1")}, agents={"n0": True})
        assert entry_on(decide(rollout(AT_NEW, paused=True), left, NOW)) is None


@pytest.mark.parametrize(("token", "goes"), [(1, False), (2, True)])
def test_a_pod_leaves_its_entry_when_another_one_has_given_it_a_newer_order(token: int, goes: bool) -> None:
    ours = state("n0", [engine(0)], {"p0": OLD})
    theirs = state("n0", told={"p0": order("p0", OLD, token=token, prepare="")}, entry="other")
    other = replace(rollout(AT_NEW), uid="other", name="other")
    mine = rollout(AT_NEW, paused=True, **ELSEWHERE)
    seen = world([pod(0)], [both(ours, theirs)], rollouts=[mine, other])
    decision = decide(mine, seen, NOW)
    assert (decision.actions != ()) is goes
    assert not goes or entry_on(decision) is None


def test_whatever_order_a_list_has_it_is_the_same() -> None:
    known = state("n0", [engine(0), engine(1)], {f"p{n}": order(f"p{n}", OLD, prepare="") for n in (1, 0)})
    seen = world([pod(0), pod(1)], [known])
    assert decide(rollout(AT_NEW, paused=True), seen, NOW).actions == ()
    first, second = known.spec.rollouts[0], known.spec.rollouts[0]
    second = second.model_copy(update={"pods": first.pods[::-1], "stage": first.stage[::-1]})
    assert entries.same(first, second)
    assert not entries.same(first, second.model_copy(update={"pods": []}))


def test_a_write_is_fenced_by_what_it_was_decided_on_and_tells_of_those_who_change() -> None:
    pods, given = [pod(0), pod(1)], {"p0": OLD, "p1": OLD}
    decision = decide(rollout(AT_NEW), world(pods, [state("n0", prepared(2), given)]), NOW)
    (action,) = decision.actions
    assert isinstance(action, Assign)
    assert action.resource_version == "50"
    assert [(event.about.name, event.reason) for event in action.events] == [("p0", "WeightsActivating")]


# -- what a node holds ---------------------------------------------------------------------------------------------------

BARE = {"p0": order("p0", OLD, prepare="", revision=1)}


def test_every_node_gets_the_version_before_its_pods_prepare() -> None:
    states = [state(f"n{n}", [engine(n)], {f"p{n}": order(f"p{n}", OLD, prepare="")}, listed=(OLD,)) for n in (0, 1)]
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


def test_what_pods_need_comes_before_what_is_only_kept() -> None:
    many = [f"sha256:{n}" for n in range(MAX_STAGE - 2)]
    given = {f"p{n}": order(f"p{n}", many[n], prepare="", revision=1) for n in range(len(many))}
    engines = [engine(n, many[n]) for n in range(len(many))]
    known = state("n0", engines, given, listed=(*many, OLD, NEW))
    held = {**AT_NEW, "held": [{"name": "x", "version": "x", "digest": OTHER}]}
    seen = world([pod(n) for n in range(len(many))], [known], versions=[version("new", NEW), version("x", OTHER)])
    for action in decide(rollout(held), seen, NOW).actions:
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
    assert {item.digest: (item.version, item.timeout_seconds) for item in entry.stage}[NEW] == ("new", 123)


@pytest.mark.parametrize("known", [[version("new", NEW), version("third", OTHER)], [version("new", NEW)]])
def test_an_order_has_the_name_of_its_version_whoever_knows_it(known: Any) -> None:
    given = order("p0", OTHER, prepare="", revision=1, version="")
    seen = world([pod(0)], [state("n0", [engine(0, OTHER)], {"p0": given}, listed=(OTHER,))], versions=known)
    entry = entry_on(decide(rollout(AT_NEW), seen, NOW))
    assert entry is not None
    assert entry.pods[0].version == ("third" if len(known) > 1 else "other")


# -- from where ----------------------------------------------------------------------------------------------------------


def fleet(
    count: int, holders: Sequence[int] = (), away: Sequence[int] = (), zones: Mapping[int, str] | None = None
) -> Observed:
    """Nodes with a pod each that are to get the new version, of which some have it and some have no agent."""
    states = []
    for number in range(count):
        held = [OLD, NEW] if number in holders else [OLD]
        staged = [StagedVersion(digest=digest, phase="Staged") for digest in held]
        given = {f"p{number}": order(f"p{number}", OLD, prepare="", revision=1)}
        states.append(state(f"n{number}", [engine(number)], given, staged=staged, listed=(OLD,)))
    agents = {f"n{n}": n not in away for n in range(count)}
    known = {f"n{n}": Node(f"n{n}", f"n{n}", zone=(zones or {}).get(n, "")) for n in range(count)}
    return world([pod(n, f"n{n}") for n in range(count)], states, nodes=known, agents=agents)


def routes(seen: Observed, known: Rollout | None = None) -> dict[str, list[str]]:
    """Node → its parents for the new version."""
    found: dict[str, list[str]] = {}
    for action in decide(known or rollout(AT_NEW), seen, NOW).actions:
        if isinstance(action, Assign) and action.entry is not None:
            items = [item for item in action.entry.stage if item.digest == NEW]
            found |= {
                node: [peer.node for peer in item.parents] for node, item in zip([action.node], items, strict=False)
            }
    return found


def written(seen: Observed, node: str, item: StageItem) -> None:
    """A node's entry as it was written, with this item."""
    known = seen.states[node]
    entry = known.spec.rollouts[0]
    rest = [each for each in entry.stage if each.digest != item.digest]
    entries_ = [entry.model_copy(update={"stage": [*rest, item]})]
    seen.put("state", node, replace(known, spec=known.spec.model_copy(update={"rollouts": entries_})))


NEW_ITEM = StageItem(digest=NEW, namespace="models", model="m", version="new", uri="file:///new")


def test_one_reads_the_source_and_the_others_pull_along() -> None:
    assert routes(fleet(3)) == {"n0": [], "n1": ["n0"], "n2": ["n1"]}


def test_as_many_read_the_source_as_the_spec_says() -> None:
    found = routes(fleet(4), rollout(AT_NEW, staging={"originReaders": 2}))
    assert sum(not parents for parents in found.values()) == 2


def test_who_has_it_gives_it() -> None:
    found = routes(fleet(3, holders=[2]))
    assert found["n2"] == []
    assert all(found[node] for node in ("n0", "n1"))


def test_nobody_is_sent_to_a_node_without_an_agent() -> None:
    found = routes(fleet(3, away=[1]))
    assert found == {"n0": [], "n2": ["n0"]}


def test_neighbours_pull_from_each_other() -> None:
    found = routes(fleet(4, zones={0: "a", 1: "b", 2: "a", 3: "b"}))
    assert found == {"n0": [], "n2": ["n0"], "n1": ["n2"], "n3": ["n1"]}


def waiting_for(parent_away: bool, holds: bool) -> Observed:
    """n1 was told to pull from n0."""
    seen = fleet(2, holders=[0, 1] if holds else [0], away=[0] if parent_away else [])
    written(seen, "n1", NEW_ITEM.model_copy(update={"parents": [Peer(node="n0", endpoint="tcp://n0:1")]}))
    return seen


def test_a_route_is_changed_only_when_it_is_needed_and_broken() -> None:
    quiet = rollout(DONE)
    assert routes(waiting_for(parent_away=False, holds=False), quiet).get("n1", ["n0"]) == ["n0"]
    assert routes(waiting_for(parent_away=True, holds=False), quiet)["n1"] == []
    assert routes(waiting_for(parent_away=True, holds=True), quiet).get("n1", ["n0"]) == ["n0"]


def test_a_node_whose_parent_goes_is_led_elsewhere_though_nothing_happened_on_it() -> None:
    seen, running = fleet(2, holders=[0]), rollout(AT_NEW, paused=True)
    written(seen, "n0", NEW_ITEM)
    written(seen, "n1", NEW_ITEM.model_copy(update={"parents": [Peer(node="n0", endpoint="tcp://n0:1")]}))
    for node in ("n0", "n1"):
        known = seen.states[node]
        orders = [given.model_copy(update={"revision": 2}) for given in known.spec.rollouts[0].pods]
        entry = known.spec.rollouts[0].model_copy(update={"pods": orders, "namespace": "models", "name": "llm"})
        seen.put("state", node, replace(known, spec=known.spec.model_copy(update={"rollouts": [entry]})))
    assert decide(running, seen, NOW).actions == ()
    moved = seen.states["n0"]
    status = moved.status.model_copy(
        update={"endpoint": "tcp://n0:2", "endpoints": [Endpoint(scheme="tcp", endpoint="tcp://n0:2")]}
    )
    seen.put("state", "n0", replace(moved, status=status))
    anew = entry_on(decide(running, seen, NOW), "n1")
    assert anew is not None
    assert [item.parents[0].endpoint for item in anew.stage if item.parents] == ["tcp://n0:2"]


def test_a_version_that_comes_later_is_staged_though_nothing_happened_on_the_node() -> None:
    known = order("p0", OTHER, prepare="", version="")
    seen = world([pod(0)], [state("n0", [engine(0, OTHER)], {"p0": known}, listed=(OLD, NEW))])
    running = rollout(AT_NEW, paused=True)
    decide(running, seen, NOW)
    assert decide(running, seen, NOW).actions == ()
    seen.put("version", "x", version("x", OTHER))
    assert OTHER in staged_on(decide(running, seen, NOW))


# -- pods without a rollout, and what is left over -----------------------------------------------------------------------


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
    assert nodes.decide("n0", world([pod(0, terminating=True)], [], nodes=node, agents={})).actions == ()
    assert nodes.decide("n0", world([], [], nodes=node, agents={})).actions == ()


def test_an_orphan_s_version_stays_staged() -> None:
    seen = world([pod(0)], [state("n0", [engine(0)], {"p0": OLD}, "gone")], rollouts=[])
    assert [item.digest for item in unassigned(seen).stage] == [OLD]


def test_an_orphan_that_does_what_it_is_told_is_not_told_anew_for_an_old_failure() -> None:
    given = order("p0", OLD, prepare="", revision=0, token=1)
    failed = engine(0, OLD, failed=gave_up(OLD, revision=0, token=1))
    known = state("n0", [failed], {"p0": given}, UNASSIGNED, listed=(OLD,))
    assert nodes.decide("n0", world([pod(0)], [known], rollouts=[])).actions == ()


@pytest.mark.parametrize("phase", ["Booting", "Committing"])
def test_a_pod_without_a_rollout_is_not_told_what_its_engine_said_in_the_middle_of_something(phase: str) -> None:
    seen = world([pod(0)], [state("n0", [engine(0, OTHER, phase=phase)])], rollouts=[])
    assert unassigned(seen).pods[0].digest == ""


def test_a_pod_stands_among_those_without_a_rollout_until_its_rollout_has_written() -> None:
    given = order("p0", OLD, prepare="", revision=0)
    known = state("n0", [engine(0)], {"p0": given}, UNASSIGNED, listed=(OLD,))
    assert nodes.decide("n0", world([pod(0)], [known])).actions == ()
    taken = both(known, state("n0", told={"p0": order("p0", OLD, token=2)}))
    assert nodes.decide("n0", world([pod(0)], [taken])).actions == (Assign("n0", "50", UNASSIGNED, None),)


def test_a_pod_that_has_ended_stands_nowhere() -> None:
    assert nodes.decide("n0", world([pod(0, finished=True)], [state("n0")], rollouts=[])).actions == ()


@pytest.mark.parametrize("where", [[], [pod(0, "n1")], [pod(0, finished=True)]], ids=["gone", "elsewhere", "ended"])
def test_a_deleted_rollout_s_entry_goes_with_its_pods(where: Any) -> None:
    seen = world(where, [state("n0", [], {"p0": OLD}, "gone")], rollouts=[])
    assert nodes.decide("n0", seen).actions == (Assign("n0", "50", "gone", None),)


def test_a_living_rollout_s_entry_is_its_own_to_take_out() -> None:
    assert nodes.decide("n0", world([], [state("n0", [], {"p0": OLD})])).actions == ()


def test_requests_go_with_their_versions_and_one_write_at_a_time() -> None:
    def item(known: Any) -> ResolveItem:
        return ResolveItem(uid=known.uid, namespace="models", name=known.name, model="m", version="v", uri="file:///v")

    here, gone = version("here", ""), version("gone", "")
    known = state("n0", [], {"p0": OLD}, "gone")
    known = replace(known, spec=known.spec.model_copy(update={"resolve": [item(here), item(gone)]}))
    seen = world([], [known], rollouts=[], versions=[here])
    first = nodes.decide("n0", seen)
    assert (first.actions, first.again_in_seconds) == ((Assign("n0", "50", "gone", None),), 0.0)
    after = replace(known, spec=known.spec.model_copy(update={"rollouts": []}))
    second = nodes.decide("n0", world([], [after], rollouts=[], versions=[here]))
    assert (second.actions, second.again_in_seconds) == ((AskResolve("n0", "50", gone.uid, None),), None)


def test_those_who_stand_there_keep_their_place() -> None:
    numbers = range(100, 100 + MAX_PODS)
    given: dict[str, str | PodAssignment] = {f"p{n}": order(f"p{n}", "", prepare="", revision=0) for n in numbers}
    known = state("n0", [], given, UNASSIGNED, listed=())
    assert nodes.decide("n0", world([pod(0), *(pod(n) for n in numbers)], [known], rollouts=[])).actions == ()
