"""What Prometheus is told of the ends of rollouts, and when /healthz and /readyz say no."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from hotweights_crds.weightrollout import WeightRolloutSpec, WeightRolloutStatus
from hotweights_crds.weightversion import WeightVersionSpec, WeightVersionStatus
from hotweights_operator.decide import revision
from hotweights_operator.metrics import LoopHealth, Metrics, health, readiness, serve
from hotweights_operator.model.objects import Rollout, Version
from hotweights_operator.runtime.cache import Cache
from tests.operator.worlds import rollout
from tests.ports import free_ports

BEGAN = datetime(2026, 1, 1, 12, tzinfo=UTC)
LATER = BEGAN + timedelta(seconds=40)


def version(name: str) -> Version:
    spec = WeightVersionSpec.from_dict(
        {"model": "m", "version": name, "source": {"uri": f"file:///{name}"}}
    )
    status = WeightVersionStatus(digest=f"sha256:{name}")
    return Version(f"uid-{name}", name, "models", 1, "1", spec, status)


def revised(status: WeightRolloutStatus, name: str, now: datetime) -> WeightRolloutStatus:
    """The status when the rollout is to go on to this version."""
    spec = WeightRolloutSpec.from_dict(
        {"versionRef": {"name": name}, "target": {"selector": {"matchLabels": {"app": "llm"}}}}
    )
    return revision.revised(
        Rollout("u", "r", "models", 1, "1", "", spec, status), version(name), now
    )


def begun() -> WeightRolloutStatus:
    """A revision that began."""
    return revised(WeightRolloutStatus(), "v1", BEGAN)


def test_a_revision_ends_once() -> None:
    done = revision.completed(begun(), LATER)
    assert revision.ended(begun(), done, LATER) == [("Complete", 40.0)]
    again = revision.completed(done, LATER)
    assert revision.ended(done, again, LATER) == []
    assert revision.ended(done, revised(done, "v2", LATER), LATER) == []


def test_a_newer_version_supersedes() -> None:
    assert revision.ended(begun(), revised(begun(), "v2", LATER), LATER) == [("Superseded", 40.0)]


def test_an_abort_counts_when_it_happens_and_not_when_it_is_followed() -> None:
    aborted = begun().model_copy(update={"aborted_revision": 1})
    assert revision.ended(begun(), aborted, LATER) == [("Aborted", 40.0)]
    followed = revised(aborted, "v2", LATER + timedelta(hours=1))
    assert followed.history[0].outcome == "Aborted"
    assert revision.ended(aborted, followed, LATER + timedelta(hours=1)) == []


def test_the_ends_are_told_by_outcome() -> None:
    metrics = Metrics(Cache(), lambda: LoopHealth(0.0, 0, 0.0, True))
    metrics.ended("Complete", 4.0)
    metrics.ended("Aborted", 400.0)
    text = metrics.text().decode()
    assert 'hotweights_rollout_duration_seconds_bucket{le="5.0",outcome="Complete"} 1.0' in text
    assert 'hotweights_rollout_duration_seconds_bucket{le="180.0",outcome="Aborted"} 0.0' in text
    assert 'hotweights_rollout_duration_seconds_sum{outcome="Aborted"} 400.0' in text


def test_a_rollouts_status_is_told_figure_by_figure() -> None:
    at = {"lastTransitionTime": "2026-01-01T12:00:00Z"}
    status = {
        "phase": "Activating",
        "target": {"version": "v2"},
        "previous": {"version": "v1"},
        "pods": {"desired": 7, "updated": 5, "prepared": 6, "failed": 1},
        "nodes": {"desired": 4, "staged": 3},
        "nbytes": {"total": 900, "done": 600},
        "conditions": [
            {**at, "type": "Ready", "status": "False", "reason": "Activating"},
            {**at, "type": "Staged", "status": "True", "reason": "Staged"},
        ],
        "failures": [{"podUID": "u", "pod": "p", "reason": "LoadFailed"}],
    }
    cache = Cache()
    cache.put("rollout", "models/llm", 1, rollout(status))
    text = Metrics(cache, lambda: WELL).text().decode()
    of = 'name="llm",namespace="models"'
    for line in (
        f'hotweights_rollout_pods{{{of},state="desired"}} 7.0',
        f'hotweights_rollout_pods{{{of},state="updated"}} 5.0',
        f'hotweights_rollout_pods{{{of},state="failed"}} 1.0',
        f'hotweights_rollout_nodes{{{of},state="staged"}} 3.0',
        f'hotweights_rollout_bytes{{{of},state="done"}} 600.0',
        f'hotweights_rollout_condition{{{of},reason="Activating",type="Ready"}} 0.0',
        f'hotweights_rollout_condition{{{of},reason="Staged",type="Staged"}} 1.0',
        f'hotweights_rollout_failures{{{of},reason="LoadFailed"}} 1.0',
        f'hotweights_rollout_info{{{of},phase="Activating",previous="v1",version="v2"}} 1.0',
    ):
        assert line in text


WELL = LoopHealth(
    1.0, 3, 0.5, True, ages={"rollout": 10.0, "pod": 40.0}, malformed={"rollout": 0, "state": 0}
)


@pytest.mark.parametrize(
    ("change", "alive", "ready"),
    [
        pytest.param({}, 200, 200, id="all is well"),
        pytest.param({"queue_oldest_seconds": 121.0}, 503, 200, id="a decision waits"),
        pytest.param({"synced": False, "unlisted": ["pod"]}, 200, 503, id="not listed yet"),
        pytest.param({"ages": {"rollout": 10.0, "pod": 151.0}}, 200, 503, id="deaf for pods"),
        pytest.param(
            {"malformed": {"rollout": 2, "state": 0}},
            200,
            200,
            id="what cannot be read is no fault of ours",
        ),
    ],
)
def test_a_restart_is_asked_for_only_where_it_helps(
    change: dict[str, Any], alive: int, ready: int
) -> None:
    pulse = dataclasses.replace(WELL, **change)
    assert health(pulse, 120.0)[0] == alive
    assert readiness(pulse, 150.0, LATER)[0] == ready


def test_readiness_names_what_is_missing_and_since_when() -> None:
    pulse = dataclasses.replace(
        WELL, synced=False, unlisted=["state"], ages={"rollout": 1.0, "pod": 160.0}
    )
    _, body = readiness(pulse, 150.0, datetime(2026, 1, 1, 12, 10, tzinfo=UTC))
    assert body == {
        "ready": False,
        "unlisted": ["state"],
        "stale": {"pod": "2026-01-01T12:07:20+00:00"},
    }


def test_what_cannot_be_read_is_counted() -> None:
    pulse = dataclasses.replace(WELL, malformed={"rollout": 2, "state": 0})
    assert health(pulse, 120.0)[1]["malformedObjects"] == {"rollout": 2}
    text = Metrics(Cache(), lambda: pulse).text().decode()
    assert 'hotweights_operator_malformed_objects{kind="rollout"} 2.0' in text
    assert 'hotweights_operator_malformed_objects{kind="state"} 0.0' in text
    assert 'hotweights_operator_watch_age_seconds{kind="pod"} 40.0' in text


async def test_both_ports_answer() -> None:
    ports = free_ports(2)
    told = {
        "metrics_port": ports[0],
        "health_port": ports[1],
        "stuck_seconds": 120.0,
        "stale_seconds": 30.0,
    }
    runners = await serve(Metrics(Cache(), lambda: WELL), lambda: WELL, **told)  # type: ignore[arg-type]

    def ask(port: int, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    for port in ports:
        assert (await asyncio.to_thread(ask, port, "/healthz"))[0] == 200
        code, text = await asyncio.to_thread(ask, port, "/readyz")
        assert (code, list(json.loads(text)["stale"])) == (503, ["pod"])
        assert (
            b"hotweights_operator_watch_age_seconds"
            in (await asyncio.to_thread(ask, port, "/metrics"))[1]
        )
    for runner in runners:
        await runner.cleanup()
