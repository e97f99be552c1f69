"""What the chart's monitors, alerts and dashboard become: the Prometheus operator makes a configuration
of them, a real Prometheus runs it and scrapes the real operator.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.harness.prometheus import Prometheus, configured, panels
from e2e.monitoring.prometheus_operator import PATIENCE_SECONDS, Body, PrometheusOperator
from hotweights_kube import PODS
from localcluster import binaries
from tests.operator.conftest import ROOT, Scene

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(1500, func_only=True)]
SWITCHES = ("podMonitor", "serviceMonitor", "prometheusRule", "grafanaDashboard")
OURS = ("PodMonitor", "ServiceMonitor", "PrometheusRule", "Service")
DASHBOARD = ROOT / "dashboards" / "hotweights.json"


def rendered(namespace: str) -> list[Body]:
    """The chart's objects for monitoring."""
    words = [f"--set={switch}.enabled=true" for switch in SWITCHES]
    chart = str(ROOT / "helm" / "hotweights")
    command = [str(binaries.ensure(["helm"])["helm"]), "template", "hotweights", chart]
    text = subprocess.run(
        [*command, "--namespace", namespace, *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    return [body for body in yaml.safe_load_all(text) if body and body["kind"] in OURS]


async def operator_pod(scene: Scene) -> None:
    """The pod that the operator's process would be in, by the labels and the port of the chart."""
    labels = {
        "app.kubernetes.io/name": "hotweights",
        "app.kubernetes.io/instance": "hotweights",
        "app.kubernetes.io/component": "operator",
    }
    ports = [{"name": "metrics", "containerPort": scene.health_port}]
    await scene.pod("operator", next(iter(scene.nodes)), labels, scene.system, ports=ports)
    address = {"podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]}
    await scene.api.merge_patch(
        PODS, "operator", {"status": address}, namespace=scene.system, subresource="status"
    )


def until(holds: Callable[[], Any], what: str) -> Any:
    """What it gives as soon as that is something."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not (found := holds()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {PATIENCE_SECONDS:.0f} s: {what}")
        time.sleep(0.5)
    return found


async def test_prometheus_scrapes_and_alerts_by_what_the_chart_says(
    scene: Scene, prometheus_operator: PrometheusOperator, tmp_path: Path
) -> None:
    await scene.set_up(2)
    scene.start_operator()
    for index in range(2):
        await scene.engine_pod(index, index)
    await scene.version("v0")
    await scene.version("bad")
    scene.kubectl.apply(scene.rollout("v0"))
    await scene.reaches("Ready")
    await operator_pod(scene)
    scene.kubectl("apply", "-f", "-", text=yaml.safe_dump_all(rendered(scene.system)))

    jobs = (
        f"podMonitor/{scene.system}/hotweights/0",
        f"serviceMonitor/{scene.system}/hotweights/0",
    )
    config = await asyncio.to_thread(
        prometheus_operator.configuration, tmp_path, lambda text: all(job in text for job in jobs)
    )
    for node in scene.nodes.values():
        node.refuses.add(scene.contents["file:///models/bad"])
    scene.kubectl.apply(scene.rollout("bad"))
    await scene.reaches("Stalled")
    await asyncio.to_thread(judged, scene, config)


def judged(scene: Scene, config: Path) -> None:
    """A Prometheus with this configuration sees the rollout, under its own namespace, and alerts."""
    checked = subprocess.run(
        ["promtool", "check", "config", str(config)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    with configured(config) as server:
        server.until_scraped(1)
        mine = f'{{namespace="{scene.namespace}",name="llm"}}'
        assert until(lambda: server.query(f"hotweights_rollout_info{mine}"), "it is scraped")
        assert not server.query('{exported_namespace=~".+"}'), "a label was renamed"
        assert not server.unanswered(panels(DASHBOARD, "Rollouts (Kubernetes)"))
        assert alerting(server, "HotweightsRolloutStalled", scene)
        loaded = [rule for rule in server.rules() if rule["type"] == "alerting"]
        written = yaml.safe_load(
            (ROOT / "helm" / "hotweights" / "monitoring" / "alerts.yaml").read_text()
        )
        assert {rule["name"] for rule in loaded} == {
            rule["alert"] for group in written["groups"] for rule in group["rules"]
        }
        assert {rule["health"] for rule in loaded} <= {"ok", "unknown"}
        assert not any(rule.get("lastError") for rule in loaded)


def alerting(server: Prometheus, name: str, scene: Scene) -> bool:
    """Whether the alert is on its way for this rollout; it fires after minutes."""

    def pending() -> bool:
        return any(
            alert["labels"].get("namespace") == scene.namespace
            for rule in server.rules()
            if rule["name"] == name
            for alert in rule["alerts"]
        )

    return bool(until(pending, f"{name} is pending"))
