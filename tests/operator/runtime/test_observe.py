"""What is read out of the API server's bodies, where it matters: restarts, readiness, and objects
of other releases.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from hotweights_crds.nodeweights import EngineStatus
from hotweights_operator.model.objects import Node, confirmed
from hotweights_operator.runtime import observe
from hotweights_operator.runtime.cache import Cache

Body = dict[str, Any]


def pod(
    ready: str = "True",
    since: str = "",
    restarts: int = 0,
    started: str = "2026-01-01T00:00:10Z",
    **more: Body,
) -> Body:
    containers = [{"name": "vllm", "env": [{"name": "HOTWEIGHTS_SOCKET"}]}, {"name": "sidecar"}]
    statuses = [
        {"name": "vllm", "restartCount": restarts, "state": {"running": {"startedAt": started}}},
        {
            "name": "sidecar",
            "restartCount": 0,
            "state": {"running": {"startedAt": "2026-01-01T00:00:11Z"}},
        },
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
def test_a_pod_that_was_never_ready_is_told_from_one_that_is_not_ready_now(
    body: Body, was_ready: bool
) -> None:
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
            "2026-01-01T00:00:10.3+00:00",
            False,
            id="in the second of the start, which may be the life before",
        ),
        pytest.param("2026-01-01T00:00:11+00:00", True, id="after it"),
    ],
)
def test_a_confirmation_counts_only_after_the_last_start(confirmed_at: str, counts: bool) -> None:
    engine = EngineStatus(pod_uid="u", phase="Serving", digest="sha256:1")
    moment = datetime.fromisoformat(confirmed_at)
    assert confirmed(observe.pod(pod()), engine, "sha256:1", moment) is counts


@pytest.mark.parametrize(
    "phase", ["Committing", "Refused", "Failed", "Dirty", "Disconnected", "Booting"]
)
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


def two_engines(**second: Any) -> Body:
    """A pod of two engines of which the second is as said."""
    body = pod()
    body["spec"]["containers"][1]["env"] = [{"name": "HOTWEIGHTS_SOCKET"}]
    body["status"]["containerStatuses"][1].update(second)
    return body


def test_a_pod_of_two_engines_has_started_with_the_last_of_them() -> None:
    assert observe.pod(two_engines()).engine_started_at == datetime(
        2026, 1, 1, 0, 0, 11, tzinfo=UTC
    )
    assert observe.pod(two_engines(state={"waiting": {}})).engine_started_at is None
    assert observe.pod(two_engines(restartCount=4)).restarts == 4


def ended(finished: str, reason: str = "Error", seconds: int = 3) -> Body:
    """How a container ended."""
    moment = datetime.fromisoformat(finished)
    started = moment.replace(second=moment.second - seconds).isoformat()
    return {"terminated": {"startedAt": started, "finishedAt": finished, "reason": reason}}


def test_what_counts_is_how_the_last_one_ended() -> None:
    earlier, later = (
        ended("2026-01-01T00:00:05Z", "OOMKilled"),
        ended("2026-01-01T00:00:09Z", seconds=4),
    )
    known = observe.pod(two_engines(lastState=earlier, state=later))
    assert (known.oom_killed, known.last_run_seconds) == (False, 4.0)
    known = observe.pod(two_engines(lastState=ended("2026-01-01T00:00:09Z", "OOMKilled")))
    assert (known.oom_killed, known.last_run_seconds) == (True, 3.0)
    assert (observe.pod(pod()).oom_killed, observe.pod(pod()).last_run_seconds) == (False, None)


@pytest.mark.parametrize(
    ("phase", "live"),
    [("Running", True), ("Pending", True), ("Failed", False), ("Succeeded", False)],
)
def test_a_pod_that_has_ended_is_not_live(phase: str, live: bool) -> None:
    body = pod()
    body["status"]["phase"] = phase
    assert observe.pod(body).live is live


def test_the_gate_is_a_condition_of_its_own() -> None:
    body = pod()
    assert not observe.pod(body).gate
    body["status"]["conditions"].append({"type": "hotweights.dev/weights", "status": "True"})
    assert observe.pod(body).gate


METADATA = {"uid": "u", "name": "x", "namespace": "n", "resourceVersion": "7", "generation": 2}


def test_rollouts_and_versions_that_are_being_deleted_say_so_and_a_retry_is_read() -> None:
    going = {
        **METADATA,
        "deletionTimestamp": "2026-01-01T00:00:00Z",
        "annotations": {"hotweights.dev/retry": "2"},
    }
    spec = {"versionRef": {"name": "v"}, "target": {"selector": {"matchLabels": {"a": "b"}}}}
    known = observe.rollout({"metadata": going, "spec": spec})
    assert (known.terminating, known.retry, known.generation) == (True, "2", 2)
    assert not observe.rollout({"metadata": METADATA, "spec": spec}).terminating
    source: Body = {"model": "m", "version": "v", "source": {"uri": "file:///v"}}
    assert observe.version({"metadata": going, "spec": source}).terminating
    assert not observe.version({"metadata": METADATA, "spec": source}).terminating
