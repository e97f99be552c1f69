"""The operator's process measures a canary by a real Prometheus: it goes on, goes back, and does not
forget what it had measured when it is killed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from e2e.harness.prometheus import Prometheus, prometheus
from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_kube import EVENTS
from hotweights_kube.client import Selection
from tests.operator.conftest import eventually

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(600, func_only=True)]


class Exporter:
    """Says what share of a version's requests failed."""

    def __init__(self) -> None:
        self.errors = {"v0": 0.0, "v1": 0.0}
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                page = "".join(
                    f'error_share{{hotweights_dev_version="{version}"}} {share}\n'
                    for version, share in exporter.errors.items()
                )
                # a Prometheus that is stopped waits for no answer
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(page.encode())

            def log_message(self, format: str, *arguments: object) -> None:
                """Nobody reads it."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture(scope="module")
def exporter() -> Iterator[Exporter]:
    made = Exporter()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def scraped(exporter: Exporter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    with prometheus(folder, [f"127.0.0.1:{exporter.server.server_port}"]) as found:
        assert found.unanswered([("shares", "error_share")]) == []
        yield found


def template(scene: Any, scraped: Prometheus, **fields: Any) -> dict[str, Any]:
    metric = {
        "name": "errors",
        "prometheus": {
            "address": scraped.url,
            "query": 'error_share{hotweights_dev_version="{{canary-version}}"}',
        },
        "successCondition": "result < {{args.limit}}",
        "intervalSeconds": 1,
        **fields,
    }
    return {
        "apiVersion": "hotweights.dev/v1alpha1",
        "kind": "WeightAnalysisTemplate",
        "metadata": {"name": "errors", "namespace": scene.namespace},
        "spec": {"args": {"limit": "0.05"}, "metrics": [metric]},
    }


async def begin(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pods that serve v0, all of it complete."""
    # this host's own addresses are what an operator may not ask
    monkeypatch.setenv("HOTWEIGHTS_REFUSED_NETWORKS", "169.254.0.0/16")
    await scene.set_up(2)
    scene.start_operator()
    for index in range(3):
        await scene.engine_pod(index, index % 2)
    await scene.version("v0")
    await scene.version("v1")
    scene.kubectl.apply(scene.rollout("v0"))
    await scene.reaches("Ready")


def canary(scene: Any, version: str = "v1", **analysis: Any) -> dict[str, Any]:
    steps = [{"setReplicas": 1}, {"analysis": analysis or {"templateName": "errors"}}]
    body: dict[str, Any] = scene.rollout(
        version,
        strategy={"type": "AllAtOnce", "canary": {"steps": steps}},
        failurePolicy={"action": "Rollback"},
    )
    return body


async def until(scene: Any, what: str, holds: Any) -> WeightRolloutStatus:
    found: list[WeightRolloutStatus] = []

    async def it_is_so() -> bool:
        found[:] = [await scene.status()]
        return bool(holds(found[0]))

    await eventually(it_is_so, what, 150, lambda: f"{found}\n{scene.log()}")
    return found[0]


async def test_a_good_canary_goes_on_by_itself(
    scene: Any, scraped: Prometheus, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter.errors["v1"] = 0.01
    await scraped_as(scraped, 0.01)
    await begin(scene, monkeypatch)
    # what a step names may come later, as where a tool applies files in any order
    scene.kubectl.apply(canary(scene))
    waiting = await until(scene, "it waits", lambda s: s.analysis.phase == "Waiting")
    assert "WeightAnalysisTemplate errors does not exist" in waiting.message
    assert waiting.pods.updated == 1
    scene.kubectl.apply(template(scene, scraped, count=3))
    status = await scene.reaches("Ready")
    assert (status.pods.updated, status.analysis.phase) == (3, "Successful")
    (metric,) = status.analysis.metrics
    assert [(m.number, m.value) for m in metric.measurements] == [
        (3, "0.01"),
        (2, "0.01"),
        (1, "0.01"),
    ]


async def test_a_bad_canary_is_led_back_and_says_which_value_decided(
    scene: Any, scraped: Prometheus, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter.errors["v1"] = 0.07
    await scraped_as(scraped, 0.07)
    await begin(scene, monkeypatch)
    scene.kubectl.apply(template(scene, scraped))
    scene.kubectl.apply(canary(scene))
    status = await until(scene, "led back", lambda s: s.phase == "RolledBack")
    back = status.rolled_back
    assert (back.by, back.reason, back.to.version) == ("Analysis", "AnalysisFailed", "v0")
    assert "metric errors, measurement 1 (1 Failed): 0.07 does not satisfy result < 0.05" in (
        back.message
    )
    assert status.pods.updated == 3
    events = (await scene.api.list(EVENTS, Selection(scene.namespace))).items
    assert "AnalysisFailed" in {event["reason"] for event in events}


async def test_what_was_measured_outlives_the_operator(
    scene: Any, scraped: Prometheus, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter.errors["v1"] = 0.0
    await scraped_as(scraped, 0.0)
    await begin(scene, monkeypatch)
    scene.kubectl.apply(template(scene, scraped, count=12))
    scene.kubectl.apply(canary(scene))

    def two_are_there(status: WeightRolloutStatus) -> bool:
        return any(metric.successful >= 2 for metric in status.analysis.metrics)

    before = await until(scene, "two measurements", two_are_there)
    assert before.pods.updated == 1
    scene.kill_operator()
    then = (await scene.status()).analysis.metrics[0]
    scene.start_operator()
    status = await scene.reaches("Ready")
    (metric,) = status.analysis.metrics
    assert (metric.successful, metric.errors) == (12, 0)
    assert then.successful < 12
    assert status.analysis.started_at == before.analysis.started_at


async def test_a_prometheus_that_is_away_is_an_error_and_no_failure(
    scene: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await begin(scene, monkeypatch)
    metric = {
        "name": "errors",
        "prometheus": {"address": "http://127.0.0.1:1", "query": "up"},
        "successCondition": "result < 1",
        "intervalSeconds": 1,
        "consecutiveErrorLimit": 1,
    }
    scene.kubectl.apply(canary(scene, metrics=[metric]))
    status = await until(scene, "led back", lambda s: s.rolled_back.by != "")
    assert (status.rolled_back.by, status.rolled_back.reason) == ("Analysis", "AnalysisError")
    assert "127.0.0.1:1" in status.rolled_back.message


async def test_by_default_it_asks_nobody_on_its_own_host(
    scene: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await begin(scene, monkeypatch)
    scene.kill_operator()
    monkeypatch.delenv("HOTWEIGHTS_REFUSED_NETWORKS")
    scene.start_operator()
    metric = {
        "name": "own",
        "http": {"url": "http://localhost:8081/healthz"},
        "successCondition": "result == true",
        "consecutiveErrorLimit": 0,
    }
    scene.kubectl.apply(canary(scene, metrics=[metric]))
    status = await until(scene, "led back", lambda s: s.rolled_back.by != "")
    assert "where no measurement may go" in status.rolled_back.message


async def scraped_as(scraped: Prometheus, share: float) -> None:
    """Until the next scrape has seen it."""

    async def it_has() -> bool:
        found = scraped.query('error_share{hotweights_dev_version="v1"}')
        return bool(found) and float(found[0]["value"][1]) == share

    await eventually(it_has, "it is scraped")
