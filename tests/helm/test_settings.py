"""What the chart sets is what the programs read: variables, the config file, mounts and ports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from hotweights_agent import settings as agent_settings
from hotweights_operator import settings as operator_settings
from tests.helm.conftest import SOURCE, Body, Helm

pytestmark = pytest.mark.timeout(180, func_only=True)

FIELDS = {
    "spec.nodeName": "node-a",
    "metadata.namespace": "here",
    "metadata.name": "me",
    "status.podIP": "10.0.0.1",
}
CLAIM = {"name": "shared", "persistentVolumeClaim": "weights", "namespaces": ["*"]}


def container(objects: list[Body], kind: str) -> Body:
    keeper = "hotweights-keeper"  # the other DaemonSet
    (workload,) = (
        body for body in objects if body["kind"] == kind and body["metadata"]["name"] != keeper
    )
    (found,) = workload["spec"]["template"]["spec"]["containers"]
    result: Body = found
    return result


def environment(found: Body) -> dict[str, str]:
    """As the kubelet would fill it in."""
    values = {}
    for entry in found["env"]:
        origin = entry.get("valueFrom", {})
        field = origin.get("fieldRef", {}).get("fieldPath", "")
        values[entry["name"]] = (
            "1000" if "resourceFieldRef" in origin else entry.get("value") or FIELDS[field]
        )
    return values


def ports(found: Body) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in found["ports"]}


def test_the_agent_reads_what_the_chart_sets(helm: Helm, tmp_path: Path) -> None:
    objects = helm.template(
        {
            "sources": [SOURCE, CLAIM],
            "agent": {"logLevel": "debug", "settings": {"staging": {"at_once": 2}}},
        }
    )
    found = container(objects, "DaemonSet")
    variables = environment(found)
    known = {*agent_settings.FROM_ENVIRONMENT, agent_settings.CONFIG_VARIABLE}
    assert variables.keys() <= known, "nobody reads the others"

    config = tmp_path / "config.yaml"
    (body,) = (body for body in objects if body["kind"] == "ConfigMap")
    config.write_text(body["data"]["config.yaml"])
    read = agent_settings.read(variables, config)
    assert (read.node, read.namespace, read.address) == ("node-a", "here", "10.0.0.1")
    assert (read.memory_bytes, read.log_level, read.staging.at_once) == (1000, "debug", 2)
    assert read.roots == (
        agent_settings.RootSettings(Path("/models"), "models", "", ("hotweights-samples",)),
        agent_settings.RootSettings(Path("/pvc/weights"), "shared", "weights", ("*",)),
    )
    assert ports(found) == {"peers": read.peer_port, "metrics": read.metrics_port}
    mounts = {mount["mountPath"] for mount in found["volumeMounts"]}
    assert {
        str(path) for path in (read.run_folder, read.state_folder, read.peer_token_file.parent)
    } <= mounts
    assert variables[agent_settings.CONFIG_VARIABLE].rpartition("/")[0] in mounts


@pytest.mark.parametrize(
    ("agent", "ucx_port", "mpi"),
    [
        pytest.param({}, 0, False, id="off"),
        pytest.param({"transports": {"ucx": True}}, 7601, False, id="UCX"),
        pytest.param({"transports": {"mpi": True}}, 0, True, id="MPI"),
        pytest.param({"transports": {"ucx": True, "mpi": True}}, 7601, True, id="both"),
        pytest.param(
            {
                "transports": {"ucx": True, "mpi": True},
                "settings": {"ucx_port": 7700, "staging": {"at_once": 2}},
            },
            *(7700, True),
            id="another port",
        ),
        pytest.param(
            {"transports": {"ucx": True, "mpi": True}, "settings": {"ucx_port": 0, "mpi": False}},
            *(0, False),
            id="off after all",
        ),
    ],
)
def test_transports_are_switched_on_and_settings_have_the_last_word(
    helm: Helm, tmp_path: Path, agent: Body, ucx_port: int, mpi: bool
) -> None:
    objects = helm.template({"sources": [SOURCE], "agent": agent})
    config = tmp_path / "config.yaml"
    (body,) = (body for body in objects if body["kind"] == "ConfigMap")
    config.write_text(body["data"]["config.yaml"])
    keys = re.findall(r"^(\w+):", config.read_text(), re.MULTILINE)
    assert sorted(keys) == sorted(set(keys)), "which of the two holds?"
    found = container(objects, "DaemonSet")
    read = agent_settings.read(environment(found), config)
    assert (read.ucx_port, read.mpi) == (ucx_port, mpi)
    assert ports(found).get("peers-ucx", 0) == ucx_port


def test_an_agent_without_sources_starts(helm: Helm, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    (body,) = (body for body in helm.template() if body["kind"] == "ConfigMap")
    config.write_text(body["data"]["config.yaml"])
    assert yaml.safe_load(config.read_text()) == {"roots": []}
    assert agent_settings.read({"NODE_NAME": "node-a"}, config).roots == ()


def test_the_operator_reads_what_the_chart_sets(helm: Helm) -> None:
    found = container(helm.template({"operator": {"logLevel": "warning"}}), "Deployment")
    read = operator_settings.parse([], environment(found))
    assert (read.namespace, read.instance, read.log_level) == ("here", "me", "warning")
    assert ports(found) == {"metrics": read.metrics_port, "health": read.health_port}


def test_the_operator_finds_the_agents_by_their_labels(helm: Helm) -> None:
    wanted = dict(pair.split("=") for pair in operator_settings.AGENT_SELECTOR.split(","))
    found = [
        body["metadata"]["name"]
        for body in helm.template()
        if body["kind"] in ("DaemonSet", "Deployment")
        and wanted.items() <= body["spec"]["template"]["metadata"]["labels"].items()
    ]
    assert found == ["hotweights-agent"]
