"""The bench of the operator's loop measures a rollout that really happens, on a fleet of three."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import fleet, operator_loop, reconcile
from bench.apiserver import Server
from hotweights_kube import Conflict
from hotweights_kube.resources import NODE_WEIGHTS

pytestmark = pytest.mark.timeout(180)  # above what the bench waits itself


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "ANSWER_SECONDS", (0.01, 0.03))
    monkeypatch.setattr(fleet, "KUBELET_SECONDS", 0.01)
    monkeypatch.setattr(
        operator_loop, "SETTINGS", replace(operator_loop.SETTINGS, pace_seconds=0.02)
    )
    monkeypatch.setattr(reconcile, "QUIET_SECONDS", 0.2)
    monkeypatch.setattr(reconcile, "LIMIT_SECONDS", 60.0)


async def test_events_and_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "ROUNDS", 5)
    found = await reconcile.small_steps(2, 3)
    assert (found["pods"], found["rounds"]) == (6, 5)
    assert 0 < found["event_median_ms"] <= found["event_p99_ms"]
    assert 0 < found["decide_median_ms"] <= found["decide_p99_ms"]


async def test_a_whole_rollout_and_its_floor() -> None:
    found = await reconcile.all_at_once(3, 1)
    assert found["applies_per_node"] >= 2  # prepare, then serve
    assert (
        found["spec_to_prepared_seconds"]
        < found["spec_to_told_seconds"]
        < found["spec_to_complete_seconds"]
    )
    assert found["floor_seconds"] > 0


async def test_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "TOLD_BEFORE_PAUSE", 1)
    found = await reconcile.pause(3, 1)
    assert found["told_before_pause"] == 1
    assert found["told_after_heard"] <= found["told_after_pause"] <= 2


async def test_the_server_keeps_managers_apart_and_fences() -> None:
    server = Server()
    fleet.Fleet(server, 1, 1)
    before = server.objects["NodeWeights"]["node-00000"]
    name = {"name": "node-00000", "resourceVersion": before["metadata"]["resourceVersion"]}
    other = {"metadata": name, "spec": {"rollouts": [{"uid": "other", "stage": [], "pods": []}]}}
    after = await server.apply(NODE_WEIGHTS, other, manager="other")
    assert [entry["uid"] for entry in after["spec"]["rollouts"]] == [fleet.ROLLOUT_UID, "other"]
    assert after["metadata"]["generation"] == before["metadata"]["generation"] + 1
    with pytest.raises(Conflict):
        await server.apply(NODE_WEIGHTS, other, manager="other")
    gone = {"metadata": {"name": "node-00000"}, "spec": {"rollouts": []}}
    assert (await server.apply(NODE_WEIGHTS, gone, manager="other"))["spec"] == before["spec"]
