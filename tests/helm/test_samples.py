"""The samples are applied word for word by the demo, so the real API server takes them as they
stand.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from e2e.vllmhost import host
from tests.helm.conftest import CHART, ROOT, Kubectl

SAMPLES = ROOT / "config" / "samples"
OBJECTS = sorted(path for path in SAMPLES.glob("*.yaml") if path.name != "manual-injection.yaml")


def test_each_sample_is_described() -> None:
    readme = (SAMPLES / "README.md").read_text()
    assert [path.name for path in SAMPLES.glob("*.yaml") if f"`{path.name}`" not in readme] == []


def test_the_rollback_differs_only_in_its_version() -> None:
    forward = yaml.safe_load((SAMPLES / "weightrollout.yaml").read_text())
    back = yaml.safe_load((SAMPLES / "weightrollout-v0.yaml").read_text())
    assert (forward["spec"].pop("versionRef"), back["spec"].pop("versionRef")) == (
        {"name": "tiny-llama-v1"},
        {"name": "tiny-llama-v0"},
    )
    assert forward == back


def test_the_patch_by_hand_names_this_charts_plugin() -> None:
    patch = yaml.safe_load((SAMPLES / "manual-injection.yaml").read_text())
    (container,) = patch["spec"]["template"]["spec"]["containers"]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert values["PYTHONPATH"] == f"/run/hotweights/plugin/{version}"


@pytest.mark.apiserver
@pytest.mark.timeout(180, func_only=True)
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_the_api_server_takes_it(kubectl: Kubectl, path: Path) -> None:
    """kubectl validates strictly: an unknown or misspelt field is an error."""
    assert (
        "created" in kubectl("apply", "--dry-run=server", "-f", path)
        or path.name == "namespace.yaml"
    )


@pytest.mark.apiserver
@pytest.mark.timeout(180, func_only=True)
def test_it_looks_unfinished_until_an_operator_saw_it(kubectl: Kubectl) -> None:
    """`kubectl wait`, Helm and Argo CD must not take a rollout for done before anybody read it."""
    kubectl("apply", "-f", SAMPLES / "weightrollout.yaml")
    try:
        assert (
            kubectl.get("wroll", "tiny-llama", "-n", "hotweights-samples")["status"][
                "observedGeneration"
            ]
            == -1
        )
    finally:
        kubectl("delete", "-f", SAMPLES / "weightrollout.yaml")


def test_the_sample_has_the_image_that_the_local_cluster_stands_in_for() -> None:
    deployment, _ = yaml.safe_load_all((SAMPLES / "vllm.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == host.IMAGE
