"""One control plane with Argo CD beside it for all of these tests; operator, nodes and pods are
those of ``tests/operator``: the operator is real, kubelets and agents are a few lines.
"""

from __future__ import annotations

import pytest

from e2e.gitops.argocd import ArgoCD
from localcluster.controlplane import ControlPlane
from tests.operator.conftest import Kubectl, api, control_plane, kubectl, scene

__all__ = ["api", "argocd", "control_plane", "kubectl", "scene"]


@pytest.fixture(scope="session")
def argocd(control_plane: ControlPlane, kubectl: Kubectl) -> ArgoCD:
    """The real one. It ends with the control plane, in whose folder its logs are."""
    running = ArgoCD(control_plane, kubectl)
    running.start()
    return running
