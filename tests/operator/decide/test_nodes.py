"""A node's object: that it exists, whom it lists without a rollout, who reads sources, and that
nothing is left over.
"""

from __future__ import annotations

from dataclasses import replace

from hotweights_crds.conditions import find
from hotweights_crds.nodeweights import (
    MAX_PODS,
    MAX_RESOLVE,
    MAX_STAGE,
    UNASSIGNED,
    Peer,
    PodAssignment,
    ResolveItem,
)
from hotweights_operator.decide import nodes, versions
from hotweights_operator.model.actions import Action, AskResolve, Assign, CreateNodeWeights
from hotweights_operator.model.objects import Refusal
from tests.operator.worlds import (
    NEW,
    NOW,
    OLD,
    engine,
    gave_up,
    order,
    pod,
    rollout,
    state,
    version,
    world,
)


def entry_of(actions: tuple[Action, ...]) -> dict[str, PodAssignment]:
    """The pods of the one entry that is written."""
    (action,) = actions
    if not isinstance(action, Assign) or action.entry is None:
        raise LookupError("no entry")
    return {given.uid: given for given in action.entry.pods}


def test_a_node_with_opted_in_pods_gets_its_object() -> None:
    assert nodes.decide("n0", world([pod(0)], [])).actions == (CreateNodeWeights("n0", "uid-n0"),)


def test_a_pod_without_a_rollout_is_told_to_keep_what_it_boots() -> None:
    seen = world([pod(0)], [state("n0")], rollouts=[])
    assert {
        uid: given.digest for uid, given in entry_of(nodes.decide("n0", seen).actions).items()
    } == {"p0": ""}


def test_a_pod_whose_rollout_is_gone_keeps_what_it_was_told() -> None:
    seen = world([pod(0)], [state("n0", [engine(0, OLD)], {"p0": OLD})], rollouts=[])
    given = entry_of(nodes.decide("n0", seen).actions)["p0"]
    assert (given.digest, given.token) == (OLD, 2)


def test_a_pod_whose_rollout_went_in_the_middle_of_a_commit_that_then_failed_keeps_what_it_serves() -> (
    None
):
    told = order("p0", NEW, prepare="", revision=0)
    failed = engine(0, OLD, phase="Failed", failed=gave_up(revision=0))
    seen = world(
        [pod(0, gate=False, ready=False)],
        [state("n0", [failed], {"p0": told}, UNASSIGNED)],
        rollouts=[],
    )
    given = entry_of(nodes.decide("n0", seen).actions)["p0"]
    assert (given.digest, given.token) == (OLD, 2)


def test_an_orphan_that_cannot_boot_into_what_it_is_told_boots_what_its_image_brings() -> None:
    told = order("p0", NEW, prepare="", revision=0)
    loops = pod(0, gate=False, ready=False, restarts=3, last_run_seconds=4.0)
    seen = world(
        [loops],
        [state("n0", [engine(0, "", phase="Booting")], {"p0": told}, UNASSIGNED)],
        rollouts=[],
    )
    assert entry_of(nodes.decide("n0", seen).actions)["p0"].digest == ""


def test_what_is_left_of_a_deleted_rollout_goes_when_its_pods_have_found_their_place() -> None:
    known = state("n0", [engine(0, OLD)], {"p0": OLD}, "gone")
    seen = world([pod(0)], [known], rollouts=[])
    first = nodes.decide("n0", seen).actions
    assert isinstance(first[0], Assign)
    assert first[0].uid == UNASSIGNED
    both = known.spec.model_copy(update={"rollouts": [*known.spec.rollouts, first[0].entry]})
    after = replace(known, spec=both)
    assert nodes.decide("n0", world([pod(0)], [after], rollouts=[])).actions == (
        Assign("n0", "50", "gone", None),
    )


def test_what_an_orphan_needs_stays_staged_with_the_route_that_it_had() -> None:
    known = state("n0", [engine(0, OLD)], {"p0": OLD}, "gone")
    (entry,) = known.spec.rollouts
    routed = entry.stage[0].model_copy(update={"parents": [Peer(node="n1", endpoint="tcp://n1:1")]})
    entry = entry.model_copy(update={"stage": [routed, *entry.stage[1:]]})
    known = replace(known, spec=known.spec.model_copy(update={"rollouts": [entry]}))
    (action,) = nodes.decide("n0", world([pod(0)], [known], rollouts=[])).actions
    assert isinstance(action, Assign)
    assert action.entry is not None
    assert [(item.digest, [peer.node for peer in item.parents]) for item in action.entry.stage] == [
        (OLD, ["n1"])
    ]


def test_the_entry_of_a_rollout_that_is_being_deleted_stays_until_it_is_gone() -> None:
    going = replace(rollout(), terminating=True)
    seen = world([], [state("n0", [], {"p0": OLD})], rollouts=[going])
    assert nodes.decide("n0", seen).actions == ()


def test_more_pods_and_versions_than_a_list_holds_are_cut() -> None:
    pods = [pod(n) for n in range(MAX_PODS + 5)]
    engines = [engine(n, f"sha256:{n % 40}") for n in range(60)]
    told = {f"p{n}": order(f"p{n}", f"sha256:{n % 40}", revision=0, prepare="") for n in range(60)}
    known = state("n0", engines, told, "gone", listed=[f"sha256:{n}" for n in range(16)])
    (action,) = nodes.decide("n0", world(pods, [known], rollouts=[])).actions[:1]
    assert isinstance(action, Assign)
    assert action.entry is not None
    assert (len(action.entry.pods), len(action.entry.stage) <= MAX_STAGE) == (MAX_PODS, True)


# -- versions -----------------------------------------------------------------------------------


def reading(count: int, namespace: str = "other") -> list[ResolveItem]:
    """Sources that a node is asked to read."""
    return [
        ResolveItem(
            uid=f"u{namespace}{n}",
            namespace=namespace,
            name="x",
            model="m",
            version="v",
            uri="file:///x",
        )
        for n in range(count)
    ]


def test_a_version_is_resolved_by_one_agent_and_another_one_when_that_dies() -> None:
    states = [state("n0"), state("n1")]
    seen = world([], states)
    (first,) = versions.decide(version("v", ""), seen, NOW).actions
    assert isinstance(first, AskResolve)
    asked = states[int(first.node[1])]
    spec = asked.spec.model_copy(update={"resolve": [first.item]})
    others = [s for s in states if s.name != asked.name] + [replace(asked, spec=spec)]
    dead = world([], others, agents={"n0": True, "n1": True, asked.name: False})
    again = versions.decide(version("v", ""), dead, NOW).actions
    assert {(a.node == asked.name, a.item is None) for a in again if isinstance(a, AskResolve)} == {
        (True, True),
        (False, False),
    }


def test_another_agent_is_asked_when_one_has_as_much_to_read_as_it_may() -> None:
    states = [state("n0"), state("n1")]
    (first,) = versions.decide(version("v", ""), world([], states), NOW).actions
    full = [
        replace(s, spec=s.spec.model_copy(update={"resolve": reading(MAX_RESOLVE)}))
        if s.name == first.node
        else s
        for s in states
    ]
    (second,) = versions.decide(version("v", ""), world([], full), NOW).actions
    assert second.node != first.node


def test_another_agent_is_asked_where_the_request_cannot_be_written() -> None:
    seen = world([], [state("n0"), state("n1")])
    (first,) = versions.decide(version("v", ""), seen, NOW).actions
    seen.refusals["uid-models-v", first.node] = Refusal("Invalid", "no")
    (second,) = versions.decide(version("v", ""), seen, NOW).actions
    assert second.node != first.node


def test_no_namespace_takes_all_of_an_agent_with_sources_that_cannot_be_read() -> None:
    busy = replace(
        state("n0"), spec=state("n0").spec.model_copy(update={"resolve": reading(16, "models")})
    )
    waits = versions.decide(version("v", ""), world([], [busy]), NOW)
    assert waits.actions == ()
    assert waits.status is not None
    resolved = find(waits.status.conditions, "Resolved")
    assert resolved is not None
    assert resolved.reason == "WaitsForAgent"
    assert (
        versions.decide(version("v", "", namespace="team-b"), world([], [busy]), NOW).actions != ()
    )


def test_the_request_is_taken_back_when_the_digest_is_known() -> None:
    v = version("v", NEW)
    item = ResolveItem(
        uid=v.uid, namespace="models", name="v", model="m", version="v", uri="file:///v"
    )
    asked = replace(state("n0"), spec=state("n0").spec.model_copy(update={"resolve": [item]}))
    assert versions.decide(v, world([], [asked]), NOW).actions == (
        AskResolve("n0", "50", v.uid, None),
    )
