"""Where nodes get a version from: one reads the source, the others pull along, and a route that
works is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from hotweights_crds.nodeweights import (
    Endpoint,
    Peer,
    StagedVersion,
    StageItem,
)
from hotweights_operator.decide.rollouts import decide
from hotweights_operator.model.actions import Assign
from hotweights_operator.model.objects import Agent, Node, Rollout
from hotweights_operator.model.observed import Observed
from tests.operator.worlds import (
    AT_NEW,
    DONE,
    NEW,
    NOW,
    OLD,
    OTHER,
    Fields,
    engine,
    entry_on,
    order,
    pod,
    rollout,
    staged_on,
    state,
    version,
    world,
)

PREPARED: Fields = {**DONE, "preparedRevision": 2}


# -- from where ---------------------------------------------------------------------------------


def fleet(
    count: int,
    holders: Sequence[int] = (),
    away: Sequence[int] = (),
    zones: Mapping[int, str] | None = None,
) -> Observed:
    """Nodes with a pod each that are to get the new version, of which some have it and some have no
    agent.
    """
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
                node: [peer.node for peer in item.parents]
                for node, item in zip([action.node], items, strict=False)
            }
    return found


def written(seen: Observed, node: str, item: StageItem) -> None:
    """A node's entry as it was written, with this item."""
    known = seen.states[node]
    entry = known.spec.rollouts[0]
    rest = [each for each in entry.stage if each.digest != item.digest]
    entries_ = [entry.model_copy(update={"stage": [*rest, item]})]
    seen.put(
        "state", node, replace(known, spec=known.spec.model_copy(update={"rollouts": entries_}))
    )


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


@pytest.mark.parametrize(
    ("endpoint", "others", "trusted"),
    [
        ("tcp://10.0.0.1:7600", (), True),
        ("tcp://[fd00::0:1]:7600", ("ucx://10.0.0.1:7601",), True),
        ("tcp://10.9.9.9:7600", (), False),
        ("tcp://10.0.0.1:7600", ("mpi://10.9.9.9:1",), False),
        ("tcp://10.0.0.1.evil.example:7600", (), False),
    ],
)
def test_nobody_is_sent_to_an_address_that_is_not_the_agent_s(
    endpoint: str, others: tuple[str, ...], trusted: bool
) -> None:
    """A compromised agent may write any endpoint; whoever comes there brings a token."""
    node = state("n0")
    told = [Endpoint(scheme=one.partition(":")[0], endpoint=one) for one in others]
    status = node.status.model_copy(
        update={"endpoint": endpoint, "endpoints": told, "boot_id": "b"}
    )
    seen = world([], [replace(node, status=status)])
    seen.put("agent", "n0", Agent("n0", "n0", True, ("10.0.0.1", "fd00::1")))
    assert seen.peers() == (frozenset({"n0"}) if trusted else frozenset())
    assert seen.follows("n0")


def test_neighbours_pull_from_each_other() -> None:
    found = routes(fleet(4, zones={0: "a", 1: "b", 2: "a", 3: "b"}))
    assert found == {"n0": [], "n2": ["n0"], "n1": ["n2"], "n3": ["n1"]}


def waiting_for(parent_away: bool, holds: bool) -> Observed:
    """n1 was told to pull from n0."""
    seen = fleet(2, holders=[0, 1] if holds else [0], away=[0] if parent_away else [])
    written(
        seen,
        "n1",
        NEW_ITEM.model_copy(update={"parents": [Peer(node="n0", endpoint="tcp://n0:1")]}),
    )
    return seen


def test_a_route_is_changed_only_when_it_is_needed_and_broken() -> None:
    quiet = rollout(PREPARED)
    assert routes(waiting_for(parent_away=False, holds=False), quiet).get("n1", ["n0"]) == ["n0"]
    assert routes(waiting_for(parent_away=True, holds=False), quiet)["n1"] == []
    assert routes(waiting_for(parent_away=True, holds=True), quiet).get("n1", ["n0"]) == ["n0"]


def test_a_node_whose_parent_goes_is_led_elsewhere_though_nothing_happened_on_it() -> None:
    seen, running = fleet(2, holders=[0]), rollout(AT_NEW, paused=True)
    written(seen, "n0", NEW_ITEM)
    written(
        seen,
        "n1",
        NEW_ITEM.model_copy(update={"parents": [Peer(node="n0", endpoint="tcp://n0:1")]}),
    )
    for node in ("n0", "n1"):
        known = seen.states[node]
        orders = [given.model_copy(update={"revision": 2}) for given in known.spec.rollouts[0].pods]
        entry = known.spec.rollouts[0].model_copy(
            update={"pods": orders, "namespace": "models", "name": "llm"}
        )
        seen.put(
            "state", node, replace(known, spec=known.spec.model_copy(update={"rollouts": [entry]}))
        )
    assert decide(running, seen, NOW).actions == ()
    moved = seen.states["n0"]
    status = moved.status.model_copy(
        update={
            "endpoint": "tcp://n0:2",
            "endpoints": [Endpoint(scheme="tcp", endpoint="tcp://n0:2")],
        }
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
