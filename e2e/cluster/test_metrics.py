"""A real Prometheus scrapes the operator and the agents, and every query of the dashboard is
answered.
"""

from __future__ import annotations

from pathlib import Path

from e2e.harness import samples
from e2e.harness.environment import SAMPLES, SYSTEM, Environment
from e2e.harness.kubectl import Kubectl
from e2e.harness.prometheus import panels, prometheus
from e2e.harness.reach import reach

DASHBOARD = Path(__file__).parents[2] / "dashboards" / "hotweights.json"


def test_the_dashboard_shows_a_rollout(environment: Environment, tmp_path: Path) -> None:
    environment.in_samples.apply(SAMPLES / "weightrollout.yaml")
    samples.until_ready(environment)
    kubectl = Kubectl(environment.kubectl.binary, environment.kubectl.kubeconfig, SYSTEM)
    ours = kubectl.pods("app.kubernetes.io/component in (operator,agent)")
    assert len(ours) == 3, "an operator and two agents"
    with reach(environment, ours, 8080) as addresses, prometheus(tmp_path, addresses) as server:
        server.until_scraped(len(addresses))
        asked = panels(DASHBOARD, "Rollouts (Kubernetes)") + panels(
            DASHBOARD, "Hosts (agents and workers)"
        )
        assert not server.unanswered(asked)
