"""Routes are chains without circles, keep what still holds, and load no node more than once."""

from __future__ import annotations

from collections import Counter
from graphlib import TopologicalSorter

from hypothesis import given
from hypothesis import strategies as st

from hotweights_planner.pull_routes import FALLBACKS, Route, plan_routes

NAME = st.sampled_from([f"n{number}" for number in range(10)])
NAMES = st.lists(st.integers(0, 40).map("n{}".format), min_size=1, max_size=30, unique=True)


def check(routes: dict[str, Route], nodes: list[str], donors: frozenset[str], readers: int) -> None:
    assert set(routes) == set(nodes)
    held = donors & set(nodes)
    graph = {node: {*route.parents, *route.fallbacks} for node, route in routes.items()}
    tuple(TopologicalSorter(graph).static_order())  # raises where nodes wait for each other
    children = Counter(parent for route in routes.values() for parent in route.parents)
    assert not children or max(children.values()) == 1
    for node, route in routes.items():
        named = [*route.parents, *route.fallbacks]
        assert len(set(named)) == len(named)
        assert set(named) <= set(nodes) - {node}
        assert len(route.fallbacks) <= FALLBACKS
        assert (node in held) == (not route.parents and not route.reads_origin)
    reading = sum(route.reads_origin for route in routes.values())
    assert reading <= readers
    assert reading >= (0 if held else 1)


@given(NAMES, st.sets(st.integers(0, 40).map("n{}".format)), st.integers(1, 4))
def test_a_fresh_plan_has_no_circle(nodes: list[str], donors: set[str], readers: int) -> None:
    check(plan_routes(nodes, frozenset(donors), readers), nodes, frozenset(donors), readers)


@given(
    NAMES,
    NAMES,
    st.sets(st.integers(0, 40).map("n{}".format)),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_a_second_plan_has_no_circle(
    before: list[str], after: list[str], donors: set[str], readers: int, readers_after: int
) -> None:
    first = plan_routes(before, frozenset(), readers)
    parents = {node: route.parents for node, route in first.items()}
    second = plan_routes(after, frozenset(donors), readers_after, parents)
    check(second, after, frozenset(donors), readers_after)
    again = plan_routes(
        after,
        frozenset(donors),
        readers_after,
        {node: route.parents for node, route in second.items()},
    )
    check(again, after, frozenset(donors), readers_after)


@given(
    st.lists(NAME, min_size=1, max_size=8, unique=True),
    st.dictionaries(NAME, st.lists(NAME, max_size=2).map(tuple)),
)
def test_nonsense_as_the_previous_plan_does_no_harm(
    nodes: list[str], previous: dict[str, tuple[str, ...]]
) -> None:
    check(plan_routes(nodes, frozenset(), 2, previous), nodes, frozenset(), 2)


@given(st.randoms(use_true_random=False), st.integers(2, 40), st.integers(1, 3))
def test_one_node_more_or_less_moves_one_node_at_most(
    random: object, count: int, readers: int
) -> None:
    nodes = [f"n{number}" for number in range(count)]
    parents = {
        node: route.parents for node, route in plan_routes(nodes, frozenset(), readers).items()
    }
    more = plan_routes([*nodes, "a-new-one"], frozenset(), readers, parents)
    assert all(more[node].parents == parents[node] for node in nodes)
    gone = nodes[random.randrange(count)]  # type: ignore[attr-defined]
    less = plan_routes([node for node in nodes if node != gone], frozenset(), readers, parents)
    moved = [node for node in less if less[node].parents != parents[node]]
    assert len(moved) <= 1
    assert all(gone in parents[node] for node in moved)


def test_every_node_has_one_chain_to_the_origin() -> None:
    routes = plan_routes([f"n{number}" for number in range(9)], frozenset(), 2)
    assert sorted(node for node, route in routes.items() if route.reads_origin) == ["n0", "n5"]
    assert routes["n3"].parents == ("n2",)
    assert routes["n3"].fallbacks[0] == "n1"  # the parent's parent


def test_a_node_that_joins_late_pulls_from_one_that_has_it() -> None:
    nodes = [f"n{number}" for number in range(5)]
    parents = {node: route.parents for node, route in plan_routes(nodes, frozenset(), 1).items()}
    routes = plan_routes([*nodes, "n9"], frozenset(nodes), 1, parents)
    assert not routes["n9"].reads_origin
    assert routes["n9"].parents[0] in nodes


def test_zones_are_crossed_once() -> None:
    zones = {f"n{number}": "ab"[number % 2] for number in range(20)}
    routes = plan_routes(list(zones), frozenset(), 1, zones=zones)
    crossing = [
        node
        for node, route in routes.items()
        if route.parents and zones[route.parents[0]] != zones[node]
    ]
    assert len(crossing) == 1


def test_the_order_of_the_nodes_does_not_matter() -> None:
    nodes = [f"n{number}" for number in range(50)]
    assert plan_routes(nodes, frozenset(["n7"]), 3) == plan_routes(
        nodes[::-1], frozenset(["n7"]), 3
    )


def test_a_thousand_nodes_are_planned_at_once() -> None:
    nodes = [f"node-{number:04}" for number in range(1000)]
    routes = plan_routes(nodes, frozenset(nodes[::10]), 4)
    check(routes, nodes, frozenset(nodes[::10]), 4)
