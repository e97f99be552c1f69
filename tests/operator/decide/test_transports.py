"""Which transport a rollout's nodes use among each other, and what is said about it."""

from __future__ import annotations

import dataclasses

import pytest

from hotweights_crds.nodeweights import (
    Collective,
    Endpoint,
    NodeWeightsSpec,
    NodeWeightsStatus,
    Peer,
    RolloutAssignment,
    StagedVersion,
    StageItem,
)
from hotweights_crds.weightrollout import (
    Transport,
    VersionStatus,
    WeightRolloutSpec,
    WeightRolloutStatus,
)
from hotweights_crds.weightversion import WeightVersionSpec, WeightVersionStatus
from hotweights_operator.decide.held_versions import stage_items
from hotweights_operator.decide.transports import choose, describe, speaks
from hotweights_operator.model.objects import Node, NodeState, Rollout, Version
from hotweights_operator.model.observed import Observed


def node(
    name: str,
    tcp: int = 0,
    ucx: int | None = None,
    message: str = "",
    mpi: int | None = None,
    staged: str = "",
) -> NodeState:
    endpoints = [
        Endpoint(scheme="tcp", endpoint=f"tcp://{name}:1", megabytes_per_second=tcp),
        Endpoint(
            scheme="ucx",
            endpoint="" if ucx is None else f"ucx://{name}:2",
            megabytes_per_second=ucx or 0,
            message=message,
        ),
        Endpoint(
            scheme="mpi",
            endpoint="" if mpi is None else f"mpi://{name}:1",
            megabytes_per_second=mpi or 0,
            message="" if mpi else "mpi4py is not installed",
        ),
    ]
    held = [StagedVersion(digest=staged, phase="Staged")] if staged else []
    return NodeState(
        name,
        status=NodeWeightsStatus(
            boot_id="b", endpoint=f"tcp://{name}:1", endpoints=endpoints, staged=held
        ),
    )


OLD_AGENT = NodeState("old", status=NodeWeightsStatus(endpoint="tcp://old:1"))
QUICK = node("quick", tcp=1000, ucx=3000)
SLOW = node("slow", tcp=1000, ucx=600)
WITHOUT = node("without", message="ucxx cannot be imported")


@pytest.mark.parametrize(
    ("asked", "child", "parent", "expected"),
    [
        ("TCP", QUICK, QUICK, "tcp://quick:1"),
        ("UCX", QUICK, SLOW, "ucx://slow:2"),
        ("UCX", WITHOUT, QUICK, "tcp://quick:1"),
        ("UCX", QUICK, WITHOUT, "tcp://without:1"),
        ("UCX", QUICK, OLD_AGENT, "tcp://old:1"),
        ("Auto", QUICK, QUICK, "ucx://quick:2"),
        ("Auto", SLOW, QUICK, "tcp://quick:1"),
        ("Auto", QUICK, SLOW, "tcp://slow:1"),
        ("Auto", OLD_AGENT, QUICK, "tcp://quick:1"),
        ("MPI", QUICK, QUICK, "tcp://quick:1"),
    ],
)
def test_both_sides_must_want_it(
    asked: Transport, child: NodeState, parent: NodeState, expected: str
) -> None:
    assert choose(asked, child, parent) == expected


def test_what_is_said() -> None:
    assert describe("TCP", [QUICK, SLOW]) == ""
    assert describe("UCX", [QUICK, SLOW]) == ""
    assert describe("Auto", [WITHOUT, OLD_AGENT]) == ""
    assert (
        describe("UCX", [QUICK, WITHOUT])
        == "over UCX between 1 of 2 nodes, else over TCP; without: ucxx cannot be imported"
    )
    assert describe("UCX", [OLD_AGENT]).endswith("old: its agent does not serve it")
    assert describe("Auto", [QUICK, SLOW]) == (
        "Auto: over UCX between 1 of 2 nodes, else over TCP; quick measured 1000 MB/s by tcp, "
        "3000 MB/s by ucx"
    )
    assert describe("Auto", [SLOW]) == (
        "Auto: nobody measured anything faster, else over TCP; slow measured 1000 MB/s by "
        "tcp, 600 MB/s by ucx"
    )
    assert describe("Auto", [node("a", 1000, 500, mpi=2000), node("b", 1000, 500, mpi=900)]) == (
        "Auto: over MPI between 1 of 2 nodes, else over TCP; "
        "a measured 1000 MB/s by tcp, 500 MB/s by ucx, 2000 MB/s by mpi"
    )
    assert (
        describe("MPI", [node("a", mpi=1), QUICK])
        == "over MPI between 1 of 2 nodes, else over TCP; quick: mpi4py is not installed"
    )


def test_a_route_holds_as_long_as_the_parent_is_there_by_any_transport() -> None:
    assert speaks(QUICK, "tcp://quick:1")
    assert speaks(QUICK, "ucx://quick:2")
    assert not speaks(QUICK, "ucx://quick:3")
    assert not speaks(WITHOUT, "")


KEY, ANOTHER = (f"ed25519:{letter * 43}=" for letter in "AB")


def keyed(state: NodeState, key: str = KEY) -> NodeState:
    """The same node, whose agent shows a key."""
    return dataclasses.replace(state, status=state.status.model_copy(update={"peer_key": key}))


DIGEST = "sha256:" + "1" * 64
OLD = "sha256:" + "2" * 64


def items(transport: Transport, states: list[NodeState], readers: int = 1) -> dict[str, StageItem]:
    """Node → what it is told of the version."""
    spec = {
        "versionRef": {"name": "v"},
        "target": {"selector": {}},
        "staging": {"transport": transport, "originReaders": readers},
    }
    rollout = Rollout("r", "llm", "models", 1, "1", "2026", WeightRolloutSpec.from_dict(spec))
    rollout = dataclasses.replace(
        rollout, status=WeightRolloutStatus(stable=VersionStatus(digest=OLD))
    )
    source = {"model": "m", "version": "v", "source": {"uri": "file:///v"}}
    version = Version(
        "u",
        "v",
        "models",
        1,
        "1",
        WeightVersionSpec.from_dict(source),
        WeightVersionStatus(digest=DIGEST),
    )
    observed = Observed(
        rollouts=[rollout],
        versions=[version],
        nodes={state.name: Node(state.name, state.name) for state in states},
        agents={state.name: True for state in states},
        states={state.name: state for state in states},
    )
    found = stage_items(
        rollout, rollout.status, {state.name: [DIGEST] for state in states}, observed
    )
    return {node: item for node, (item,) in found.items()}


def planned(
    transport: Transport, states: list[NodeState]
) -> dict[str, tuple[list[str], list[str]]]:
    """Node → its parents' and its stand-ins' endpoints."""
    return {
        node: ([peer.endpoint for peer in item.parents], [peer.endpoint for peer in item.fallbacks])
        for node, item in items(transport, states).items()
    }


def told(state: NodeState, item: StageItem) -> NodeState:
    """The same node after the item was written."""
    entry = RolloutAssignment(uid="r", stage=[item])
    return dataclasses.replace(state, spec=NodeWeightsSpec(rollouts=[entry]))


def holding(state: NodeState, digest: str) -> NodeState:
    """The same node with the version."""
    staged = [StagedVersion(digest=digest, phase="Staged")]
    return dataclasses.replace(state, status=state.status.model_copy(update={"staged": staged}))


def test_a_parent_over_ucx_is_its_own_stand_in_over_tcp() -> None:
    states = [node("a", 100, 200), node("b", 100, 200)]
    assert planned("UCX", states) == {"a": ([], []), "b": (["ucx://a:2"], ["tcp://a:1"])}
    assert planned("Auto", states)["b"][0] == ["ucx://a:2"]
    assert planned("TCP", states)["b"] == (["tcp://a:1"], [])


def job(item: StageItem) -> Collective:
    assert item.collective is not None
    return item.collective


def test_a_chain_is_one_broadcast_and_still_a_chain() -> None:
    states = [node(name, 100, mpi=100) for name in "abc"]
    found = items("MPI", states)
    assert {job(item).members == ["a", "b", "c"] for item in found.values()} == {True}
    assert len({job(item).name for item in found.values()}) == 1
    assert job(found["b"]).head == "mpi://a:1"
    assert job(found["b"]).base == ""
    assert [peer.endpoint for peer in found["c"].parents] == ["tcp://b:1"]


def test_every_reader_leads_its_own_broadcast() -> None:
    found = items("MPI", [node(name, mpi=1) for name in "abcd"], readers=2)
    assert {tuple(job(item).members) for item in found.values()} == {("a", "b"), ("c", "d")}


def test_who_has_no_mpi_pulls() -> None:
    found = items("MPI", [node("a", mpi=1), node("b"), node("c", mpi=1)])
    assert job(found["a"]).members == ["a", "c"]
    assert found["b"].collective is None
    assert all(
        item.collective is None for item in items("MPI", [node("a"), node("b", mpi=1)]).values()
    )
    assert all(item.collective is None for item in items("MPI", [node("a", mpi=1)]).values())
    assert all(
        item.collective is None
        for item in items("TCP", [node("a", mpi=1), node("b", mpi=1)]).values()
    )


def test_auto_broadcasts_where_that_was_measured_as_fastest() -> None:
    assert job(items("Auto", [node("a", 10, mpi=20), node("b", 10, mpi=20)])["b"]).members == [
        "a",
        "b",
    ]
    slower = items("Auto", [node("a", 10, mpi=20), node("b", 10, mpi=5)])
    assert all(item.collective is None for item in slower.values())


def test_what_all_have_is_not_sent_again() -> None:
    states = [node("a", mpi=1, staged=OLD), node("b", mpi=1, staged=OLD)]
    assert job(items("MPI", states)["a"]).base == OLD
    assert job(items("MPI", [*states, node("c", mpi=1)])["a"]).base == ""


def test_one_who_is_told_later_joins_and_one_who_comes_too_late_pulls() -> None:
    a, b, c = (node(name, mpi=1) for name in "abc")
    found = items("MPI", [a, b, c])
    told_a, told_b = told(a, found["a"]), told(b, found["b"])
    assert items("MPI", [told_a, told_b, c]) == found, "the operator ended between two writes"
    ended = items("MPI", [holding(told_a, DIGEST), told_b, c])
    assert ended["a"] == found["a"], "a node that has it is not written to again"
    assert ended["b"].collective is None, "it would wait for nobody"
    assert ended["c"].collective is None


def test_a_route_names_the_keys_beside_the_endpoints() -> None:
    """Of parents, of their stand-ins, and of who leads a broadcast; none where an agent of an
    older release shows none.
    """
    found = items("UCX", [keyed(node("a", ucx=1)), node("b", ucx=1), node("c", ucx=1)])
    assert [(peer.node, peer.key) for peer in found["b"].parents] == [("a", KEY)]
    assert ("a", KEY) in [(peer.node, peer.key) for peer in found["b"].fallbacks]
    assert [(peer.node, peer.key) for peer in found["c"].parents] == [("b", "")]
    found = items("MPI", [keyed(node("a", mpi=1)), node("b", mpi=1)])
    assert {job(item).head_key for item in found.values()} == {KEY}


def test_an_agent_that_starts_anew_changes_the_key_and_not_the_route() -> None:
    a, b, c = (keyed(node(name, mpi=1)) for name in "abc")
    found = items("MPI", [a, b, c])
    told_b, told_c = told(b, found["b"]), told(c, found["c"])
    anew = items("MPI", [keyed(told(a, found["a"]), ANOTHER), told_b, told_c])
    assert [(peer.node, peer.key) for peer in anew["b"].parents] == [("a", ANOTHER)]
    assert [peer.key for peer in anew["c"].fallbacks if peer.node == "a"] == [ANOTHER]
    assert {job(item).head_key for item in anew.values()} == {ANOTHER}
    for name, item in found.items():
        assert [peer.node for peer in anew[name].parents] == [peer.node for peer in item.parents]
        assert job(anew[name]).name == job(item).name
    held = told(holding(b, DIGEST), found["b"])
    had = items("MPI", [keyed(told(a, found["a"]), ANOTHER), held, told_c])["b"]
    assert [peer.key for peer in had.parents] == [KEY], "who has it is not written to again"


def test_a_stand_in_that_is_elsewhere_now_is_asked_only_if_it_has_a_key() -> None:
    """A route by a release without keys would send the token to whoever has its address now."""
    a, b, c = node("a"), node("b"), node("c")
    c = told(c, items("TCP", [a, b, c])["c"])
    (parent,) = c.spec.rollouts[0].stage[0].parents
    other = Peer(node="a" if parent.node == "b" else "b", endpoint="tcp://10.9.9.9:1")
    for stand_in, stays in (
        (other, False),
        (other.model_copy(update={"key": KEY}), True),
        (other.model_copy(update={"node": "gone"}), False),
    ):
        item = c.spec.rollouts[0].stage[0].model_copy(update={"fallbacks": [stand_in]})
        found = items("TCP", [a, b, told(c, item)])["c"]
        assert found.parents == [parent]
        assert found.fallbacks == ([stand_in] if stays else [])


def test_a_broadcast_whose_head_is_elsewhere_now_is_joined_only_by_key() -> None:
    a, b, c = (node(name, mpi=1) for name in "abc")
    found = items("MPI", [a, b, c])
    elsewhere = [
        one.model_copy(update={"endpoint": "mpi://10.9.9.9:1"})
        for one in a.status.endpoints
        if one.scheme == "mpi"
    ]
    status = a.status.model_copy(update={"endpoints": elsewhere})
    moved = told(dataclasses.replace(a, status=status), found["a"])
    assert items("MPI", [moved, told(b, found["b"]), told(c, found["c"])])["c"].collective is None
    with_key = [
        told(
            state,
            item.model_copy(update={"collective": job(item).model_copy(update={"head_key": KEY})}),
        )
        for state, item in ((b, found["b"]), (c, found["c"]))
    ]
    assert job(items("MPI", [moved, *with_key])["c"]).head_key == KEY


def test_a_member_that_restarted_changes_no_route() -> None:
    a, b = node("a", mpi=1), node("b", mpi=1)
    found = items("MPI", [a, b])
    moved = dataclasses.replace(b, status=b.status.model_copy(update={"boot_id": "another"}))
    assert items("MPI", [told(a, found["a"]), told(moved, found["b"])]) == found, (
        "a route that works is never changed"
    )
