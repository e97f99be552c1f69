"""One control plane with the Prometheus operator beside it; nodes and pods are those of
``tests/operator``, and so is the operator's process.
"""

from __future__ import annotations

import pytest

from e2e.monitoring.prometheus_operator import PrometheusOperator
from localcluster.controlplane import ControlPlane
from tests.operator.conftest import Kubectl, api, control_plane, kubectl, scene

__all__ = ["api", "control_plane", "kubectl", "prometheus_operator", "scene"]


@pytest.fixture(scope="session")
def prometheus_operator(control_plane: ControlPlane, kubectl: Kubectl) -> PrometheusOperator:
    """The real one. It ends with the control plane, in whose folder its log is."""
    running = PrometheusOperator(control_plane, kubectl)
    running.start()
    return running
