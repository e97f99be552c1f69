"""An agent that came back with memory of its own hands engines what they serve once more, so that
they let go of the memory of its former life; nobody notices anything else of it.
"""

from __future__ import annotations

import pytest

from hotweights_agent.session import effects as fx
from hotweights_agent.session.engine import MAX_HELD
from hotweights_transports.handoff import frames
from tests.agent.world import World, digest, engine_of, item, pod

ITEMS = [item(1), item(2)]


@pytest.fixture
def restarted() -> World:
    """Engine ``a``, of two ranks, serves v1; the agent is new and has heard of all, and holds
    nothing yet.
    """
    world = World()
    world.assign([pod(version=1)], ITEMS)
    world.boot("a", 2)
    world.settle(4)
    world.start_agent()
    world.connect("a")
    world.log.clear()
    return world


def lives(world: World) -> list[dict[str, int]]:
    """Which life's memory each rank maps, by version."""
    return list(world.engines["a"].maps.values())


def prepares(world: World, version: int) -> int:
    return [e.digest for e in world.log if isinstance(e, fx.SendPrepare)].count(digest(version))


def sent(world: World, kind: type[frames.Frame]) -> list[frames.Frame]:
    return [e.frame for e in world.log if isinstance(e, fx.Send) and isinstance(e.frame, kind)]


def test_what_serves_is_mapped_anew_once_it_is_here_again(restarted: World) -> None:
    restarted.pass_time(1.0)
    assert prepares(restarted, 1) == 0, "there is nothing to hand over yet"
    shown = restarted.pod_status["a"]
    restarted.finish_stage(digest(1))
    assert prepares(restarted, 1) == 2
    assert lives(restarted) == [{digest(1): 1}] * 2
    restarted.settle(5)
    assert lives(restarted) == [{digest(1): 2}] * 2
    assert prepares(restarted, 1) == 2, "once is enough"
    assert sent(restarted, frames.Commit) == []
    assert restarted.engines["a"].commits == [digest(1)]
    assert restarted.pod_status["a"] == shown


def test_meanwhile_it_is_said_to_serve_and_to_have_failed_at_nothing(restarted: World) -> None:
    restarted.finish_stage(digest(1))
    restarted.pass_time(1.0)
    found = engine_of(restarted)
    assert (found.phase, found.digest, found.prepared) == ("Serving", digest(1), "")
    assert restarted.pod_status["a"].gate


def test_what_was_never_mapped_is_not_handed_over() -> None:
    """An engine that never switched holds nothing of an agent's."""
    world = World()
    world.assign([pod(version=1)], ITEMS)
    world.boot("a").maps = {0: {}}
    world.engines["a"].state, world.engines["a"].active = "Serving", digest(1)
    world.start_agent()
    world.settle(4)
    assert world.staged >= {digest(1)}
    assert prepares(world, 1) == 0


@pytest.mark.parametrize("how", ["refuses", "is silent"])
def test_a_rank_that_does_not_map_it_keeps_what_it_has_and_nothing_has_failed(
    restarted: World, how: str
) -> None:
    engine = restarted.engines["a"]
    engine.rejects = {digest(1)} if how == "refuses" else set()
    restarted.finish_stage(digest(1))
    if how == "is silent":
        restarted.pass_time(700.0)
        assert [frame.op for _, frame in engine.inbox] == ["prepare"] * 2, "nothing to let go of"
        engine.inbox.clear()
    restarted.settle(30)
    assert prepares(restarted, 1) == 2, "it is not asked again and again"
    assert lives(restarted) == [{digest(1): 1}] * 2
    found = engine_of(restarted)
    assert (found.phase, found.reason, found.failed) == ("Serving", "", None)
    assert restarted.pod_status["a"].gate
    engine.rejects = set()
    restarted.assign([pod(version=2, token=2)], ITEMS)
    restarted.settle(6)
    assert lives(restarted) == [{digest(2): 2}] * 2, "the way on is open"


def test_an_order_comes_first_and_lets_the_old_memory_go_as_well(restarted: World) -> None:
    restarted.finish_stage(digest(2))
    restarted.assign([pod(version=1, token=2, prepare=2)], ITEMS)
    restarted.finish_stage(digest(1))
    assert prepares(restarted, 1) == 0, "a prepare is under way"
    restarted.assign([pod(version=2, token=3)], ITEMS)
    restarted.settle(6)
    assert engine_of(restarted).digest == digest(2)
    assert prepares(restarted, 1) == 0
    assert lives(restarted) == [{digest(2): 2}] * 2


def test_what_was_refused_is_not_hidden_by_it(restarted: World) -> None:
    restarted.engines["a"].rejects = {digest(2)}
    restarted.assign([pod(version=1, token=2, prepare=2)], ITEMS)
    restarted.finish_stage(digest(2))
    while restarted.engines["a"].inbox:
        restarted.read("a")
    restarted.finish_stage(digest(1))
    assert prepares(restarted, 1) == 2
    restarted.pass_time(1.0)
    assert engine_of(restarted).phase == "Refused"


def test_a_commit_waits_until_what_serves_is_mapped(restarted: World) -> None:
    restarted.assign([pod(version=1, token=2, prepare=2)], ITEMS)
    restarted.finish_stage(digest(2))
    for _ in range(2):
        restarted.read("a")  # both ranks have prepared v2, and wait for its order
    restarted.finish_stage(digest(1))
    assert prepares(restarted, 1) == 2
    restarted.assign([pod(version=2, token=3)], ITEMS)
    restarted.write_marks()
    restarted.pass_time(5.0)
    assert sent(restarted, frames.Commit) == []
    assert restarted.pod_status["a"].digest_label, "the switch has not begun"
    restarted.settle(6)
    assert engine_of(restarted).digest == digest(2)


def test_what_nobody_asks_for_any_more_is_let_go_of_though_another_agent_prepared_it() -> None:
    world = World()
    world.assign([pod(version=1, prepare=2)], ITEMS)
    world.boot("a")
    world.settle(4)
    assert lives(world) == [{digest(1): 1, digest(2): 1}]
    world.api_up = False  # the order changes while no agent looks
    world.assign([pod(version=1)], ITEMS)
    world.api_up = True
    world.start_agent()
    world.settle(4)
    assert lives(world) == [{digest(1): 2}]


def test_a_rank_that_says_it_holds_thousands_costs_a_few_frames() -> None:
    world = World()
    world.assign([pod(version=1)], ITEMS)
    world.boot("a")
    world.settle(4)
    many = {f"sha256:{number:064x}": 1 for number in range(1000)}
    world.engines["a"].maps[0] = {"no digest": 1, **many}
    world.start_agent()
    world.settle(4)
    assert len(sent(world, frames.Release)) == MAX_HELD - 1
