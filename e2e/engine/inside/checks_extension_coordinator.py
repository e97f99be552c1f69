"""`apply_update` with a real coordinator: it takes part in an attempt, waits for the decision, and
never says what is not so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e.engine.inside.checks_extension import assert_same, bound, plan_of, snapshot, write
from e2e.engine.seed_world import Operator
from hotweights.adapters.vllm_extension import Applied, HotweightsWorkerExtension, NotApplied
from hotweights_coordinator.wire.messages import CoordinatorUnreachable
from hotweights_planner import plan as plans
from tests.coordinator.running import running


@pytest.fixture
def coordinator() -> Iterator[Operator]:
    with running() as served:
        operator = Operator(served.endpoint)
        yield operator
        operator.stop()


class Model:
    """A module with an extension, and what to bring it to."""

    def __init__(
        self, coordinator: Operator, folder: Path, version: str = "v1", **values: Any
    ) -> None:
        self.module = torch.nn.Linear(6, 6)
        self.before = snapshot(self.module)
        self.new = snapshot(torch.nn.Linear(6, 6))
        self.plan: plans.Plan = plan_of(
            folder / version, write(folder / version, self.new, version)
        )
        self.extension: HotweightsWorkerExtension = bound(
            self.module, endpoint=coordinator.endpoint, **values
        )


def in_thread(act: Callable[[], Applied]) -> Callable[[], Applied]:
    """Begin it; the result waits for it, and raises what it raised."""
    results: list[Applied | Exception] = []

    def run() -> None:
        try:
            results.append(act())
        except Exception as error:  # noqa: BLE001 - raised again in the test's thread
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def wait() -> Applied:
        thread.join(120)
        (result,) = results
        if isinstance(result, Exception):
            raise result
        return result

    return wait


def test_it_waits_for_the_commit_and_reports_what_it_applied(
    coordinator: Operator, tmp_path: Path
) -> None:
    model = Model(coordinator, tmp_path, worker_id="trainer-0")
    token = coordinator.begin(model.plan)
    result = in_thread(lambda: model.extension.apply_update(wait_for_commit=True))
    assert coordinator.until_state("precommitted")["precommitted"] == ["trainer-0"]
    with model.extension.lock:  # free while nothing changes
        assert_same(snapshot(model.module), model.before)
        coordinator.commit("v1")
        coordinator.until_state("committed")
        assert_same(snapshot(model.module), model.before)
    applied = result()
    assert (applied.version, applied.token, applied.changed) == ("v1", token, True)
    assert_same(snapshot(model.module), model.new)
    assert (coordinator.status() or {})["applied"] == ["trainer-0"]
    again = model.extension.apply_update()
    assert (again.digest, again.changed) == (applied.digest, False)


def test_what_was_committed_before_is_applied_at_once(
    coordinator: Operator, tmp_path: Path
) -> None:
    first, late = Model(coordinator, tmp_path / "a"), Model(coordinator, tmp_path / "b")
    coordinator.begin(first.plan, commit_when_ready=True)
    first.extension.apply_update()
    assert late.extension.apply_update().version == "v1"
    assert_same(snapshot(late.module), first.new)


def test_two_of_them_commit_together(coordinator: Operator, tmp_path: Path) -> None:
    one, two = Model(coordinator, tmp_path / "a"), Model(coordinator, tmp_path / "b")
    coordinator.begin(one.plan)
    results = [
        in_thread(partial(m.extension.apply_update, wait_for_commit=True)) for m in (one, two)
    ]
    coordinator.until(lambda: len((coordinator.status() or {})["precommitted"]) == 2)
    coordinator.commit("v1")
    assert {result().version for result in results} == {"v1"}
    assert_same(snapshot(one.module), one.new)
    assert_same(snapshot(two.module), one.new)


def test_the_only_worker_need_not_wait(coordinator: Operator, tmp_path: Path) -> None:
    model = Model(coordinator, tmp_path)
    coordinator.begin(model.plan)
    assert model.extension.apply_update().version == "v1"
    assert (coordinator.status() or {})["state"] == "committed"
    assert_same(snapshot(model.module), model.new)


def test_an_abort_changes_nothing(coordinator: Operator, tmp_path: Path) -> None:
    model = Model(coordinator, tmp_path)
    coordinator.begin(model.plan)
    result = in_thread(lambda: model.extension.apply_update(wait_for_commit=True))
    coordinator.until_state("precommitted")
    coordinator.client.call("abort", reason="changed my mind")
    with pytest.raises(NotApplied) as caught:
        result()
    assert caught.value.reason == "Aborted"
    assert_same(snapshot(model.module), model.before)
    assert model.extension.applied is None


def test_what_does_not_fit_aborts_the_attempt_with_its_words(
    coordinator: Operator, tmp_path: Path
) -> None:
    model = Model(coordinator, tmp_path)
    wrong = write(tmp_path / "wrong", {"weight": torch.zeros(6, 7), "bias": torch.zeros(6)}, "v2")
    coordinator.begin(plan_of(tmp_path / "wrong", wrong))
    with pytest.raises(NotApplied, match="weight has shape"):
        model.extension.apply_update()
    status = coordinator.until_state("aborted")
    assert "weight has shape" in status["reason"]
    assert status["applied"] == []
    assert_same(snapshot(model.module), model.before)


def test_nobody_decides_for_ever(coordinator: Operator, tmp_path: Path) -> None:
    model = Model(coordinator, tmp_path)
    with pytest.raises(NotApplied, match="has no version"):
        model.extension.apply_update()
    coordinator.begin(model.plan)
    with pytest.raises(NotApplied) as caught:
        model.extension.apply_update(timeout_seconds=2.0, wait_for_commit=True)
    assert caught.value.reason == "DecisionTimeout"
    assert_same(snapshot(model.module), model.before)


def test_without_a_coordinator_it_says_so_in_time(tmp_path: Path) -> None:
    extension = bound(torch.nn.Linear(2, 2), endpoint="tcp://127.0.0.1:1")
    began = time.monotonic()
    with pytest.raises(CoordinatorUnreachable, match="coord-serve"):
        extension.apply_update()
    assert time.monotonic() - began < 60
