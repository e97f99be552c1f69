"""Who proves what: the engine's own word for the very version that it serves, and what becomes of a
version that may only be taken with golden tokens.
"""

from __future__ import annotations

import pytest

from hotweights_agent.metrics import Metrics
from hotweights_agent.session import effects as fx
from hotweights_agent.session import messages as msg
from hotweights_transports.handoff import frames
from tests.agent.world import KIND, World, digest, engine_of, item, pod

ITEMS = [item(1), item(2)]
OTHER_KIND = "vllm 0.32.0 cuda bfloat16"


@pytest.fixture
def serving() -> World:
    """Engine ``a`` serves v1, proved by golden tokens; v2 is on the node."""
    world = World()
    world.assign([pod(version=1)], ITEMS)
    world.boot("a")
    world.settle(4)
    return world


def proofs(world: World) -> tuple[str, str]:
    """The digest that the status names, and what proved it."""
    found = engine_of(world)
    return found.digest, found.probe


# -- what is said -------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", ["Golden", "Ran", "None"])
def test_the_engine_says_what_proved_what_it_serves(serving: World, probe: str) -> None:
    assert proofs(serving) == (digest(1), "Golden")
    assert engine_of(serving).kind == KIND
    serving.engines["a"].probe = probe
    serving.assign([pod(version=2, token=2)], ITEMS)
    serving.settle(4)
    assert proofs(serving) == (digest(2), probe)


@pytest.mark.parametrize("probe", ["Golden", "Ran"])
def test_an_agent_that_starts_again_hears_it_in_the_hello(serving: World, probe: str) -> None:
    serving.engines["a"].proved = probe
    serving.start_agent()
    serving.settle(4)
    assert proofs(serving) == (digest(1), probe)


@pytest.mark.parametrize("word", ["", "Certain", "golden", "x" * 9000])
def test_a_plugin_that_does_not_say_it_or_says_something_else_proves_nothing(
    serving: World, word: str
) -> None:
    serving.engines["a"].proved = word
    serving.start_agent()
    for _ in range(4):
        serving.connect("a")
        serving.pass_time(1)
    assert proofs(serving) == (digest(1), "")


def test_what_an_engine_booted_was_proved_by_nobody() -> None:
    world = World()
    world.assign([pod(version=0)], ITEMS)
    world.boot("a").proved = "Golden"
    world.settle(4)
    assert (engine_of(world).phase, *proofs(world)) == ("Serving", "", "")


def test_a_commit_that_breaks_takes_the_proof_and_a_repair_brings_it_back(serving: World) -> None:
    serving.engines["a"].fails = ["dirty"]
    serving.assign([pod(version=2, token=2)], ITEMS)
    serving.settle(3)
    assert (engine_of(serving).phase, *proofs(serving)) == ("Dirty", "", "")
    engine = serving.engines["a"]
    engine.state, engine.active, engine.proved = "Serving", digest(1), "Ran"
    state = frames.State("Serving", digest(1), 2, "Repaired", "", "Ran")
    assert engine.server is not None
    serving.tell(msg.FrameReceived(engine.server, state))
    assert proofs(serving) == (digest(1), "Ran")


def test_metrics_count_engines_by_what_proved_them(serving: World) -> None:
    metrics = Metrics()
    assert serving.status is not None
    metrics.show(serving.status)

    def count(probe: str) -> float | None:
        return metrics.registry.get_sample_value(
            "hotweights_agent_proved_engines", {"probe": probe}
        )

    assert [count(p) for p in ("Golden", "Ran", "None", "Unknown")] == [1, 0, 0, 0]


# -- what is demanded ---------------------------------------------------------------------------


def prepares(world: World, version: int) -> int:
    """How often a rank was asked for the version."""
    return sum(
        1 for e in world.log if isinstance(e, fx.SendPrepare) and e.digest == digest(version)
    )


def staged(kinds: frozenset[str]) -> World:
    """As `serving`, where v2 has golden tokens for these kinds of engine."""
    world = World()
    world.golden_kinds[digest(2)] = kinds
    world.assign([pod(version=1)], ITEMS)
    world.boot("a")
    world.settle(4)
    return world


def test_a_version_with_golden_tokens_for_the_engine_is_taken() -> None:
    world = staged(frozenset({KIND, OTHER_KIND}))
    world.assign([pod(version=1, token=2, prepare=2, golden=digest(2))], ITEMS)
    world.settle(4)
    assert engine_of(world).prepared == digest(2)
    world.assign([pod(version=2, token=3, golden=digest(2))], ITEMS)
    world.settle(4)
    assert proofs(world) == (digest(2), "Golden")


@pytest.mark.parametrize("kinds", [frozenset(), frozenset({OTHER_KIND})])
@pytest.mark.parametrize(("serve", "prepare"), [(1, 2), (2, 0)])
def test_without_them_it_is_given_up_before_a_rank_is_asked(
    kinds: frozenset[str], serve: int, prepare: int
) -> None:
    world = staged(kinds)
    order = pod("a", serve, 2, prepare, golden=digest(2), rollout="r", revision=7)
    world.assign([order], ITEMS)
    world.settle(30)
    found = engine_of(world)
    assert prepares(world, 2) == 0
    assert (found.phase, *proofs(world)) == ("Failed", digest(1), "Golden")
    assert found.failed is not None
    assert (found.failed.step, found.failed.digest, found.failed.reason, found.failed.revision) == (
        "Prepare",
        digest(2),
        "NoGoldenTokens",
        7,
    )
    for part in (KIND, "--record-probes", "activation.probe", *kinds):
        assert part in found.failed.message


def test_it_is_asked_of_that_version_alone() -> None:
    """What the pod serves until then, and what else it prepares, needs no golden tokens."""
    world = staged(frozenset())
    world.assign([pod(version=2, token=2, golden=digest(1))], ITEMS)
    world.settle(4)
    assert engine_of(world).digest == digest(2)


def test_an_engine_that_boots_is_asked_too_and_takes_the_next_version() -> None:
    world = World()
    world.assign([pod(version=2, golden=digest(2))], ITEMS)
    world.boot("a")
    world.settle(4)
    found = engine_of(world)
    assert found.failed is not None
    assert (found.failed.reason, found.failed.booting) == ("NoGoldenTokens", True)
    assert world.engines["a"].state == "Booting"
    world.assign([pod(version=1, token=2)], ITEMS)
    world.settle(4)
    assert (engine_of(world).digest, world.engines["a"].state) == (digest(1), "Serving")


def test_a_demand_that_is_taken_back_is_another_try_under_the_same_token() -> None:
    world = staged(frozenset())
    world.assign([pod(version=2, token=2, golden=digest(2))], ITEMS)
    world.settle(3)
    assert engine_of(world).failed is not None
    world.assign([pod(version=2, token=2)], ITEMS)
    world.settle(4)
    assert (engine_of(world).digest, engine_of(world).failed) == (digest(2), None)


def test_a_demand_that_comes_after_the_prepare_holds_the_commit() -> None:
    world = staged(frozenset())
    world.assign([pod(version=1, token=2, prepare=2)], ITEMS)
    world.settle(3)
    assert engine_of(world).prepared == digest(2)
    world.assign([pod(version=2, token=3, golden=digest(2))], ITEMS)
    world.settle(5)
    found = engine_of(world)
    assert found.failed is not None
    assert (found.digest, found.failed.reason) == (digest(1), "NoGoldenTokens")
    assert world.engines["a"].commits == [digest(1)]


def test_an_engine_that_does_not_say_its_kind_is_told_so() -> None:
    world = staged(frozenset({KIND}))
    world.engines["a"].kind = ""
    world.start_agent()
    world.assign([pod(version=2, token=2, golden=digest(2))], ITEMS)
    world.settle(5)
    found = engine_of(world).failed
    assert found is not None
    assert "does not say its kind" in found.message
    assert len(found.message) <= 512
