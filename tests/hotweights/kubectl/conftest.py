"""The plugin as a user calls it, and a real API server that it talks to."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hotweights.kubectl import __main__
from localcluster import binaries
from localcluster.controlplane import ControlPlane
from tests.hotweights.command_line import Done

ROOT = Path(__file__).parents[3]
NAMESPACE = "models"
Body = dict[str, Any]


class Refused(Exception):
    """kubectl failed; the message is what it printed."""


class Kubectl:
    """kubectl as the admin."""

    def __init__(self, kubeconfig: Path) -> None:
        self.program = binaries.ensure(["kubectl"])["kubectl"]
        self.kubeconfig = kubeconfig

    def __call__(self, *words: str | Path, text: str = "") -> str:
        """What it prints. Raises `Refused`."""
        done = subprocess.run(
            [self.program, f"--kubeconfig={self.kubeconfig}", *words],
            input=text, capture_output=True, text=True, timeout=150, check=False,
        )  # fmt: skip
        if done.returncode:
            raise Refused(done.stderr)
        return done.stdout

    def put(self, body: Body) -> None:
        """An object with its status, which an API server takes in two writes."""
        plain = {key: value for key, value in body.items() if key != "status"}
        metadata = {
            key: value
            for key, value in body["metadata"].items()
            if key in ("name", "namespace", "labels", "annotations")
        }
        self("apply", "--server-side", "--force-conflicts", "-f", "-",
             text=json.dumps({**plain, "metadata": metadata}))  # fmt: skip
        if "status" in body:
            self.tell(body["kind"], metadata["name"], body["status"], metadata.get("namespace", ""))

    def tell(self, kind: str, name: str, status: Body, namespace: str = NAMESPACE) -> None:
        """Another status, as the operator, an agent or a kubelet writes it."""
        where = ["-n", namespace] if namespace else []
        self("patch", kind, name, *where, "--subresource=status", "--type=merge", "-p",
             json.dumps({"status": status}))  # fmt: skip

    def get(self, kind: str, name: str, namespace: str = NAMESPACE) -> Body:
        """An object as it is."""
        found: Body = json.loads(self("get", kind, name, "-n", namespace, "-o", "json"))
        return found


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    # nothing is controlled: objects are made here, and stay as they were made
    with ControlPlane(controller_manager=False) as plane:
        yield plane


@pytest.fixture(scope="session")
def kubectl(control_plane: ControlPlane) -> Kubectl:
    """With our definitions, and a namespace."""
    admin = Kubectl(control_plane.kubeconfig)
    admin(
        "apply", "--server-side", *(f"-f{path}" for path in sorted((ROOT / "crds").glob("*.yaml")))
    )
    admin("wait", "--for=condition=Established", "crd", "--all", "--timeout=90s")
    for name in (NAMESPACE, "hotweights-system"):
        admin("create", "namespace", name)
    end = time.monotonic() + 60
    while True:
        try:
            admin("get", "weightversions,weightrollouts,nodeweights", "--all-namespaces")
        except Refused:
            if time.monotonic() > end:
                raise
        else:
            return admin


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the plugin in this process."""
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["kubectl-hotweights", *map(str, arguments)])
        code = 0
        try:
            __main__.main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 0
        return Done(int(code), *capfd.readouterr())

    return call
