"""The Prometheus operator as a process beside a control plane, and what it makes of a Prometheus: a
configuration and rule files, as the pod that does not run here would find them.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from localcluster import binaries
from localcluster.controlplane import ControlPlane
from localcluster.credentials import ADMIN
from tests.operator.conftest import Kubectl, Refused
from tests.ports import free_ports

NAME, NAMESPACE = "test", "monitoring"
PATIENCE_SECONDS = 240.0
_PROCESS = "prometheus-operator"
_KINDS = ("prometheuses", "podmonitors", "servicemonitors", "probes", "prometheusrules")
_RULES = f"prometheus-{NAME}-rulefiles-0"
_MOUNTED = f"/etc/prometheus/rules/{_RULES}"
Body = dict[str, Any]


class PrometheusOperator:
    """One that follows a control plane."""

    def __init__(self, plane: ControlPlane, kubectl: Kubectl) -> None:
        self._plane, self._kubectl = plane, kubectl
        self._port = free_ports()[0]

    def start(self) -> None:
        """Its definitions, its process, and a Prometheus that selects everything."""
        folder = binaries.source_of(_PROCESS) / "example" / "prometheus-operator-crd"
        for kind in _KINDS:  # created: they are too large for an annotation, and slow to merge
            self._kubectl("create", f"--filename={folder / f'monitoring.coreos.com_{kind}.yaml'}")
        names = [f"crd/{kind}.monitoring.coreos.com" for kind in _KINDS]
        self._kubectl("wait", "--for=condition=Established", *names, "--timeout=90s")
        program = binaries.ensure([_PROCESS])[_PROCESS]
        self._plane.daemons.start(
            _PROCESS,
            [program, f"--web.listen-address=127.0.0.1:{self._port}"],
            environment={"KUBECONFIG": str(self._plane.kubeconfig)},
        )
        self._kubectl("create", "namespace", NAMESPACE)
        self._kubectl("apply", "-f", "-", text=yaml.safe_dump_all(self._prometheus()))

    def _prometheus(self) -> list[Body]:
        token = {"token": self._plane.credentials.token(ADMIN)}
        every: Body = {}
        spec = {
            "version": "v2.42.0",
            "replicas": 1,
            "podMonitorSelector": every,
            "podMonitorNamespaceSelector": every,
            "serviceMonitorSelector": every,
            "serviceMonitorNamespaceSelector": every,
            "ruleSelector": every,
            "ruleNamespaceSelector": every,
            # where the Prometheus of this test looks for pods: it runs outside
            "apiserverConfig": {
                "host": self._plane.url,
                "authorization": {"credentials": {"name": "apiserver", "key": "token"}},
                "tlsConfig": {"caFile": str(self._plane.credentials.authority)},
            },
        }
        metadata = {"name": NAME, "namespace": NAMESPACE}
        return [
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "apiserver", "namespace": NAMESPACE},
                "stringData": token,
            },
            {
                "apiVersion": "monitoring.coreos.com/v1",
                "kind": "Prometheus",
                "metadata": metadata,
                "spec": spec,
            },
        ]

    def configuration(self, folder: Path, holds: Callable[[str], bool]) -> Path:
        """The configuration that it makes as soon as that holds of it, with its rule files, in a
        folder of this machine.
        """
        found: list[str] = []

        def made() -> bool:
            found[:] = [self._configured()]
            return holds(found[0]) and bool(self._rules())

        self._plane.daemons.wait_until(
            made,
            "The Prometheus operator has made a configuration",
            needs=[_PROCESS],
            timeout_seconds=PATIENCE_SECONDS,
        )
        rules = folder / "rules"
        rules.mkdir()
        for name, text in self._rules().items():
            (rules / name).write_text(text)
        path = folder / "prometheus.yaml"
        path.write_text(found[0].replace(_MOUNTED, str(rules)))
        return path

    def _configured(self) -> str:
        data = self._data("secret", f"prometheus-{NAME}")
        packed = data.get("prometheus.yaml.gz", "")
        return gzip.decompress(base64.b64decode(packed)).decode() if packed else ""

    def _rules(self) -> dict[str, str]:
        return self._data("configmap", _RULES)

    def _data(self, kind: str, name: str) -> dict[str, str]:
        try:
            body = json.loads(self._kubectl("get", kind, name, "-n", NAMESPACE, "-o", "json"))
        except Refused:  # not yet
            return {}
        found: dict[str, str] = body.get("data") or {}
        return found
