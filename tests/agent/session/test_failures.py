"""What an engine gave up: said by version and revision, kept until it is no longer so, and no
obstacle to what comes next.
"""

from __future__ import annotations

from typing import Any

import pytest

from hotweights_agent.session import effects as fx
from hotweights_agent.session import messages as msg
from hotweights_crds.nodeweights import GivenUp
from hotweights_transports.handoff import frames
from tests.agent.world import World, digest, engine_of, item, pod

ITEMS = [item(1), item(2), item(3)]


@pytest.fixture
def serving() -> World:
    """Engine ``a`` serves v1; v2 and v3 are on the node."""
    world = World()
    world.assign([pod(version=1)], ITEMS)
    world.boot("a")
    world.settle(4)
    return world


def asked(world: World, version: int) -> int:
    """How often the version was asked for."""
    commits = [
        e.frame.digest
        for e in world.log
        if isinstance(e, fx.Send) and isinstance(e.frame, frames.Commit)
    ]
    prepares = [e.digest for e in world.log if isinstance(e, fx.SendPrepare)]
    return (commits + prepares).count(digest(version))


def test_a_prepare_that_was_refused_names_what_it_was_for(serving: World) -> None:
    serving.engines["a"].rejects = {digest(2)}
    serving.assign([pod(version=1, token=2, prepare=2, rollout="r", revision=7)], ITEMS)
    serving.settle(3)
    assert engine_of(serving).failed == GivenUp(
        digest=digest(2),
        rollout="r",
        revision=7,
        token=2,
        step="Prepare",
        reason="ShapeMismatch",
        message="rank 0: no",
    )


def test_a_commit_is_given_up_after_its_last_try_and_not_before(serving: World) -> None:
    serving.engines["a"].fails = ["DrainTimeout"] * 3
    serving.assign([pod(version=2, token=2, revision=1)], ITEMS)
    seen = []
    for _ in range(30):
        serving.settle(1)
        seen.append((len(serving.engines["a"].fails), engine_of(serving).failed is not None))
    assert set(seen) == {(3, False), (2, False), (1, False), (0, True)}
    found = engine_of(serving).failed
    assert found is not None
    assert (found.step, found.digest, found.reason, found.booting) == (
        "Commit",
        digest(2),
        "DrainTimeout",
        False,
    )


def test_a_booting_engine_that_gives_up_says_so_and_boots_on(serving: World) -> None:
    serving.boot("a").rejects = {digest(1)}
    serving.settle(4)
    found = engine_of(serving)
    assert found.failed is not None
    assert (found.phase, found.failed.booting, found.failed.digest) == ("Refused", True, digest(1))
    assert serving.engines["a"].state == "Booting"
    serving.engines["a"].rejects = set()
    serving.assign([pod(version=2, token=2)], ITEMS)
    serving.settle(4)
    assert (engine_of(serving).digest, serving.engines["a"].state) == (digest(2), "Serving")


def test_a_commit_that_leaves_a_booting_engine_dirty_was_at_boot(serving: World) -> None:
    serving.boot("a").fails = ["dirty"]
    serving.settle(4)
    found = engine_of(serving)
    assert found.failed is not None
    assert (found.phase, found.failed.step, found.failed.booting) == ("Dirty", "Commit", True)


def test_no_answer_is_given_up_like_a_refusal(serving: World) -> None:
    serving.assign([pod(version=2, token=2)], ITEMS)
    for _ in range(3):
        while not any(isinstance(frame, frames.Commit) for _, frame in serving.engines["a"].inbox):
            serving.connect("a")
            serving.pass_time(1)
            if serving.engines["a"].inbox and isinstance(
                serving.engines["a"].inbox[0][1], frames.Prepare
            ):
                serving.read("a")
        serving.pass_time(120)
    assert [e.reason for e in serving.log if isinstance(e, fx.Close)] == ["CommitTimeout"] * 3
    serving.connect("a")
    serving.pass_time(1)
    found = engine_of(serving).failed
    assert found is not None
    assert (found.step, found.reason) == ("Commit", "CommitTimeout")


def test_a_slow_prepare_costs_the_attempt_and_no_readiness() -> None:
    """Three pods serve what they are assigned; none of their ranks ever ends its prepare."""
    world = World()
    uids = ("a", "b", "c")
    world.assign([pod(uid, version=1) for uid in uids], ITEMS)
    for uid in uids:
        world.boot(uid, world_size=2)
    world.settle(4)
    told = len(world.log)
    world.assign([pod(uid, version=1, token=2, prepare=2) for uid in uids], ITEMS)
    for _ in range(40):  # three tries of 600 s
        world.pass_time(50)
        assert [world.pod_status[uid].gate for uid in uids] == [True] * 3
    assert not [e for e in world.log[told:] if isinstance(e, fx.Close)]
    for uid in uids:
        found = engine_of(world, uid)
        assert (found.digest, found.reason) == (digest(1), "PrepareTimeout")
        assert found.failed is not None
        assert found.failed.reason == "PrepareTimeout"
    prepares = [e for e in world.log[told:] if isinstance(e, fx.SendPrepare)]
    assert len(prepares) == 3 * 2 * len(uids), "three tries of each rank"


def test_a_late_answer_counts_for_nothing_and_the_next_try_does(serving: World) -> None:
    serving.assign([pod(version=1, token=2, prepare=2)], ITEMS)
    serving.finish_stage(digest(2))
    serving.pass_time(601)
    serving.read("a")  # the late answer
    assert engine_of(serving).prepared == ""
    serving.settle(4)
    assert (engine_of(serving).prepared, engine_of(serving).failed) == (digest(2), None)


def test_a_rank_that_hangs_in_one_version_is_asked_for_the_way_back_all_the_same(
    serving: World,
) -> None:
    serving.assign([pod(version=1, token=2, prepare=2)], ITEMS)
    serving.finish_stage(digest(2))
    serving.assign([pod(version=1, token=3, prepare=3)], ITEMS)
    serving.finish_stage(digest(3))
    for _ in range(60):
        serving.pass_time(50)
    found = engine_of(serving).failed
    assert found is not None
    assert (found.digest, found.reason) == (digest(3), "PrepareTimeout")


def test_it_is_kept_when_something_else_is_told_until_that_version_is_prepared(
    serving: World,
) -> None:
    engine = serving.engines["a"]
    engine.rejects = {digest(2)}
    serving.assign([pod(version=1, token=2, prepare=2, revision=1)], ITEMS)
    serving.settle(3)
    for token, prepare in ((3, 0), (4, 3)):
        serving.assign([pod(version=1, token=token, prepare=prepare, revision=2)], ITEMS)
        serving.settle(3)
        found = engine_of(serving).failed
        assert found is not None
        assert (found.digest, found.revision) == (digest(2), 1)
    engine.rejects = set()
    serving.assign([pod(version=1, token=5, prepare=2, revision=3)], ITEMS)
    serving.settle(3)
    assert (engine_of(serving).failed, engine_of(serving).prepared) == (None, digest(2))


def test_it_is_kept_after_a_failed_commit_though_that_version_is_still_prepared_and_goes_when_it_serves(
    serving: World,
) -> None:
    serving.engines["a"].fails = ["ProbeMismatch"]
    serving.assign([pod(version=2, token=2, revision=1)], ITEMS)
    serving.settle(4)
    serving.assign([pod(version=1, token=3, revision=1, prepare=2)], ITEMS)
    serving.settle(4)
    assert engine_of(serving).failed is not None
    assert serving.pod_status["a"].gate, "it serves what it is told"
    serving.assign([pod(version=2, token=4, revision=2)], ITEMS)
    serving.settle(4)
    assert (engine_of(serving).failed, engine_of(serving).digest) == (None, digest(2))


@pytest.mark.parametrize("how", ["boots", "all go"])
def test_another_life_failed_at_nothing_yet(serving: World, how: str) -> None:
    serving.engines["a"].fails = ["ProbeMismatch"]
    serving.assign([pod(version=2, token=2)], ITEMS)
    serving.settle(4)
    assert engine_of(serving).failed is not None
    if how == "boots":
        engine = serving.engines["a"]
        engine.state, engine.active = "Booting", ""
        serving.hello(engine, serving.new_conn("a"), "server", 0)
    else:
        serving.kill("a")
    assert engine_of(serving).failed is None


@pytest.mark.parametrize("fault", ["ProbeMismatch", "rejects"])
@pytest.mark.parametrize("another", [{"revision": 2}, {"revision": 1, "rollout": "made anew"}])
def test_what_was_given_up_is_tried_again_in_another_revision_of_the_same_token(
    serving: World, fault: str, another: dict[str, Any]
) -> None:
    engine = serving.engines["a"]
    engine.fails, engine.rejects = (
        (["ProbeMismatch"], set()) if fault != "rejects" else ([], {digest(2)})
    )
    serving.assign([pod(version=2, token=2, revision=1)], ITEMS)
    serving.settle(30)
    tries = asked(serving, 2)
    serving.assign([pod(version=2, token=2, revision=1, restarts=5)], ITEMS)
    serving.settle(30)
    assert asked(serving, 2) == tries, "restarts mean nothing here"
    engine.rejects = set()
    serving.assign([pod(version=2, token=2, **another)], ITEMS)
    serving.settle(4)
    assert engine_of(serving).digest == digest(2)


def test_numbers_alone_disturb_nobody_who_serves(serving: World) -> None:
    before = len(serving.log)
    serving.assign([pod(version=1, token=1, revision=3, restarts=2)], ITEMS)
    serving.settle(3)
    done = {type(e) for e in serving.log[before:]}
    assert done <= {fx.SaveAssignments, fx.Report}, "no frame, no mark"


@pytest.mark.parametrize("fault", ["ProbeMismatch", "rejects"])
def test_what_was_given_up_makes_way_for_what_comes_next(serving: World, fault: str) -> None:
    """A pod that failed the new version gets ready for the one to go back or on to."""
    engine = serving.engines["a"]
    engine.fails, engine.rejects = (
        (["ProbeMismatch"], set()) if fault != "rejects" else ([], {digest(2)})
    )
    serving.assign([pod(version=2, token=2, prepare=3, revision=1)], ITEMS)
    serving.settle(6)
    found = engine_of(serving)
    assert (found.phase, found.prepared, found.digest) == ("Prepared", digest(3), digest(1))
    assert found.failed is not None
    assert found.failed.digest == digest(2)
    assert (serving.pod_status["a"].gate, serving.pod_status["a"].reason) == (
        True,
        found.failed.reason,
    ), "it serves as before, and says why nothing else"
    assert engine.prepared[0] == {digest(1), digest(3)}, "no memory is held for what was given up"
    serving.assign([pod(version=3, token=3, revision=2)], ITEMS)
    serving.settle(3)
    assert engine_of(serving).digest == digest(3)


def test_it_stays_refused_while_what_comes_next_is_not_there(serving: World) -> None:
    serving.engines["a"].rejects = {digest(2)}
    serving.assign([pod(version=2, token=2, prepare=4)], [item(1), item(2)])
    serving.settle(3)
    assert (engine_of(serving).phase, engine_of(serving).reason) == ("Refused", "ShapeMismatch")


def test_a_refusal_counts_though_another_rank_said_before_that_it_may_pass(serving: World) -> None:
    serving.assign([pod("b", version=1)], ITEMS)
    engine = serving.boot("b", 2)
    (first, one), (second, two) = engine.inbox.popleft(), engine.inbox.popleft()
    assert isinstance(one, frames.Prepare)
    assert isinstance(two, frames.Prepare)
    serving.tell(msg.FrameReceived(first, frames.Rejected(one.id, one.digest, "LoadFailed", "no")))
    assert engine_of(serving, "b").failed is None
    serving.tell(
        msg.FrameReceived(second, frames.Rejected(two.id, two.digest, "DtypeMismatch", "no"))
    )
    found = engine_of(serving, "b").failed
    assert found is not None
    assert found.reason == "DtypeMismatch"


def test_a_refusal_of_what_is_no_longer_asked_is_no_failure(serving: World) -> None:
    serving.engines["a"].rejects = {digest(2)}
    serving.assign([pod(version=1, token=2, prepare=2)], ITEMS)
    serving.assign([pod(version=1, token=3, prepare=3)], ITEMS)
    serving.settle(4)
    assert (engine_of(serving).failed, engine_of(serving).prepared) == (None, digest(3))


def test_a_stale_token_speaks_against_the_order_and_not_against_the_version(serving: World) -> None:
    serving.engines["a"].fails = ["StaleToken"]
    serving.assign([pod(version=2, token=2)], ITEMS)
    serving.settle(4)
    assert (engine_of(serving).phase, engine_of(serving).failed) == ("Failed", None)
