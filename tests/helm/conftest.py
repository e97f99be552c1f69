"""Real helm, real kubectl and a real API server with the chart installed: what a cluster would
say.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from localcluster import binaries
from localcluster.controlplane import ControlPlane

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "hotweights"
NAMESPACE = "hotweights-system"
SOURCE: dict[str, object] = {
    "name": "models",
    "path": "/models",
    "hostPath": "/srv/models",
    "namespaces": ["hotweights-samples"],
}

Body = dict[str, Any]

PATIENCE_SECONDS = 120.0
WITHOUT_KUBELETS = ["--controllers=-node-lifecycle-controller"]
"""For the controller manager where nodes have none: after a minute it would take them for dead,
have their pods not Ready, and evict them.
"""


class Refused(Exception):
    """A command failed; the message is what it printed."""


def command(words: Sequence[str | Path], text: str = "") -> str:
    """What the command prints."""
    done = subprocess.run(
        words, input=text, capture_output=True, text=True, timeout=150, check=False
    )
    if done.returncode:
        raise Refused(done.stderr)
    return done.stdout


class Helm:
    """helm, with values as Python data."""

    def __init__(self, program: Path) -> None:
        self._program = program

    def template(self, values: Mapping[str, object] | None = None, *options: str) -> list[Body]:
        """The rendered objects."""
        words: list[str | Path] = [
            self._program,
            "template",
            "hotweights",
            CHART,
            "-n",
            NAMESPACE,
            *options,
            "--values=-",
        ]
        return [
            body for body in yaml.safe_load_all(command(words, json.dumps(values or {}))) if body
        ]

    def lint(self) -> str:
        """Complains by raising."""
        return command([self._program, "lint", "--strict", CHART])

    def notes(self, values: Mapping[str, object]) -> str:
        """What an installation would tell."""
        words: list[str | Path] = [
            self._program,
            "install",
            "hotweights",
            CHART,
            "-n",
            NAMESPACE,
            "--dry-run=client",
        ]
        return command([*words, "--values=-"], json.dumps(values)).partition("NOTES:")[2]

    def install(
        self,
        kubeconfig: Path,
        values: Mapping[str, object],
        *options: str,
        release: str = "hotweights",
        namespace: str = NAMESPACE,
        chart: Path = CHART,
    ) -> str:
        """Install or upgrade; gives back the notes."""
        words: list[str | Path] = [self._program, "upgrade", "--install", release, chart]
        words += ["-n", namespace, "--create-namespace", *options]
        return command([*words, f"--kubeconfig={kubeconfig}", "--values=-"], json.dumps(values))

    def uninstall(self, kubeconfig: Path, release: str = "hotweights") -> str:
        """Gives back what it says it left."""
        words: list[str | Path] = [self._program, "uninstall", release, "-n", NAMESPACE]
        return command([*words, "--wait", "--timeout=120s", f"--kubeconfig={kubeconfig}"])


class Kubectl:
    """kubectl, as one identity."""

    def __init__(self, program: Path, kubeconfig: Path) -> None:
        self._program = program
        self._kubeconfig = kubeconfig

    def __call__(self, *words: str | Path, text: str = "") -> str:
        """What it prints; `Refused` with what it complains about."""
        return command([self._program, f"--kubeconfig={self._kubeconfig}", *words], text)

    def create(self, body: Body, *options: str) -> Body:
        """Create, and give back what the API server made of it."""
        answer: Body = json.loads(
            self("create", "-o", "json", "-f", "-", *options, text=json.dumps(body))
        )
        return answer

    def dry_run(self, body: Body) -> Body:
        """What the API server would make of it."""
        return self.create(body, "--dry-run=server")

    def get(self, *words: str) -> Body:
        """One object."""
        answer: Body = json.loads(self("get", *words, "-o", "json"))
        return answer

    def patch_status(self, kind: str, name: str, patch: Body, *options: str) -> str:
        """A merge patch of the status subresource."""
        return self(
            "patch",
            kind,
            name,
            "--subresource=status",
            "--type=merge",
            "-p",
            json.dumps(patch),
            *options,
        )


@pytest.fixture(scope="session")
def helm() -> Helm:
    return Helm(binaries.ensure(["helm"])["helm"])


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    with ControlPlane(controller_manager_arguments=WITHOUT_KUBELETS) as plane:
        yield plane


@pytest.fixture(scope="session")
def kubectl(control_plane: ControlPlane, helm: Helm) -> Kubectl:
    """The admin's, in a cluster with the chart."""
    admin = Kubectl(binaries.ensure(["kubectl"])["kubectl"], control_plane.kubeconfig)
    helm.install(control_plane.kubeconfig, {"sources": [SOURCE]})
    wait_for_definitions(admin)
    admin("apply", "-f", ROOT / "config" / "samples" / "namespace.yaml")
    wait_for_policies(admin)
    return admin


def until(holds: Callable[[], bool], what: str) -> None:
    """Ask until it is so."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        if time.monotonic() > end:
            raise AssertionError(f"not within {PATIENCE_SECONDS:.0f} s: {what}")


def wait_for_definitions(kubectl: Kubectl) -> None:
    """Until our kinds are served: discovery learns of them after they are Established."""
    kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=90s")

    def served() -> bool:
        try:
            kubectl("get", "weightversions,weightrollouts,nodeweights", "--all-namespaces")
        except Refused:
            return False
        return True

    until(served, "our kinds are served")


def wait_for_policies(kubectl: Kubectl) -> None:
    """The API server takes a moment to notice new policies, those of each kind in their own time:
    injection works, a bad pod is refused, and so is an agent that writes what it must not.
    """
    wait_for_injection(kubectl)
    bad = opted_in("probe", {"name": "a", "image": "a"}, {"name": "b", "image": "b"})
    wait_for_refusal(kubectl, bad, "hotweights.dev/container")
    plain = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "probe"}}
    plain["spec"] = bad["spec"]
    agent = f"--as=system:serviceaccount:{NAMESPACE}:hotweights-agent"
    # with rights to everything: the policy alone can refuse
    wait_for_refusal(kubectl, plain, "an agent writes", agent, "--as-group=system:masters")


def wait_for_injection(kubectl: Kubectl) -> None:
    """Until a pod with the label is injected; while only the check is noticed, it is refused."""

    def injected() -> bool:
        try:
            made = kubectl.dry_run(opted_in("probe", {"name": "a", "image": "a"}))
        except Refused as refusal:
            if "nothing injected what Hotweights needs" in str(refusal):
                return False
            raise
        return "readinessGates" in made["spec"]

    until(injected, "a pod is injected")


def wait_for_refusal(kubectl: Kubectl, body: Body, complaint: str, *options: str) -> None:
    """Until the object is refused with that complaint."""

    def refused() -> bool:
        try:
            kubectl.create(body, "--dry-run=server", *options)
        except Refused as refusal:
            if complaint in str(refusal):
                return True
            raise
        return False

    until(refused, f"a policy that says {complaint!r} is noticed")


def opted_in(
    name: str, *containers: Body, annotations: dict[str, str] | None = None, **spec: Any
) -> Body:
    """A pod with the label."""
    metadata = {"name": name, "namespace": "default", "labels": {"hotweights.dev/inject": "true"}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**metadata, "annotations": annotations or {}},
        "spec": {"containers": list(containers), **spec},
    }
