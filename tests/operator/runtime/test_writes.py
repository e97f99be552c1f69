"""The loop's patience: refusals of nodes, writes that land late, progress that waits; and the
workers around it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest

from hotweights_common.backoff import Backoff
from hotweights_crds.nodeweights import UNASSIGNED, StagedVersion
from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_kube.errors import Conflict, Invalid, KubeError
from hotweights_operator.model.objects import Refusal, Rollout
from hotweights_operator.runtime.cache import Cache
from hotweights_operator.runtime.loop import Loop
from hotweights_operator.runtime.queue import WorkQueue
from hotweights_operator.runtime.reconcile import Reconciler
from hotweights_operator.runtime.triggers import Key
from tests.operator.runtime.test_loop import KEY, Port, Scene, ready_to_change, run, scene
from tests.operator.worlds import AT_NEW, NEW, NOW, OLD, engine, order, rollout, state, version

NODE: Key = ("node", "n0")
VERSION: Key = ("version", "models/new")


def change(s: Scene, **more: Any) -> None:
    """An edit of the rollout."""
    known: Rollout = s.cache.get("rollout", "models/llm")
    s.port.put("rollout", "models/llm", replace(known, **more))


def refusing(s: Scene, error: KubeError | None) -> None:
    """From now on n0 is refused, or no more."""
    s.port.refuse = {"n0": error} if error else {}


def round_of(s: Scene, seconds: float = 0.0) -> int:
    """Some time, a pass, and its writes: how many were tried."""
    s.now += timedelta(seconds=seconds)
    s.pass_()
    return s.write_all()


# -- writes that land late, or for somebody who is gone -----------------------------------------


def test_what_happens_while_a_write_is_under_way_is_looked_at_when_it_has_landed() -> None:
    s = ready_to_change(1)
    s.pass_()

    async def meanwhile(action: Any) -> None:
        await s.loop.reconcile(KEY, NOW)

    s.port.act = meanwhile  # type: ignore[method-assign]
    s.woken.clear()
    run(s.loop.write_one(NOW))
    assert s.woken == [(KEY, 0.0)]


def test_nothing_is_written_for_a_rollout_that_was_made_anew_under_its_name() -> None:
    s = ready_to_change(1)
    s.pass_()
    change(s, uid="r2")
    s.write_all()
    assert s.port.done == ["status"]


def test_a_conflict_is_no_refusal() -> None:
    s = ready_to_change(1)
    refusing(s, Conflict("the agent wrote in between"))
    round_of(s)
    assert s.cache.observed().refusals == {}
    refusing(s, None)
    assert (round_of(s), s.told(0)[0]) == (1, NEW)


# -- refusals -----------------------------------------------------------------------------------


def test_a_refusal_is_told_at_once_and_tried_again_in_a_while() -> None:
    s = ready_to_change(1)
    refusing(s, Invalid("no"))
    s.pass_()
    s.woken.clear()
    s.write_all()
    assert s.woken == [(KEY, 0.5), (KEY, 0.0)]


def test_after_a_success_patience_begins_anew() -> None:
    s = ready_to_change(1)
    for error in (Invalid("no"), None, Invalid("no")):
        refusing(s, error)
        for _ in range(4 if error else 2):
            round_of(s, 40.0)
        s.port.put(
            "state", "n0", state("n0", [engine(0, phase="Prepared", prepared=NEW)], {"p0": OLD})
        )
        change(s, status=rollout(AT_NEW).status)
    refusing(s, Invalid("no"))
    s.loop.outbox.replace(KEY, ())
    waits = [seconds for key, seconds in s.woken if key == KEY and seconds]
    assert waits.count(0.5) >= 2


def test_a_node_that_refuses_for_an_hour_is_asked_twice_a_minute() -> None:
    s = ready_to_change(1)
    refusing(s, Invalid("no"))
    tried = [bool(round_of(s, 1.0)) for _ in range(600)]
    assert 18 <= sum(tried[60:]) <= 20


def test_a_node_s_own_object_is_written_to_with_the_same_patience() -> None:
    s = scene([state("n0")], rollout(AT_NEW, target={"selector": {"matchLabels": {"app": "none"}}}))
    refusing(s, Invalid("no"))
    tried = 0
    for _ in range(100):
        run(s.loop.reconcile(NODE, s.now))
        tried += s.write_all()
        s.now += timedelta(seconds=0.1)
    assert tried == 5
    assert s.cache.observed().refusals == {}
    refusing(s, None)
    s.now += timedelta(seconds=30)
    run(s.loop.reconcile(NODE, s.now))
    s.write_all()
    assert s.cache.get("state", "n0").entry(UNASSIGNED) is not None


def test_a_pod_on_a_node_that_refuses_is_left_out_until_the_node_is_asked_again() -> None:
    s = ready_to_change(2, strategy={"type": "Rolling", "rolling": {"maxUnavailable": 1}})
    refusing(s, Invalid("no"))
    round_of(s)
    s.pass_()
    assert s.cache.observed().refusals["r", "n0"].is_due is False
    s.write_all()
    assert s.told(1)[0] == NEW
    s.now += timedelta(seconds=1)
    s.pass_()
    assert s.cache.observed().refusals["r", "n0"].is_due is True


def test_what_a_node_refused_of_another_rollout_is_that_one_s() -> None:
    s = ready_to_change(1)
    theirs = Refusal("Invalid", "no")
    s.cache.observed().refusals["another", "n0"] = theirs
    for _ in range(3):
        round_of(s, 60.0)
    assert s.cache.observed().refusals == {("another", "n0"): theirs}


def test_a_rollout_made_anew_does_not_wait_for_what_was_refused_before() -> None:
    s = ready_to_change(1)
    refusing(s, Invalid("no"))
    for _ in range(8):
        round_of(s, 40.0)
    known: Rollout = s.cache.get("rollout", "models/llm")
    s.cache.drop("rollout", "models/llm", s.cache.version_of("rollout", "models/llm") + 1)
    round_of(s)
    s.cache.put(
        "rollout", "models/llm", 999, replace(known, uid="r2", status=rollout(AT_NEW).status)
    )
    refusing(s, None)
    round_of(s)
    assert s.cache.get("state", "n0").entry("r2") is not None


# -- statuses -----------------------------------------------------------------------------------


def test_progress_that_waits_is_written_though_nothing_else_happens() -> None:
    s = scene([state("n0", [engine(0)], {"p0": order("p0", OLD)})], rollout(AT_NEW))
    s.pass_()
    fetching = [StagedVersion(digest=NEW, phase="Fetching", bytes_done=7, bytes_total=100)]
    s.port.put("state", "n0", state("n0", [engine(0)], {"p0": OLD}, staged=fetching))
    s.pass_()
    s.now += timedelta(seconds=0.25)
    s.port.put(
        "state",
        "n0",
        state(
            "n0",
            [engine(0)],
            {"p0": OLD},
            staged=[fetching[0].model_copy(update={"bytes_done": 9})],
        ),
    )
    s.woken.clear()
    s.pass_()
    assert (s.status.nbytes.done, s.woken) == (7, [(KEY, 0.75)])


def test_a_version_s_status_is_written_when_it_says_something_new() -> None:
    s = ready_to_change(1)
    s.port.put("version", "models/new", version("new", ""))
    for _ in range(3):
        run(s.loop.reconcile(VERSION, s.now))
    assert s.port.done == ["version"]


def test_an_operator_that_starts_gives_a_rollout_all_of_its_time() -> None:
    s = scene([state("n0", [engine(0, phase="Preparing")], {"p0": OLD})], rollout(AT_NEW))
    s.pass_()
    late = NOW + timedelta(hours=1)
    s.loop = Loop(s.cache, s.port, s.port, lambda key, seconds: None, started_at=late)
    s.now = late
    s.pass_()
    assert s.status.phase != "Stalled"


def test_writers_are_told_when_there_is_something_to_write() -> None:
    s = ready_to_change(1)
    told: list[int] = []
    s.loop.filled = lambda: told.append(len(s.loop.outbox))
    s.pass_()
    assert told == [1]


# -- the workers --------------------------------------------------------------------------------


@dataclass
class Meter:
    """What became of the rollout's passes."""

    results: list[str] = field(default_factory=list)

    def reconciled(self, kind: str, result: str, seconds: float) -> None:
        self.results += [result] if kind == "rollout" else []

    def ended(self, outcome: Any, seconds: float) -> None:
        """Not asked here."""

    def acted(self, action: Any) -> None:
        """Not asked here."""


@dataclass
class Clumsy(Port):
    """Refuses a status this often, with this."""

    errors: list[Exception] = field(default_factory=list)

    async def write_rollout(self, rollout: Rollout, status: WeightRolloutStatus) -> None:
        if self.errors:
            raise self.errors.pop(0)
        await super().write_rollout(rollout, status)


async def worked(*errors: Exception, again: bool = False) -> tuple[list[str], list[str]]:
    """What becomes of a rollout whose status is refused so: results of passes, and what was
    written.
    """
    cache = Cache(clock=lambda: NOW - timedelta(hours=1))
    made = ready_to_change(1)
    port = Clumsy(cache, errors=list(errors))
    meter = Meter()
    reconciler = Reconciler(cache, WorkQueue[Key](0.0, backoff=Backoff(0.001, 30.0)), port, meter)
    reconciler.begin()
    for kind in ("version", "node", "agent", "state", "pod"):
        for value in made.cache.values(kind):
            key = value.uid if kind in ("agent", "pod") else value.name
            port.put(kind, f"models/{key}" if kind == "version" else key, value)
    port.put("rollout", "models/llm", made.cache.get("rollout", "models/llm"))
    reconciler.changed("rollout", "models/llm", None)
    tasks: list[Coroutine[Any, Any, None]] = [reconciler.work(), reconciler.write()]
    running = [asyncio.create_task(task) for task in tasks]
    end = asyncio.get_running_loop().time() + 20.0
    while asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.005)
        if "n0" in port.done and (not again or len(meter.results) > 1):
            break
        if again and meter.results == ["ok"]:
            reconciler.changed("rollout", "models/llm", port.cache.get("rollout", "models/llm"))
    for task in running:
        task.cancel()
    ends = await asyncio.gather(*running, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends
    return meter.results, port.done


@pytest.mark.parametrize(
    ("error", "result"),
    [(Conflict("x"), "conflict"), (Invalid("x"), "error"), (RuntimeError("x"), "defect")],
)
async def test_whatever_a_pass_ends_with_it_is_tried_again(error: Exception, result: str) -> None:
    results, done = await worked(error)
    assert results[:2] == [result, "ok"]
    assert done == ["status", "n0"]


async def test_a_pass_that_did_not_keep_the_processor_busy_may_be_followed_at_once() -> None:
    results, _ = await worked(again=True)
    assert results[:2] == ["ok", "ok"]


async def test_a_rollout_that_is_new_is_looked_at_and_written() -> None:
    results, done = await worked()
    assert (results[0], done) == ("ok", ["status", "n0"])
