"""The loop: remembered before acted upon, writes that see a pause, and a node that refuses concerns
itself alone.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from hotweights_crds.nodeweights import StagedVersion
from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_crds.weightversion import WeightVersionStatus
from hotweights_kube.errors import Conflict, Invalid, KubeError
from hotweights_operator.decide.revision import Outcome
from hotweights_operator.model.actions import Action, Assign, Event
from hotweights_operator.model.objects import Agent, Node, NodeState, Rollout, Version
from hotweights_operator.model.observed import Kind
from hotweights_operator.runtime.cache import Cache
from hotweights_operator.runtime.loop import Loop
from hotweights_operator.runtime.outbox import Outbox, Write
from hotweights_operator.runtime.triggers import Key
from tests.operator.worlds import (
    AT_NEW,
    NEW,
    NOW,
    OLD,
    engine,
    gave_up,
    pod,
    prepared,
    rollout,
    state,
    version,
)

KEY: Key = ("rollout", "models/llm")


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What it gives; here nobody waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("it waits")


@dataclass
class Port:
    """An API server that does what it is told, or refuses what it is told to refuse."""

    cache: Cache
    refuse: dict[str, KubeError] = field(default_factory=dict)  # "status", or a node's name
    done: list[str] = field(default_factory=list)
    told: list[Event] = field(default_factory=list)
    ends: list[Outcome] = field(default_factory=list)

    async def write_rollout(self, rollout: Rollout, status: WeightRolloutStatus) -> None:
        self._ask("status")
        self.put("rollout", "models/llm", replace(rollout, status=status))

    async def write_version(self, version: Version, status: WeightVersionStatus) -> None:
        self._ask("version")
        self.put("version", f"models/{version.name}", replace(version, status=status))

    async def act(self, action: Action) -> None:
        self._ask(action.node)
        known: NodeState = self.cache.get("state", action.node)
        if isinstance(action, Assign):
            rest = [entry for entry in known.spec.rollouts if entry.uid != action.uid]
            entries = [*rest, action.entry] if action.entry else rest
            spec = known.spec.model_copy(update={"rollouts": entries})
            self.put(
                "state",
                action.node,
                replace(known, spec=spec, resource_version=str(int(known.resource_version) + 1)),
            )

    async def tell(self, events: Sequence[Event]) -> None:
        self.told += events

    def ended(self, outcome: Outcome, seconds: float) -> None:
        self.ends.append(outcome)

    def acted(self, action: Action) -> None:
        """Counted by `done`."""

    def put(self, kind: Kind, key: str, value: object) -> None:
        self.cache.put(kind, key, self.cache.version_of(kind, key) + 1, value)

    def _ask(self, what: str) -> None:
        if what in self.refuse:
            raise self.refuse[what]
        self.done.append(what)


@dataclass
class Scene:
    """A loop around a cluster of one pod per node."""

    cache: Cache
    port: Port
    loop: Loop
    woken: list[tuple[Key, float]]
    now: datetime = NOW

    def pass_(self) -> None:
        """One pass of the rollout, without its writes."""
        run(self.loop.reconcile(KEY, self.now))

    def write_all(self) -> int:
        """Everything that waits."""
        count = 0
        while run(self.loop.write_one(self.now)):
            count += 1
        return count

    @property
    def status(self) -> WeightRolloutStatus:
        """As it is written."""
        known: Rollout = self.cache.get("rollout", "models/llm")
        return known.status

    def told(self, number: int) -> tuple[str, str]:
        """What a pod is to serve and to prepare, as it is written."""
        given = self.cache.get("state", f"n{number}").assigned(f"p{number}")
        return (given.digest, given.prepare)


def scene(states: Sequence[NodeState], known: Rollout) -> Scene:
    """A pod for each node."""
    cache = Cache(clock=lambda: NOW - timedelta(hours=1))
    port = Port(cache)
    port.put("rollout", "models/llm", known)
    for each in (version("old", OLD), version("new", NEW)):
        port.put("version", f"models/{each.name}", each)
    for number, each_state in enumerate(states):
        port.put("node", each_state.name, Node(each_state.name, each_state.name))
        port.put("agent", each_state.name, Agent(each_state.name, each_state.name, True))
        port.put("state", each_state.name, each_state)
        port.put("pod", f"p{number}", pod(number, each_state.name))
    woken: list[tuple[Key, float]] = []
    loop = Loop(
        cache, port, port, lambda key, seconds: woken.append((key, seconds)), started_at=NOW
    )
    return Scene(cache, port, loop, woken)


def ready_to_change(count: int, **spec: Any) -> Scene:
    """Every engine has prepared the new version."""
    states = [state(f"n{n}", [prepared(n + 1)[n]], {f"p{n}": OLD}) for n in range(count)]
    return scene(states, rollout(AT_NEW, **{"strategy": {"type": "AllAtOnce"}, **spec}))


def about_to_give_up(action: str) -> Scene:
    """One of two engines has given the new version up."""
    failed = engine(0, OLD, phase="Failed", failed=gave_up())
    states = [state("n0", [failed], {"p0": NEW}), state("n1", [prepared(2)[1]], {"p1": OLD})]
    return scene(states, rollout(AT_NEW, failurePolicy={"action": action}))


def test_the_status_is_written_before_anything_is_done() -> None:
    s = ready_to_change(2)
    s.pass_()
    assert s.port.done == ["status"]
    s.write_all()
    assert s.port.done == ["status", "n0", "n1"]
    assert (s.told(0)[0], s.told(1)[0]) == (NEW, NEW)


@pytest.mark.parametrize("error", [Conflict("x"), Invalid("x")])
def test_a_pass_whose_status_is_refused_does_nothing(error: KubeError) -> None:
    s = ready_to_change(2)
    s.port.refuse["status"] = error
    with pytest.raises(type(error)):
        s.pass_()
    assert (s.write_all(), s.port.done, s.port.told) == (0, [], [])


@pytest.mark.parametrize("action", ["Pause", "Abort"])
@pytest.mark.parametrize("refused", ["n0", "n1"])
def test_given_up_stays_given_up_though_a_write_of_that_pass_is_refused(
    action: str, refused: str
) -> None:
    s = about_to_give_up(action)
    s.port.refuse[refused] = Conflict("the agent wrote in between")
    s.pass_()
    s.write_all()
    s.port.refuse.clear()
    # The one that had failed says nothing of it any more: it has been set back, or it has started
    # again.
    s.port.put(
        "state", "n0", replace(s.cache.get("state", "n0"), status=state("n0", prepared(1)).status)
    )
    for _ in range(3):
        s.pass_()
        s.write_all()
    assert s.status.phase == ("Aborted" if action == "Abort" else "Stalled")
    assert (s.told(0), s.told(1)) == ((OLD, ""), (OLD, ""))


@pytest.mark.parametrize("action", ["Pause", "Abort"])
@pytest.mark.parametrize("writes", [0, 1])
def test_given_up_stays_given_up_though_the_operator_ends_between_two_writes(
    action: str, writes: int
) -> None:
    s = about_to_give_up(action)
    s.pass_()
    for _ in range(writes):
        run(s.loop.write_one(NOW))
    s.port.put(
        "state", "n0", replace(s.cache.get("state", "n0"), status=state("n0", prepared(1)).status)
    )
    s.loop = Loop(s.cache, s.port, s.port, lambda key, seconds: None, started_at=NOW)
    for _ in range(3):
        s.pass_()
        s.write_all()
    assert (s.told(0), s.told(1)) == ((OLD, ""), (OLD, ""))


def test_a_pause_is_seen_by_every_write_that_has_not_begun() -> None:
    s = ready_to_change(5)
    s.pass_()
    for _ in range(2):
        run(s.loop.write_one(NOW))
    known: Rollout = s.cache.get("rollout", "models/llm")
    paused = known.spec.model_copy(update={"paused": True})
    s.port.put(
        "rollout", "models/llm", replace(known, spec=paused, generation=known.generation + 1)
    )
    assert s.write_all() == 3  # they are taken up and dropped
    assert [s.told(n)[0] for n in range(5)] == [NEW, NEW, OLD, OLD, OLD]
    assert (KEY, 0.0) in s.woken
    s.pass_()
    s.write_all()
    assert (s.status.phase, [s.told(n)[0] for n in range(5)]) == (
        "Paused",
        [NEW, NEW, OLD, OLD, OLD],
    )


def test_nothing_is_written_to_a_node_that_has_changed_since() -> None:
    s = ready_to_change(2)
    s.pass_()
    s.port.put("state", "n0", replace(s.cache.get("state", "n0"), resource_version="77"))
    s.write_all()
    assert s.port.done == ["status", "n1"]


def test_nothing_is_decided_while_a_write_is_under_way() -> None:
    s = ready_to_change(2)
    s.pass_()
    flying = s.loop.outbox.take()
    if flying is None:
        raise LookupError("nothing to write")
    before = s.status
    s.port.put("rollout", "models/llm", replace(s.cache.get("rollout", "models/llm"), generation=4))
    s.pass_()
    assert (s.status, len(s.loop.outbox)) == (before, 0)
    s.loop.outbox.landed(flying)


def test_a_node_that_refuses_is_named_and_holds_up_nobody() -> None:
    s = ready_to_change(3)
    s.port.refuse["n1"] = Invalid("spec.rollouts: too many items")
    s.pass_()
    s.write_all()
    assert [s.told(n)[0] for n in range(3)] == [NEW, OLD, NEW]
    s.pass_()
    assert [(f.node, f.reason) for f in s.status.failures] == [("n1", "WriteRefused")]
    assert "too many items" in s.status.failures[0].message
    assert s.write_all() == 0, "it is not tried again at once"
    s.now += timedelta(seconds=1)
    s.pass_()
    assert s.write_all() == 1
    s.port.refuse.clear()
    s.now += timedelta(seconds=2)
    s.pass_()
    s.write_all()
    s.now += timedelta(seconds=2)
    s.pass_()
    assert (s.told(1)[0], s.status.failures) == (NEW, [])


def test_a_refusal_of_what_is_not_wanted_any_more_is_forgotten() -> None:
    s = ready_to_change(1)
    s.port.refuse["n0"] = Invalid("no")
    s.pass_()
    s.write_all()
    known: Rollout = s.cache.get("rollout", "models/llm")
    paused = known.spec.model_copy(update={"paused": True})
    s.port.put(
        "rollout", "models/llm", replace(known, spec=paused, generation=known.generation + 1)
    )
    for _ in range(3):
        s.pass_()
        s.now += timedelta(seconds=1)
    assert s.status.failures == []


def test_a_node_that_goes_on_refusing_is_asked_ever_more_rarely() -> None:
    s = ready_to_change(1)
    s.port.refuse["n0"] = Invalid("no")
    asked = 0
    for _ in range(600):
        s.pass_()
        asked += s.write_all()
        s.now += timedelta(seconds=1)
    assert 20 < asked < 40


def test_mere_progress_is_written_once_a_second() -> None:
    s = scene([state("n0", [engine(0)], {"p0": OLD})], rollout(AT_NEW))
    written = 0
    for step in range(20):
        fetching = [StagedVersion(digest=NEW, phase="Fetching", bytes_done=step, bytes_total=100)]
        s.port.put("state", "n0", state("n0", [engine(0)], {"p0": OLD}, staged=fetching))
        s.pass_()
        written = s.port.done.count("status")
        s.now += timedelta(seconds=0.25)
    assert written == 5
    assert s.status.nbytes.done >= 16


def test_the_end_of_a_revision_is_counted_once() -> None:
    s = scene([state("n0", [engine(0, NEW)], {"p0": NEW})], rollout(AT_NEW))
    s.port.put("pod", "p0", pod(0, "n0", shows=NEW))
    for _ in range(3):
        s.pass_()
    assert s.port.ends == ["Complete"]


# -- the outbox ---------------------------------------------------------------------------------


def test_the_newest_of_a_decider_is_what_counts() -> None:
    box = Outbox()
    other: Key = ("node", "n0")
    box.replace(
        KEY, [Write(KEY, Assign("n0", "1", "r", None)), Write(KEY, Assign("n1", "1", "r", None))]
    )
    box.replace(other, [Write(other, Assign("n0", "1", "unassigned", None))])
    box.replace(KEY, [Write(KEY, Assign("n1", "2", "r", None))])
    assert len(box) == 2
    taken = [box.take(), box.take()]
    assert [(w.key, w.action.node) for w in taken if w] == [(other, "n0"), (KEY, "n1")]
    assert (box.take(), box.under_way(KEY)) == (None, 1)


def test_a_node_is_written_to_once_at_a_time() -> None:
    box = Outbox()
    other: Key = ("node", "n0")
    box.replace(KEY, [Write(KEY, Assign("n0", "1", "r", None))])
    box.replace(other, [Write(other, Assign("n0", "1", "unassigned", None))])
    first = box.take()
    assert box.take() is None
    if first is None:
        raise LookupError("nothing came")
    box.landed(first)
    assert box.take() is not None
