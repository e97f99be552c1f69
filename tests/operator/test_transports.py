"""Which transport a rollout's nodes use among each other, and what is said about it."""

from __future__ import annotations

import pytest

from hotweights_crds.nodeweights import Endpoint, NodeWeightsStatus
from hotweights_crds.weightrollout import Transport, WeightRolloutSpec
from hotweights_crds.weightversion import WeightVersionSpec, WeightVersionStatus
from hotweights_operator.model import Node, NodeState, Observed, Rollout, Version
from hotweights_operator.staging import stage_items
from hotweights_operator.transports import choose, describe, speaks


def node(name: str, tcp: int = 0, ucx: int | None = None, message: str = "") -> NodeState:
    endpoints = [
        Endpoint(scheme="tcp", endpoint=f"tcp://{name}:1", megabytes_per_second=tcp),
        Endpoint(
            scheme="ucx",
            endpoint="" if ucx is None else f"ucx://{name}:2",
            megabytes_per_second=ucx or 0,
            message=message,
        ),
    ]
    return NodeState(name, status=NodeWeightsStatus(boot_id="b", endpoint=f"tcp://{name}:1", endpoints=endpoints))


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
    ],
)
def test_both_sides_must_want_it(asked: Transport, child: NodeState, parent: NodeState, expected: str) -> None:
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
        "Auto: over UCX between 1 of 2 nodes, else over TCP; quick measured 1000 MB/s by tcp and 3000 MB/s by ucx"
    )


def test_a_route_holds_as_long_as_the_parent_is_there_by_any_transport() -> None:
    assert speaks(QUICK, "tcp://quick:1")
    assert speaks(QUICK, "ucx://quick:2")
    assert not speaks(QUICK, "ucx://quick:3")
    assert not speaks(WITHOUT, "")


DIGEST = "sha256:" + "1" * 64


def planned(transport: Transport, states: list[NodeState]) -> dict[str, tuple[list[str], list[str]]]:
    """Node → its parents' and its stand-ins' endpoints."""
    spec = {"versionRef": {"name": "v"}, "target": {"selector": {}}, "staging": {"transport": transport}}
    rollout = Rollout("r", "llm", "models", 1, "1", "2026", WeightRolloutSpec.from_dict(spec))
    source = {"model": "m", "version": "v", "source": {"uri": "file:///v"}}
    version = Version(
        "u", "v", "models", 1, "1", WeightVersionSpec.from_dict(source), WeightVersionStatus(digest=DIGEST)
    )
    observed = Observed(
        rollouts=[rollout],
        versions=[version],
        nodes={state.name: Node(state.name, state.name) for state in states},
        agents={state.name: True for state in states},
        states={state.name: state for state in states},
    )
    items = stage_items(rollout, {state.name: [DIGEST] for state in states}, observed)
    return {
        node: ([peer.endpoint for peer in item.parents], [peer.endpoint for peer in item.fallbacks])
        for node, (item,) in items.items()
    }


def test_a_parent_over_ucx_is_its_own_stand_in_over_tcp() -> None:
    states = [node("a", 100, 200), node("b", 100, 200)]
    assert planned("UCX", states) == {"a": ([], []), "b": (["ucx://a:2"], ["tcp://a:1"])}
    assert planned("Auto", states)["b"][0] == ["ucx://a:2"]
    assert planned("TCP", states)["b"] == (["tcp://a:1"], [])
