"""What an installation leaves when it goes, and what the next one finds; on an API server of its
own. That pods serve on meanwhile: `e2e/cluster/test_pods.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from localcluster import binaries
from localcluster.controlplane import ControlPlane
from tests.helm.conftest import (
    CHART,
    NAMESPACE,
    SOURCE,
    Body,
    Helm,
    Kubectl,
    Refused,
    opted_in,
    until,
    wait_for_definitions,
    wait_for_policies,
)

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(600, func_only=True)]

VALUES = {"sources": [SOURCE]}
GATE = {"type": "hotweights.dev/weights", "status": "True", "reason": "Serving"}
VERSION: Body = {
    "apiVersion": "hotweights.dev/v1alpha1",
    "kind": "WeightVersion",
    "metadata": {"name": "v1", "namespace": "default"},
    "spec": {"model": "m", "version": "v1", "source": {"uri": "file:///models/v1"}},
}
ROLLOUT: Body = {
    "apiVersion": "hotweights.dev/v1alpha1",
    "kind": "WeightRollout",
    "metadata": {"name": "llm", "namespace": "default"},
    "spec": {"versionRef": {"name": "v1"}, "target": {"selector": {"matchLabels": {"a": "b"}}}},
}
NODE: Body = {
    "apiVersion": "hotweights.dev/v1alpha1",
    "kind": "NodeWeights",
    "metadata": {"name": "n0", "namespace": NAMESPACE},
    "spec": {"nodeName": "n0"},
}


@pytest.fixture(scope="module")
def plane() -> Iterator[ControlPlane]:
    with ControlPlane() as made:
        yield made


@pytest.fixture
def admin(plane: ControlPlane) -> Kubectl:
    return Kubectl(binaries.ensure(["kubectl"])["kubectl"], plane.kubeconfig)


@pytest.fixture
def installed(plane: ControlPlane, admin: Kubectl, helm: Helm) -> Iterator[Kubectl]:
    """With the chart, and nothing of it afterwards."""
    helm.install(plane.kubeconfig, VALUES)
    wait_for_definitions(admin)
    yield admin
    if "hotweights" in admin("get", "secrets", "-n", NAMESPACE):
        helm.uninstall(plane.kubeconfig)
    admin("delete", "crd", "--ignore-not-found", *definitions(admin))


def definitions(kubectl: Kubectl) -> list[str]:
    found = kubectl("get", "crd", "-o", "name").split()
    return [name.partition("/")[2] for name in found if name.endswith(".hotweights.dev")]


def eventually(admin: Kubectl, pod: Body, holds: Callable[[Body], bool]) -> Body:
    """What the API server makes of the pod, once it is taken and that holds: it notices late which
    policies came and went, those that refuse and those that change at different moments.
    """
    made: list[Body] = []

    def held() -> bool:
        try:
            made.append(admin.dry_run(pod))
        except Refused:
            return False
        return holds(made[-1])

    until(held, "the API server makes of the pod what it is to")
    return made[-1]


def test_what_users_wrote_and_what_pods_show_outlives_an_installation(
    installed: Kubectl, plane: ControlPlane, helm: Helm
) -> None:
    wait_for_policies(installed)
    for body in (VERSION, ROLLOUT, NODE):
        installed.create(body)
    installed.patch_status("weightrollout", "llm", {"status": {"revision": 3}})
    engine = {"name": "vllm", "image": "vllm"}
    pod = opted_in("serving", engine)
    pod["metadata"]["labels"]["hotweights.dev/version"] = "v1"
    installed.create(pod)
    installed.patch_status("pod", "serving", {"status": {"conditions": [GATE]}})
    before = installed.get("pod", "serving")

    left = helm.uninstall(plane.kubeconfig)

    assert "weightrollouts.hotweights.dev" in left, "helm says what it keeps"
    after = installed.get("pod", "serving")
    assert after == before, "nobody touches a pod that serves"
    assert "deletionTimestamp" not in installed.get("weightversion", "v1")["metadata"]
    assert installed.get("weightrollout", "llm")["status"]["revision"] == 3
    assert installed.get("nodeweights", "n0", "-n", NAMESPACE)["spec"] == NODE["spec"]
    policies = "mutatingadmissionpolicies,validatingadmissionpolicies,clusterroles"
    names = installed("get", policies, "-o", "name", "-l", "app.kubernetes.io/name=hotweights")
    assert names == ""
    plain = eventually(
        installed, opted_in("new", engine), lambda made: "readinessGates" not in made["spec"]
    )
    assert "env" not in plain["spec"]["containers"][0], "an ordinary pod, and not refused"

    helm.install(plane.kubeconfig, VALUES)
    assert installed.get("weightrollout", "llm")["status"]["revision"] == 3
    assert installed.get("pod", "serving") == before
    eventually(installed, opted_in("new", engine), lambda made: "readinessGates" in made["spec"])
    installed("delete", "pod", "serving", "--wait=false")


def test_definitions_that_were_kept_are_taken_over_only_when_asked_to(
    installed: Kubectl, plane: ControlPlane, helm: Helm
) -> None:
    installed.create(VERSION)
    helm.uninstall(plane.kubeconfig)
    with pytest.raises(Refused, match="cannot be imported into the current release"):
        helm.install(plane.kubeconfig, VALUES, release="other", namespace="elsewhere")
    helm.install(
        plane.kubeconfig, VALUES, "--take-ownership", release="other", namespace="elsewhere"
    )
    annotations = installed.get("crd", "weightversions.hotweights.dev")["metadata"]["annotations"]
    assert annotations["meta.helm.sh/release-namespace"] == "elsewhere"
    assert installed.get("weightversion", "v1")["spec"]["version"] == "v1"
    installed("delete", "namespace", "elsewhere", "--wait=false")
    installed(
        "delete", "clusterroles,clusterrolebindings,mutatingadmissionpolicies,"
        "mutatingadmissionpolicybindings,validatingadmissionpolicies,validatingadmissionpolicybindings",
        "-l", "app.kubernetes.io/instance=other",
    )  # fmt: skip


def test_an_upgrade_brings_the_definitions_up_to_date(
    installed: Kubectl, plane: ControlPlane, helm: Helm, tmp_path: Path
) -> None:
    """What helm does not do with the folder crds/ of a chart. What is stored stays as it is."""
    older = tmp_path / "hotweights"
    shutil.copytree(CHART, older)
    file = older / "templates" / "crds" / "weightrollouts.yaml"
    lines = file.read_text().splitlines(keepends=True)
    begin = next(i for i, line in enumerate(lines) if line.strip() == "minReadySeconds:")
    indent = lines[begin].index("m")
    end = next(
        i
        for i, line in enumerate(lines[begin + 1 :], begin + 1)
        if len(line) - len(line.lstrip()) <= indent
    )
    file.write_text("".join(lines[:begin] + lines[end:]))
    helm.install(plane.kubeconfig, VALUES, chart=older)

    def knows() -> bool:
        schema = installed.get("crd", "weightrollouts.hotweights.dev")["spec"]["versions"][0]
        spec = schema["schema"]["openAPIV3Schema"]["properties"]["spec"]
        return "minReadySeconds" in spec["properties"]

    assert not knows()
    installed.create(ROLLOUT)
    helm.install(plane.kubeconfig, VALUES)
    assert knows()
    assert installed.get("weightrollout", "llm")["spec"]["versionRef"] == {"name": "v1"}
