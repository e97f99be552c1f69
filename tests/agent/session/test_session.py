"""Single scenes of a node's life, each with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from hotweights_agent.session import effects as fx
from hotweights_agent.session import messages as msg
from hotweights_agent.session import next_effects
from hotweights_agent.session.engine import Engine
from hotweights_agent.session.phases import (
    TRANSITIONS,
    Happening,
    IllegalMove,
    Phase,
    after,
    drawing,
)
from hotweights_agent.session.session import AgentInfo, Session
from hotweights_crds.nodeweights import (
    Capacity,
    NodeWeightsSpec,
    Peer,
    ResolvedVersion,
    ResolveItem,
)
from hotweights_transports.handoff import frames
from tests.agent.world import EngineModel, World, digest, engine_of, item, pod


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def serving(world: World) -> World:
    """Engine ``a`` serves v1."""
    world.assign([pod(version=1)], [item(1)])
    world.boot("a")
    world.settle(4)
    assert engine_of(world).digest == digest(1)
    return world


def test_a_booting_engine_without_a_version_is_told_to_keep_what_it_booted(world: World) -> None:
    world.assign([pod()], [])
    engine = world.boot("a")
    world.settle(2)
    assert (engine.state, engine.active, engine.commits) == ("Serving", "", [])
    assert world.pod_status["a"].gate


def test_a_booting_engine_serves_its_version_from_its_first_answer_on(world: World) -> None:
    world.assign([pod(version=1)], [item(1)])
    engine = world.boot("a", 2)
    world.settle(1)
    assert engine_of(world).phase == "Booting", "it answers no request yet, whatever it prepares"
    assert not [e for e in world.log if isinstance(e, fx.Send) and isinstance(e.frame, frames.Keep)]
    world.settle(4)
    assert (engine.state, engine.active) == ("Serving", digest(1))


def test_a_booting_engine_waits_while_nobody_has_said_what_it_serves(world: World) -> None:
    world.assign([], [])
    engine = world.boot("a")
    world.settle(3)
    assert engine.state == "Booting"
    assert world.pod_status["a"].reason == "NotAssigned"


def test_ranks_are_told_where_a_version_may_wait_and_asked_anew_when_that_changes(
    serving: World,
) -> None:
    serving.engines["a"].rejects.add(digest(2))
    wanted = pod(version=1, token=2, prepare=2)
    serving.assign([wanted], [item(1), item(2)])
    serving.settle(4)
    asked = [e for e in serving.log if isinstance(e, fx.SendPrepare) and e.digest == digest(2)]
    assert (asked[-1].memory, asked[-1].max_pause_seconds) == ("Auto", 0.0)
    serving.engines["a"].rejects.clear()
    more = wanted.model_copy(update={"memory": "InPause", "max_pause_seconds": 9})
    serving.assign([more], [item(1), item(2)])
    serving.settle(4)
    asked = [e for e in serving.log if isinstance(e, fx.SendPrepare) and e.digest == digest(2)]
    assert (asked[-1].memory, asked[-1].max_pause_seconds) == ("InPause", 9.0)
    assert engine_of(serving).prepared == digest(2)


def test_what_is_prepared_is_asked_for_anew_when_it_shall_wait_elsewhere(serving: World) -> None:
    wanted = pod(version=1, token=2, prepare=2)
    serving.assign([wanted], [item(1), item(2)])
    serving.settle(4)
    asked = [e for e in serving.log if isinstance(e, fx.SendPrepare) and e.digest == digest(2)]
    assert engine_of(serving).prepared == digest(2)
    more = wanted.model_copy(update={"memory": "Host"})
    serving.assign([more], [item(1), item(2)])
    assert engine_of(serving).prepared == "", "nobody knows whether it can"
    serving.settle(4)
    anew = [e for e in serving.log if isinstance(e, fx.SendPrepare) and e.digest == digest(2)]
    assert [e.memory for e in anew[len(asked) :]] == ["Host"] * len(asked), "once for each rank"
    assert engine_of(serving).prepared == digest(2)


def test_what_a_version_leaves_as_it_was_is_said_of_engines_that_serve_one(world: World) -> None:
    caveat = "its draft model keeps the weights that it booted with"
    world.engines["a"] = EngineModel("a", 1, caveat=caveat)
    world.assign([pod()], [])
    world.boot("a")
    world.settle(4)
    assert "draft model" not in engine_of(world).message + world.pod_status["a"].message
    world.assign([pod(version=1, token=2)], [item(1)])
    world.settle(4)
    found = engine_of(world)
    assert (found.digest, found.reason) == (digest(1), "")
    assert found.message == caveat
    assert world.pod_status["a"].gate
    assert world.pod_status["a"].message == f"serves v1 as assigned; {found.message}"


@pytest.mark.parametrize(
    ("mode", "way", "stays"),
    [
        ("Keep", "Beside", True),
        ("Keep", "Host", True),
        ("Keep", "InPause", False),
        ("Keep", "Reload", False),
        ("Keep", "", False),
        ("Wait", "Beside", False),
        ("Abort", "Beside", False),
    ],
)
def test_a_pod_stays_in_its_service_through_a_pause_that_is_short(
    serving: World, mode: str, way: str, stays: bool
) -> None:
    serving.engines["a"].way = way
    serving.assign([pod(version=1, token=2, prepare=2, mode=mode)], [item(1), item(2)])
    serving.settle(4)
    assert serving.pod_status["a"].gate
    began = len(serving.log)
    serving.assign([pod(version=2, token=3, mode=mode)], [item(1), item(2)])
    serving.settle(4)
    assert engine_of(serving).digest == digest(2)
    marks = [e.pod_status for e in serving.log[began:] if isinstance(e, fx.WritePodStatus)]
    assert all(mark.gate for mark in marks) == stays
    assert "" in [mark.digest_label for mark in marks], "the label goes before the switch"
    assert (marks[-1].gate, marks[-1].digest_label) == (True, digest(2)[7:23])


def test_a_pod_that_does_not_serve_what_it_booted_by_order_stays_out(world: World) -> None:
    world.assign([pod(version=1)], [item(1)])
    engine = world.boot("a")
    engine.state = "Serving"  # nobody said so: its boot policy did
    world.connect("a")
    world.tell(msg.FrameReceived(engine.server or 0, frames.State("Serving", None, 0)))
    world.write_marks()
    assert not world.pod_status["a"].gate
    world.settle(4)
    assert world.pod_status["a"].gate


def test_what_is_prepared_is_committed_only_when_it_is_assigned(serving: World) -> None:
    serving.assign([pod(version=1, token=2, prepare=2)], [item(1), item(2)])
    serving.settle(4)
    found = engine_of(serving)
    assert (found.phase, found.prepared, found.digest) == ("Prepared", digest(2), digest(1))
    assert found.way == "Beside"
    assert serving.pod_status["a"].gate
    serving.assign([pod(version=2, token=3)], [item(1), item(2)])
    serving.settle(4)
    assert engine_of(serving).digest == digest(2)
    assert serving.staged == {digest(1), digest(2)}, (
        "what is listed stays, so that going back is local"
    )


def test_the_label_goes_before_the_switch_begins(serving: World) -> None:
    serving.assign([pod(version=2, token=2)], [item(1), item(2)])
    serving.finish_stage(digest(2))
    serving.read("a")  # prepared
    commits = [
        e for e in serving.log if isinstance(e, fx.Send) and isinstance(e.frame, frames.Commit)
    ]
    assert len(commits) == 1, "not before the label has gone"
    assert serving.pod_status["a"].digest_label
    serving.write_marks()
    assert not serving.pod_status["a"].digest_label
    assert serving.engines["a"].inbox, "now"


def test_an_older_token_changes_nothing_and_is_named(serving: World) -> None:
    serving.assign([pod(version=1, token=9)], [item(1)])
    serving.assign([pod(version=2, token=3)], [item(1), item(2)])
    serving.settle(3)
    found = engine_of(serving)
    assert (found.digest, found.token, found.reason) == (digest(1), 9, "StaleToken")
    assert "token 3 was refused: 9 is known" in found.message


def test_a_rejection_stands_until_the_assignment_or_the_image_changes(serving: World) -> None:
    engine = serving.engines["a"]
    engine.rejects = {digest(2)}
    serving.assign([pod(version=1, token=2, prepare=2)], [item(1), item(2)])
    serving.settle(20)
    found = engine_of(serving)
    assert (found.phase, found.reason, found.digest) == ("Refused", "ShapeMismatch", digest(1))
    asked = [e for e in serving.log if isinstance(e, fx.SendPrepare) and e.digest == digest(2)]
    assert len(asked) == 1
    engine.rejects = set()
    serving.assign([pod(version=1, token=3, prepare=2)], [item(1), item(2)])
    serving.settle(3)
    assert engine_of(serving).phase == "Prepared"


def test_a_prepare_that_nobody_wants_any_more_is_called_off(serving: World) -> None:
    serving.assign([pod(version=1, token=2, prepare=2)], [item(1), item(2)])
    serving.finish_stage(digest(2))
    serving.assign([pod(version=1, token=3, prepare=3)], [item(1), item(2), item(3)])
    serving.pass_time(1)
    off = [
        e.frame.digest
        for e in serving.log
        if isinstance(e, fx.Send) and isinstance(e.frame, frames.Release)
    ]
    assert off == [digest(2)]
    serving.settle(4)
    assert engine_of(serving).prepared == digest(3)


def test_commits_that_may_pass_are_tried_again_but_not_for_ever(serving: World) -> None:
    serving.engines["a"].fails = ["DrainTimeout", "DrainTimeout"]
    serving.assign([pod(version=2, token=2)], [item(1), item(2)])
    serving.settle(20)
    assert engine_of(serving).digest == digest(2)
    serving.engines["a"].fails = ["DrainTimeout"] * 9
    serving.assign([pod(version=1, token=3)], [item(1), item(2)])
    serving.settle(60)
    found = engine_of(serving)
    assert (found.phase, found.reason, found.digest) == ("Failed", "DrainTimeout", digest(2))
    assert len(serving.engines["a"].fails) == 6
    shown = serving.pod_status["a"]
    assert (shown.gate, shown.digest_label) == (True, digest(2)[7:23]), "it serves what it served"
    assert shown.reason == "DrainTimeout"


def test_a_dirty_engine_is_told_nothing_and_counts_for_nothing(serving: World) -> None:
    serving.engines["a"].fails = ["dirty"]
    serving.assign([pod(version=2, token=2)], [item(1), item(2)])
    serving.settle(10)
    found = engine_of(serving)
    assert (found.phase, found.digest) == ("Dirty", "")
    assert not serving.pod_status["a"].gate
    conn = serving.engines["a"].server
    assert conn is not None
    serving.engines["a"].state, serving.engines["a"].active = "Serving", digest(1)
    serving.tell(msg.FrameReceived(conn, frames.State("Serving", digest(1), 2)))
    assert engine_of(serving).digest == digest(1), "it has repaired itself"


def test_no_answer_to_a_commit_ends_the_connection_and_the_next_hello_tells(serving: World) -> None:
    serving.assign([pod(version=2, token=2)], [item(1), item(2)])
    serving.finish_stage(digest(2))
    serving.read("a")
    serving.write_marks()
    shown = serving.pod_status["a"]
    assert (shown.gate, shown.digest_label) == (True, ""), "requests wait for a moment"
    serving.pass_time(30)
    assert engine_of(serving).phase == "Committing"
    assert engine_of(serving).digest == ""
    serving.write_marks()
    assert not serving.pod_status["a"].gate, "that is no moment any more"
    serving.pass_time(60)
    assert [e.reason for e in serving.log if isinstance(e, fx.Close)] == ["CommitTimeout"]
    serving.settle(10)
    assert engine_of(serving).digest == digest(2)


def test_an_agent_that_restarts_commits_nothing_anew_and_unmarks_nobody() -> None:
    world = World(reconnect_seconds=10.0)
    world.assign([pod(version=1)], [item(1)])
    world.boot("a")
    world.settle(4)
    world.pass_time(20)
    world.start_agent()
    world.settle(2)
    assert world.pod_status["a"].gate
    assert world.engines["a"].commits == [digest(1)]
    assert world.staged == {digest(1)}, "staged again, so that it can be handed over again"
    assert engine_of(world).digest == digest(1)
    assert engine_of(world).confirmed_at, "it said so again, in the life that it has"


def test_after_the_grace_an_engine_that_did_not_come_back_is_unmarked() -> None:
    world = World(reconnect_seconds=10.0)
    world.assign([pod(version=1)], [item(1)])
    world.boot("a")
    world.settle(4)
    world.start_agent()
    world.write_marks()
    assert world.pod_status["a"].gate
    world.pass_time(11)
    world.write_marks()
    assert (world.pod_status["a"].gate, world.pod_status["a"].digest_label) == (False, "")


def test_the_disk_answers_for_the_api_server_while_it_is_away(serving: World) -> None:
    serving.api_up = False
    serving.start_agent()
    engine = serving.boot("a")
    serving.settle(4)
    assert (engine.state, engine.active) == ("Serving", digest(1))


def test_pods_that_are_gone_and_not_listed_are_forgotten(serving: World) -> None:
    serving.kill("a")
    serving.tell(msg.PodsPresent(frozenset()))
    assert "a" in serving.disk, "still listed"
    serving.assign([], [])
    serving.tell(msg.PodsPresent(frozenset()))
    assert serving.disk == {}


def test_before_the_api_server_was_asked_nothing_is_done_on_the_disks_word() -> None:
    session = Session(AgentInfo("boot"))
    world = World()
    world.assign([pod(version=1)], [item(1)])
    assert (
        session.handle(msg.AssignmentsLoaded(tuple(world.disk.values())), msg.Now(0.0, "t")) == []
    )


def test_versions_in_no_list_are_released_when_no_engine_takes_them_any_more(
    serving: World,
) -> None:
    serving.assign([pod(version=1, token=2, prepare=2)], [item(1), item(2)])
    serving.finish_stage(digest(2))
    serving.assign([pod(version=1, token=3)], [item(1)])
    assert digest(2) in serving.staged, "its memory is being handed over"
    serving.settle(2)
    assert serving.staged == {digest(1)}


def test_what_pods_wait_for_at_boot_comes_before_all_else(world: World) -> None:
    """A pod that serves, one that boots, one that is yet to come; and what is to be prepared."""
    world.assign([pod("a", version=1)], [item(1)])
    world.boot("a")
    world.settle(4)
    assert [e.digests for e in world.log if isinstance(e, fx.Prefer)] == [{digest(1)}, frozenset()]
    told = len(world.log)
    items = [item(n) for n in (1, 2, 3, 4)]
    world.assign([pod("a", version=1, token=2, prepare=4), pod("b", version=2)], items)
    order = [e for e in world.log[told:] if isinstance(e, fx.Prefer | fx.Stage)]
    assert order[0] == fx.Prefer(frozenset({digest(2)}))
    assert {e.item.digest for e in order[1:] if isinstance(e, fx.Stage)} == set(
        map(digest, (2, 3, 4))
    )
    world.boot("c")
    world.assign([pod("a", version=1, token=2), pod("c", version=3)], items)
    assert [e.digests for e in world.log if isinstance(e, fx.Prefer)][-1] == {digest(3)}


def test_staging_is_tried_again_until_its_timeout(world: World) -> None:
    world.assign([], [item(1, timeout_seconds=100)])
    tries = 0
    for _ in range(300):
        if digest(1) in world.fetching:
            tries += 1
            world.finish_stage(digest(1), "SourceNotFound")
        world.pass_time(1.0)
    assert 4 <= tries <= 12
    assert world.status is not None
    assert [(s.phase, s.reason) for s in world.status.staged] == [("Failed", "SourceNotFound")]
    world.assign([], [item(1, timeout_seconds=101)])
    assert digest(1) in world.fetching, "another entry is another chance"


def test_a_wrong_checksum_is_not_fetched_again_and_reported_at_once(world: World) -> None:
    world.assign([], [item(1)])
    world.finish_stage(digest(1), "ChecksumMismatch", transient=False)
    world.pass_time(1000)
    assert world.fetching == {}
    assert world.status is not None
    assert world.status.staged[0].phase == "Failed"


def test_the_first_failures_of_a_fetch_are_no_failure_yet(world: World) -> None:
    world.assign([], [item(1)])
    world.finish_stage(digest(1), "PeerUnreachable")
    assert world.status is not None
    assert (world.status.staged[0].phase, world.status.staged[0].reason) == (
        "Fetching",
        "PeerUnreachable",
    )


def test_a_rank_that_is_missing_takes_the_confirmation_with_it(world: World) -> None:
    world.assign([pod(version=1)], [item(1)])
    engine = world.boot("a", 2)
    world.settle(4)
    conn = engine.ranks[1]
    world.lose(conn)
    world.tell(msg.Disconnected(conn))
    found = engine_of(world)
    assert (found.digest, found.reason) == ("", "EngineIncomplete")


def test_every_api_server_of_an_engine_gets_to_open_its_port_but_one_commits(world: World) -> None:
    world.assign([pod(version=1)], [item(1)])
    engine = world.boot("a")
    second = world.new_conn("a")
    world.tell(
        msg.Connected(second, msg.Pod("a", "ns", "a"), frames.Hello(role="server", state="Booting"))
    )
    world.settle(4)
    kept = [
        e.conn for e in world.log if isinstance(e, fx.Send) and isinstance(e.frame, frames.Keep)
    ]
    assert (kept, engine.commits) == ([second], [digest(1)])


def test_an_answer_to_another_commit_than_the_one_asked_for_ends_the_connection(
    serving: World,
) -> None:
    serving.assign([pod(version=2, token=2)], [item(1), item(2)])
    serving.finish_stage(digest(2))
    serving.read("a")
    serving.write_marks()
    conn, frame = serving.engines["a"].inbox[0]
    assert isinstance(frame, frames.Commit)
    effects = serving.tell(msg.FrameReceived(conn, frames.Committed(frame.id, digest(3), 2)))
    assert [type(e) for e in effects if isinstance(e, fx.Close)] == [fx.Close]
    assert engine_of(serving).digest == ""


@pytest.mark.parametrize(
    "frame",
    [
        frames.Committed(99, digest(2), 1),
        frames.Kept(99),
        frames.Pong(),
        frames.CommitFailed(99, dirty=True),
        frames.Released(),
    ],
    ids=lambda frame: str(frame.op),
)
def test_answers_that_nobody_asked_for_change_nothing(serving: World, frame: frames.Frame) -> None:
    before = engine_of(serving)
    conn = serving.engines["a"].server
    assert conn is not None
    serving.tell(msg.FrameReceived(conn, frame))
    assert engine_of(serving) == before


@pytest.mark.parametrize(
    "hello",
    [
        frames.Hello(role="admin"),
        frames.Hello(role="rank", rank=3, world_size=2),
        frames.Hello(role="rank", rank=-1),
        frames.Hello(role="rank", world_size=10**9),
        frames.Hello(role="server", state="Fine"),
        frames.Hello(role="server", digest="../../etc"),
    ],
    ids=str,
)
def test_impossible_hellos_are_closed(world: World, hello: frames.Hello) -> None:
    effects = world.tell(
        msg.Connected(
            world.new_conn("a") if "a" in world.engines else 7, msg.Pod("x", "ns", "x"), hello
        )
    )
    assert any(isinstance(e, fx.Close) for e in effects)
    assert world.status is None or world.status.engines == []


def test_texts_of_engines_are_cleaned_before_anybody_reads_them(serving: World) -> None:
    serving.engines["a"].rejects = {digest(2)}
    serving.assign([pod(version=1, token=2, prepare=2)], [item(1), item(2)])
    serving.finish_stage(digest(2))
    conn, frame = serving.engines["a"].inbox.popleft()
    assert isinstance(frame, frames.Prepare)
    serving.tell(
        msg.FrameReceived(
            conn,
            frames.Rejected(frame.id, frame.digest, "no reason; really", "\ud800\n" + "x" * 5000),
        )
    )
    found = engine_of(serving)
    assert found.reason == "Rejected"
    assert len(found.message) <= 512
    found.message.encode()


def test_sources_are_read_once_and_failures_that_may_pass_again() -> None:
    world = World()
    wanted = ResolveItem(uid="w", namespace="ns", name="w", model="m", version="v", uri="file:///w")
    world.spec = NodeWeightsSpec(resolve=[wanted])
    world.sync()
    assert [e.item for e in world.log if isinstance(e, fx.Resolve)] == [wanted]
    world.tell(
        msg.ResolveDone(
            ResolvedVersion(uid="w", reason="SourceNotFound", message="no"), transient=True
        )
    )
    world.pass_time(3)
    world.tell(msg.ResolveDone(ResolvedVersion(uid="w", digest=digest(1), nbytes=5)))
    world.pass_time(1000)
    assert len([e for e in world.log if isinstance(e, fx.Resolve)]) == 2
    assert world.status is not None
    assert world.status.resolved[0].digest == digest(1)


def source(uid: str) -> ResolveItem:
    return ResolveItem(
        uid=uid, namespace="ns", name=uid, model="m", version="v", uri=f"file:///{uid}"
    )


def reads(world: World, *uids: str) -> list[str]:
    """What was begun to read since the last look, after these are asked for."""
    world.spec = NodeWeightsSpec(resolve=[source(uid) for uid in uids])
    before = len(world.log)
    world.sync()
    return [e.item.uid for e in world.log[before:] if isinstance(e, fx.Resolve)]


def unreadable(world: World, uid: str, reason: str = "BadManifest") -> None:
    world.tell(msg.ResolveDone(ResolvedVersion(uid=uid, reason=reason, message="repair it")))


def test_a_source_that_somebody_repairs_needs_nobody_to_say_so(world: World) -> None:
    reads(world, "w")
    unreadable(world, "w")
    tries, at = [], world.now
    for _ in range(700):
        before = len(world.log)
        world.pass_time(10)
        if [e for e in world.log[before:] if isinstance(e, fx.Resolve)]:
            tries.append(world.now - at)
            at = world.now
            assert world.status is not None
            assert world.status.resolved[0].reason == "BadManifest", "said until it is known better"
            unreadable(world, "w")
    assert tries == [60, 120, 240, 480] + [600] * (len(tries) - 4)
    assert len(tries) > 12, "for ever"
    world.pass_time(600)
    world.tell(msg.ResolveDone(ResolvedVersion(uid="w", digest=digest(1))))
    assert world.status is not None
    assert (world.status.resolved[0].digest, world.status.resolved[0].reason) == (digest(1), "")


def test_a_reading_that_nobody_asks_for_any_more_is_called_off(world: World) -> None:
    reads(world, "w")
    assert reads(world) == []
    assert [e.uid for e in world.log if isinstance(e, fx.CancelResolve)] == ["w"]
    unreadable(world, "w")
    world.pass_time(1000)
    assert world.status is not None
    assert world.status.resolved == []


def test_a_reading_that_takes_too_long_is_called_off_named_and_tried_again_later(
    world: World,
) -> None:
    reads(world, "w")
    world.pass_time(1800)
    assert [e.uid for e in world.log if isinstance(e, fx.CancelResolve)] == ["w"]
    assert world.status is not None
    assert world.status.resolved[0].reason == "ResolveTimeout"
    assert "file:///w was not read within 1800 s" in world.status.resolved[0].message
    before = len(world.log)
    world.pass_time(60)
    assert [type(e) for e in world.log[before:]] == [fx.Resolve]


def test_a_few_sources_are_read_at_a_time_and_broken_ones_keep_no_other_waiting(
    world: World,
) -> None:
    assert reads(world, *"abcdef") == list("abcd")
    for uid in "abcd":
        unreadable(world, uid)
    world.pass_time(1000)  # e and f are being read, and two of the broken ones again
    before = len(world.log)
    unreadable(world, "e")
    unreadable(world, "f")
    assert [e.item.uid for e in world.log[before:] if isinstance(e, fx.Resolve)] == ["c", "d"]
    assert reads(world, *"abcdefg") == []
    before = len(world.log)
    unreadable(world, "a")
    assert [e.item.uid for e in world.log[before:] if isinstance(e, fx.Resolve)] == ["g"], (
        "it failed least"
    )


def test_it_reports_the_memory_that_is_left_for_programs_and_for_people(serving: World) -> None:
    serving.tell(msg.CapacityChanged(8 * 2**30, 5 * 2**30 + 2**29))
    assert serving.status is not None
    assert serving.status.capacity == Capacity(
        memory_bytes=8 * 2**30, free_bytes=5 * 2**30 + 2**29, free="5.5GiB"
    )


def test_doing_a_step_twice_changes_nothing(serving: World) -> None:
    serving.sync()
    assert serving.tell(msg.Ticked()) == []
    assert serving.tell(msg.Assigned(serving.spec, serving.generation)) == []


@pytest.mark.parametrize(
    ("where", "name", "broken", "caught"),
    [
        (next_effects, "_unmarked", lambda engine, at: True, "shown on what it does not serve"),
        (Engine, "prepared_everywhere", lambda self, digest: True, "not every rank has it"),
        (
            Engine,
            "confirmed",
            property(lambda self: self.leader.digest if self.leader else ""),
            "a false commit",
        ),
    ],
    ids=["label", "prepared", "confirmed"],
)
def test_the_world_notices_a_broken_promise(
    serving: World,
    monkeypatch: pytest.MonkeyPatch,
    where: object,
    name: str,
    broken: object,
    caught: str,
) -> None:
    def live() -> None:
        serving.assign([pod(version=2, token=2)], [item(1), item(2)])
        serving.settle(4)

    monkeypatch.setattr(where, name, broken)
    with pytest.raises(AssertionError, match=caught):
        live()


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("happening", list(Happening))
def test_what_can_happen(phase: Phase, happening: Happening) -> None:
    since, to = TRANSITIONS[happening]
    if phase in since:
        assert after(phase, happening) is to
    else:
        with pytest.raises(IllegalMove, match=f"{phase}: {happening}"):
            after(phase, happening)


def test_the_table_forbids_something_and_leaves_no_phase_out() -> None:
    possible = sum(len(since) for since, _ in TRANSITIONS.values())
    assert possible < len(Phase) * len(Happening) * 2 / 3
    assert set(TRANSITIONS) == set(Happening)
    assert {to for _, to in TRANSITIONS.values()} == set(Phase)


def test_the_drawing_in_the_documents_is_of_this_table() -> None:
    text = (Path(__file__).parents[3] / "docs" / "design" / "005-agent.md").read_text()
    assert "```mermaid\n" + "\n".join(drawing()) + "\n```" in text


def test_a_prepare_that_was_called_off_does_not_count_when_the_version_is_wanted_again(
    serving: World,
) -> None:
    serving.assign([pod(version=1, token=2, prepare=2)], [item(1), item(2)])
    serving.finish_stage(digest(2))
    serving.assign([pod(version=1, token=3)], [item(1), item(2)])
    serving.assign([pod(version=2, token=4)], [item(1), item(2)])
    serving.read("a")  # prepared, and the order to release it has not been read yet
    serving.settle(4)
    assert engine_of(serving).digest == digest(2)


def test_an_engine_that_can_never_be_switched_says_so_at_once_and_not_that_it_is_awaited(
    world: World,
) -> None:
    """One rank of two is here for good: the other lives on another node."""
    world.assign([pod(version=1)], [item(1)])
    why = "engines that are spread over several nodes"
    hello = frames.Hello(role="rank", rank=0, world_size=2, unsupported=why)
    world.tell(msg.Connected(world.new_conn("a"), msg.Pod("a", "ns", "a"), hello))
    found = engine_of(world)
    assert (found.reason, found.message) == ("EngineUnsupported", why)
    assert not world.pod_status["a"].gate


def test_what_failed_by_one_route_is_tried_by_the_one_that_came_meanwhile() -> None:
    """The failure says nothing of the new one, and nothing else would begin a fetch of it."""
    world = World()
    parent = Peer(node="n", endpoint="tcp://n:1")
    world.assign([], [item(1, parents=[parent.model_dump()])])
    assert list(world.fetching) == [digest(1)]
    anew = item(1, parents=[parent.model_copy(update={"endpoint": "tcp://n:2"}).model_dump()])
    world.assign([], [anew])
    world.finish_stage(digest(1), "SourceNotFound", transient=False)
    world.pass_time(0.1)
    stages = [effect.item for effect in world.log if isinstance(effect, fx.Stage)]
    assert stages[-1] == anew
    assert len(stages) == 2
