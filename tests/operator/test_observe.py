"""What is read out of the API server's bodies, where it matters: restarts, readiness, and objects of other releases."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from hotweights_crds.nodeweights import EngineStatus
from hotweights_operator import observe
from hotweights_operator.cache import Cache
from hotweights_operator.model import Node, confirmed

Body = dict[str, Any]


def pod(
    ready: str = "True", since: str = "", restarts: int = 0, started: str = "2026-01-01T00:00:10Z", **more: Body
) -> Body:
    containers = [{"name": "vllm", "env": [{"name": "HOTWEIGHTS_SOCKET"}]}, {"name": "sidecar"}]
    statuses = [
        {"name": "vllm", "restartCount": restarts, "state": {"running": {"startedAt": started}}},
        {"name": "sidecar", "restartCount": 0, "state": {"running": {"startedAt": "2026-01-01T00:00:11Z"}}},
    ]
    return {
        "metadata": {"uid": "u", "name": "p", "namespace": "n", "labels": {"a": "b"}, **more},
        "spec": {"nodeName": "node", "containers": containers},
        "status": {
            "conditions": [{"type": "Ready", "status": ready, "lastTransitionTime": since}],
            "containerStatuses": statuses,
        },
    }


@pytest.mark.parametrize(
    ("body", "was_ready"),
    [
        pytest.param(pod("True"), True, id="ready"),
        pytest.param(pod("False", "2026-01-01T00:00:05Z"), False, id="never yet"),
        pytest.param(pod("False", "2026-01-01T00:05:00Z"), True, id="lost it while it ran"),
        pytest.param(pod("False", "2026-01-01T00:00:05Z", restarts=1), True, id="restarted"),
    ],
)
def test_a_pod_that_was_never_ready_is_told_from_one_that_is_not_ready_now(body: Body, was_ready: bool) -> None:
    assert observe.pod(body).was_ready is was_ready


def test_only_the_engine_s_container_counts_as_a_start() -> None:
    assert observe.pod(pod()).engine_started_at == datetime(2026, 1, 1, 0, 0, 10, tzinfo=UTC)


def test_a_pod_that_terminates_is_not_live() -> None:
    assert not observe.pod(pod(deletionTimestamp="2026-01-01T00:00:00Z")).live  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("confirmed_at", "counts"),
    [
        pytest.param("2026-01-01T00:00:09.9+00:00", False, id="in the life before"),
        pytest.param(
            "2026-01-01T00:00:10.3+00:00", False, id="in the second of the start, which may be the life before"
        ),
        pytest.param("2026-01-01T00:00:11+00:00", True, id="after it"),
    ],
)
def test_a_confirmation_counts_only_after_the_last_start(confirmed_at: str, counts: bool) -> None:
    engine = EngineStatus(pod_uid="u", phase="Serving", digest="sha256:1")
    moment = datetime.fromisoformat(confirmed_at)
    assert confirmed(observe.pod(pod()), engine, "sha256:1", moment) is counts


@pytest.mark.parametrize("phase", ["Committing", "Refused", "Failed", "Dirty", "Disconnected", "Booting"])
def test_an_engine_in_any_other_phase_proves_nothing(phase: Any) -> None:
    engine = EngineStatus(pod_uid="u", phase=phase, digest="sha256:1")
    assert not confirmed(observe.pod(pod()), engine, "sha256:1", datetime(2027, 1, 1, tzinfo=UTC))


def test_a_status_of_a_newer_release_is_read_and_one_that_cannot_be_names_itself() -> None:
    metadata = {"name": "n", "namespace": "s", "resourceVersion": "1", "uid": "u"}
    body: Body = {"metadata": metadata, "spec": {"somethingNew": 1}, "status": {"alsoNew": 2}}
    assert observe.node_state(body).name == "n"
    with pytest.raises(observe.Malformed, match="NodeWeights s/n does not fit this release"):
        observe.node_state({**body, "spec": {"rollouts": 3}})


def test_the_cache_never_goes_back_in_time() -> None:
    cache = Cache()
    cache.put("node", "a", 5, Node("a", "new"))
    assert not cache.put("node", "a", 4, Node("a", "old"))
    assert cache.observed().nodes["a"].uid == "new"
    cache.drop("node", "a", 7)
    assert not cache.put("node", "a", 6, Node("a", "ghost"))
    assert cache.put("node", "a", 8, Node("a", "again"))


def test_a_full_list_tells_what_vanished() -> None:
    cache = Cache()
    for name, version in (("a", 1), ("b", 2), ("new", 9)):
        cache.put("node", name, version, Node(name, name))
    assert cache.keep_only("node", ["a"], 5) == ["b"]
    assert set(cache.observed().nodes) == {"a", "new"}
