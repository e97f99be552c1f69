"""However much there is and whatever goes wrong: the node goes on, and what it leaves out is
said.
"""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from hotweights_agent.driver import Driver
from hotweights_agent.local.state_file import StateFile
from hotweights_agent.metrics import Metrics
from hotweights_agent.session import effects as fx
from hotweights_agent.session import messages as msg
from hotweights_agent.session import next_effects, node_status, report, session
from hotweights_agent.session.engine import STORY_EVENTS, Engine
from hotweights_agent.session.phases import IllegalMove
from hotweights_agent.session.session import AgentInfo, Session
from hotweights_agent.session.versions import NodeVersions
from hotweights_agent.staging.store import Store
from hotweights_crds.nodeweights import (
    MAX_ENGINES,
    MAX_RESOLVE,
    MAX_STAGED,
    NodeWeightsSpec,
    NodeWeightsStatus,
    PodAssignment,
    ResolvedVersion,
    ResolveItem,
    RolloutAssignment,
    StageItem,
)
from hotweights_transports.handoff import frames
from tests.agent.fake_engine import until
from tests.agent.world import World, digest, engine_of, item, pod


def name(number: int) -> str:
    return f"sha256:{number:064x}"


def crowd(pods: int, rollouts: int, versions: int = 2) -> NodeWeightsSpec:
    """Rollouts of ``versions`` each; pods take turns among them and are told the first version of
    theirs.
    """
    entries = []
    for r in range(rollouts):
        digests = [name(versions * r + v + 1) for v in range(versions)]
        entries.append(
            RolloutAssignment(
                uid=f"r{r:03}",
                stage=[
                    StageItem(digest=d, namespace="ns", version=f"v{d[-3:]}", uri="file:///w")
                    for d in digests
                ],
                pods=[
                    PodAssignment(
                        uid=f"p{p:03}", name=f"p{p}", namespace="ns", token=1, digest=digests[0]
                    )
                    for p in range(r, pods, rollouts)
                ],
            )
        )
    return NodeWeightsSpec(rollouts=entries)


class Node:
    """A session with engines that do what they are told, many messages at a time."""

    def __init__(self) -> None:
        self.session = Session(AgentInfo("boot"), reconnect_seconds=0.0)
        self.seconds = itertools.count()
        self.status = NodeWeightsStatus()
        self.conns: dict[int, str] = {}
        self.gates: dict[str, fx.PodStatus] = {}
        self.defects: list[fx.Defect] = []

    def tell(self, *messages: msg.Message) -> list[msg.Message]:
        """What the world answers."""
        answers: list[msg.Message] = []
        for effect in self.session.handle_all(messages, msg.Now(float(next(self.seconds)), "t")):
            match effect:
                case fx.Stage(found):
                    answers.append(msg.StageDone(found.digest, found.version, 10, 10, 1.0))
                case fx.SendPrepare():
                    answers.append(
                        msg.FrameReceived(effect.conn, frames.Prepared(effect.id, effect.digest))
                    )
                case fx.Send(conn, frames.Commit() as frame):
                    answers.append(
                        msg.FrameReceived(
                            conn, frames.Committed(frame.id, frame.digest, frame.commit_token)
                        )
                    )
                case fx.WritePodStatus():
                    self.gates[effect.pod.uid] = effect.pod_status
                    answers.append(
                        msg.PodStatusSeen(effect.pod.uid, effect.pod_status.digest_label)
                    )
                case fx.Report():
                    self.status = effect.status
                case fx.Defect():
                    self.defects.append(effect)
                case _:
                    pass
        return answers

    def settle(self, *messages: msg.Message) -> None:
        waiting = list(messages)
        for _ in range(40):
            waiting = self.tell(*waiting) if waiting else self.tell(msg.Ticked())

    def connect(self, *uids: str) -> list[msg.Message]:
        hellos: list[msg.Message] = []
        for uid in uids:
            for role in ("rank", "server"):
                conn = len(self.conns)
                self.conns[conn] = uid
                hellos.append(msg.Connected(conn, msg.Pod(uid, "ns", uid), frames.Hello(role=role)))
        return hellos


def test_three_hundred_pods_of_a_hundred_rollouts() -> None:
    node = Node()
    node.settle(msg.Assigned(crowd(300, 100), 1), *node.connect(*(f"p{p:03}" for p in range(300))))
    assert node.defects == []
    assert (len(node.status.engines), len(node.status.staged), node.status.left_out) == (
        300,
        200,
        "",
    )
    assert {e.phase for e in node.status.engines} == {"Serving"}
    assert [pod_status.gate for pod_status in node.gates.values()] == [True] * 300
    assert node.status.summary == "300/300"


def test_lists_that_are_too_long_are_cut_and_what_others_need_stays() -> None:
    node = Node()
    connected = [f"p{p:03}" for p in range(MAX_ENGINES + 3 - 10, MAX_ENGINES + 3)]
    spec = crowd(MAX_ENGINES + 3, 67, versions=4)
    node.settle(msg.Assigned(spec, 1), *node.connect(*connected))
    status = NodeWeightsStatus.from_dict(node.status.to_dict())
    assert node.defects == []
    assert (len(status.engines), len(status.staged)) == (MAX_ENGINES, MAX_STAGED)
    assert status.left_out == "12 of 268 versions, 3 of 515 engines"
    assert {e.pod_uid for e in status.engines} >= set(connected)
    assert {s.digest for s in status.staged} >= {p.digest for r in spec.rollouts for p in r.pods}
    assert status.summary == "10/515"


def test_as_many_sources_as_can_be_asked_for_are_told() -> None:
    node = Node()
    asked = [
        ResolveItem(uid=f"u{i}", namespace="n", name="w", model="m", version="v", uri="u")
        for i in range(MAX_RESOLVE)
    ]
    node.tell(msg.Assigned(NodeWeightsSpec(resolve=asked), 1))
    for one in asked:
        node.tell(msg.ResolveDone(ResolvedVersion(uid=one.uid, digest=digest(1))))
    assert len(node.status.resolved) == MAX_RESOLVE


def test_a_name_that_is_too_long_is_cut() -> None:
    node = Node()
    node.tell(msg.Assigned(crowd(0, 1), 1))
    node.tell(msg.StageDone(name(1), "v" * 1000, 1, 1, 1.0))
    assert node.defects == []
    assert {len(s.version) for s in node.status.staged} == {63, 4}


# -- defects ------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def broken_for(uid: str, real: Any) -> Any:
    def step(engine: Engine, *rest: Any) -> Any:
        if engine.pod.uid == uid:
            raise Broken(uid)
        return real(engine, *rest)

    return step


@pytest.fixture
def two() -> World:
    """Engines ``a`` and ``b`` serve v1."""
    world = World()
    world.assign([pod(uid, version=1) for uid in "ab"], [item(1), item(2)])
    for uid in "ab":
        world.boot(uid)
    world.settle(4)
    return world


def handle(world: World, message: msg.Message) -> list[fx.Effect]:
    """As `World.tell`, which raises for a defect."""
    effects = world.session.handle(message, msg.Now(world.now, "t"))
    for effect in effects:
        if not isinstance(effect, fx.Defect):
            world.perform(effect)
    return effects


@pytest.mark.parametrize("error", [Broken, IllegalMove])
def test_a_defect_in_steering_costs_one_engine_which_comes_back_clean(
    two: World, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    conns = {two.engines["a"].server, *two.engines["a"].ranks.values()}
    with monkeypatch.context() as patched:
        patched.setattr(session, "next_effects", broken_for("a", next_effects.next_effects))
        effects = handle(two, msg.Ticked())
    (found,) = (e for e in effects if isinstance(e, fx.Defect))
    assert (found.where, found.subject, found.story[-1]) == (
        "next effects",
        "ns/a",
        "it was Serving",
    )
    assert len(found.story) <= STORY_EVENTS + 1
    for event in (
        "a rank connected",
        "Prepared",
        "Send Commit",
        "Preparing → Committing",
        "Committing → Serving",
    ):
        assert any(event in told for told in found.story), event
    assert {e.conn for e in effects if isinstance(e, fx.Close)} == conns
    assert (engine_of(two, "a").phase, engine_of(two, "b").phase) == ("Disconnected", "Serving")
    two.settle(3)
    assert engine_of(two, "a").digest == digest(1)
    assert two.engines["a"].commits == [digest(1)], "it was committed once"


@pytest.mark.parametrize("kind", ["said", "connected"])
def test_a_defect_in_what_an_engine_says_costs_that_engine(
    two: World, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    message: msg.FrameReceived | msg.Connected = msg.FrameReceived(
        two.engines["a"].server or 0, frames.State("Serving", digest(1), 1)
    )
    if kind == "connected":
        message = msg.Connected(
            two.new_conn("a"), msg.Pod("a", "ns", "a"), frames.Hello(role="server")
        )
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "said", broken_for("a", Engine.said))
        patched.setattr(Engine, "connect", broken_for("a", Engine.connect))
        effects = handle(two, message)
    assert [e.where for e in effects if isinstance(e, fx.Defect)] == [type(message).__name__]
    assert message.conn in {e.conn for e in effects if isinstance(e, fx.Close)}
    two.settle(3)
    assert {engine_of(two, uid).digest for uid in "ab"} == {digest(1)}


def test_an_engine_that_cannot_be_told_of_takes_no_other_with_it(
    two: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_status, "engine_status", broken_for("a", report.engine_status))
    monkeypatch.setattr(session, "pod_status", broken_for("a", report.pod_status))
    handle(two, msg.Ticked())
    assert two.status is not None
    assert [e.pod_uid for e in two.status.engines] == ["b"]


@pytest.mark.parametrize("step", ["next_effects", "status", "progressed"])
def test_a_defect_elsewhere_costs_its_step(
    two: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def broken(*_: object) -> None:
        raise Broken

    monkeypatch.setattr(NodeVersions, step, broken)
    effects = handle(two, msg.StageProgressed(digest(1), 1, 1, 1))
    assert {type(e) for e in effects} == {fx.Defect}
    monkeypatch.undo()
    two.settle(2)
    assert engine_of(two, "a").digest == digest(1)


async def test_the_driver_counts_a_defect_names_it_once_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Parts:
        """Everything that an effect may need; one of them is broken."""

        def __init__(self) -> None:
            self.status: list[NodeWeightsStatus] = []
            self.staged: list[StageItem] = []

        def offer(self, status: NodeWeightsStatus, *, urgent: bool) -> None:
            self.status.append(status)

        def want(self, *_: object) -> None:
            raise Broken

        def stage(self, found: StageItem) -> None:
            self.staged.append(found)

        def prefer(self, _: object) -> None:
            pass

    metrics, parts = Metrics(), Parts()
    memory = StateFile(tmp_path / "pods.json")
    seconds = itertools.count()
    driver = Driver(
        Session(AgentInfo("boot"), reconnect_seconds=0.0),
        memory,
        Store(available=lambda: 2**30),
        metrics,
        lambda: msg.Now(next(seconds) / 100, "t"),
    )
    driver.status = driver.pod_status = driver.stager = parts  # type: ignore[assignment]
    task = asyncio.create_task(driver.run())
    await driver.tell(msg.Assigned(NodeWeightsSpec(rollouts=crowd(5, 1).rollouts), 1))
    await driver.tell(msg.Assigned(NodeWeightsSpec(rollouts=crowd(7, 1).rollouts), 2))
    await until(lambda: bool(parts.status) and parts.status[-1].observed_generation == 2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert metrics.defects._value.get() == 7
    assert [
        r.message for r in caplog.records if "a defect of the agent in WritePodStatus" in r.message
    ] == ["a defect of the agent in WritePodStatus; please report it. The node goes on without it"]
    assert len(parts.staged) == 2
    caplog.clear()
    await driver._do(
        fx.Defect("next effects", Broken(), "ns/a", ("12:00:01 Send Commit", "it was Committing"))
    )
    assert caplog.messages == [
        "a defect of the agent in next effects, which cost the engine of ns/a its connections "
        "(12:00:01 Send Commit; it was Committing); please report it. The node goes on without it"
    ]
