"""What the chart renders: rights, confinement, switches, and the values that it refuses."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml

from tests.helm.conftest import CHART, ROOT, SOURCE, Body, Helm, Refused

pytestmark = pytest.mark.timeout(180, func_only=True)  # helm may have to be built first

POLICIES = ("--api-versions", "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy")
CLAIM = {"name": "shared", "persistentVolumeClaim": "weights", "namespaces": ["*"]}


def of_kind(objects: list[Body], kind: str, name: str = "") -> list[Body]:
    return [body for body in objects if body["kind"] == kind and name in body["metadata"]["name"]]


def pod_spec(objects: list[Body], component: str) -> Body:
    (workload,) = (
        body
        for body in objects
        if body["kind"] in ("Deployment", "DaemonSet") and component in body["metadata"]["name"]
    )
    spec: Body = workload["spec"]["template"]["spec"]
    return spec


def rights(objects: list[Body], component: str) -> set[tuple[str, str]]:
    """(resource, verb) of every rule, whatever its scope."""
    roles = of_kind(objects, "ClusterRole", component) + of_kind(objects, "Role", component)
    return {
        (resource, verb)
        for role in roles
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_lint_is_clean(helm: Helm) -> None:
    assert "0 chart(s) failed" in helm.lint()


def test_the_chart_has_the_distributions_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (
        chart["appVersion"]
        == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    )


@pytest.mark.parametrize("component", ["operator", "agent", "keeper"])
def test_pods_are_confined(helm: Helm, component: str) -> None:
    spec = pod_spec(helm.template(), component)
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["securityContext"].get("runAsNonRoot", False) == (component == "operator")
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()


def test_what_is_staged_outlives_the_pods_of_agents(helm: Helm) -> None:
    """The keeper is where each agent is, no update replaces it, and no tenant mounts its folder."""
    placed = {"nodeSelector": {"gpu": "true"}, "priorityClassName": "high"}
    objects = helm.template({"agent": placed}, *POLICIES)
    agent, keeper = (pod_spec(objects, component) for component in ("agent", "keeper"))
    assert placed.items() <= keeper.items()
    assert agent["tolerations"] == keeper["tolerations"]
    assert keeper["automountServiceAccountToken"] is False
    (workload,) = of_kind(objects, "DaemonSet", "keeper")
    assert workload["spec"]["updateStrategy"] == {"type": "OnDelete"}

    def folder(spec: Body) -> tuple[str, str]:
        (container,) = spec["containers"]
        (mount,) = (m for m in container["volumeMounts"] if "keeper" in m["mountPath"])
        (volume,) = (v for v in spec["volumes"] if v["name"] == mount["name"])
        return volume["hostPath"]["path"], mount["subPathExpr"]

    assert folder(agent) == folder(keeper) == ("/run/hotweights-keeper", "$(NODE_NAME)")
    (container,) = agent["containers"]
    (socket,) = (e["value"] for e in container["env"] if e["name"] == "HOTWEIGHTS_KEEPER_SOCKET")
    (listening,) = keeper["containers"]
    assert listening["command"][-1] == socket
    (policy,) = of_kind(objects, "MutatingAdmissionPolicy", "inject")
    assert "/run/hotweights-keeper" not in str(policy)


def test_an_agent_may_be_let_past_the_modes_of_sources(helm: Helm) -> None:
    spec = pod_spec(helm.template({"agent": {"capabilities": ["DAC_READ_SEARCH"]}}), "agent")
    (container,) = spec["containers"]
    assert container["securityContext"]["capabilities"] == {
        "drop": ["ALL"],
        "add": ["DAC_READ_SEARCH"],
    }


def verbs(**of: str) -> set[tuple[str, str]]:
    """``nodeweights_status="patch"`` and the like as rights."""
    return {(name.replace("_", "/"), verb) for name, words in of.items() for verb in words.split()}


def test_the_agents_rights_are_these_and_no_others(helm: Helm) -> None:
    read = verbs(pods="list watch", nodeweights="get list watch")
    writes = verbs(pods_status="patch", nodeweights_status="patch", tokenreviews="create")
    assert rights(helm.template(), "agent") == read | writes


def test_the_operators_rights_are_these_and_no_others(helm: Helm) -> None:
    read = verbs(
        pods="list watch",
        nodes="list watch",
        weightversions="get list watch",
        weightrollouts="get list watch",
    )
    writes = verbs(
        weightversions_status="patch", weightrollouts_status="patch", events="create patch"
    )
    assert rights(helm.template(), "operator") == read | writes | verbs(
        nodeweights="get list watch create patch"
    )


@pytest.mark.parametrize("component", ["operator", "agent"])
def test_named_namespaces_are_all_that_is_read_and_written(helm: Helm, component: str) -> None:
    objects = helm.template({"namespaces": ["team-a", "team-b"]}, *POLICIES)
    (cluster,) = of_kind(objects, "ClusterRole", component)
    assert {r for rule in cluster["rules"] for r in rule["resources"]} == {
        "operator": {"nodes"},
        "agent": {"tokenreviews"},
    }[component]
    served = of_kind(objects, "Role", f"{component}-served")
    assert [role["metadata"]["namespace"] for role in served] == ["team-a", "team-b"]
    assert [
        (b["metadata"]["namespace"], b["roleRef"]["kind"])
        for b in of_kind(objects, "RoleBinding", f"{component}-served")
    ] == [("team-a", "Role"), ("team-b", "Role")]
    known = rights(helm.template(), component)
    assert rights(objects, component) == known


def test_named_namespaces_are_what_is_watched_and_opted_in(helm: Helm) -> None:
    kube = {"kube": {"away_seconds": 5}}  # beside it
    objects = helm.template(
        {"namespaces": ["team-a", "team-b"], "agent": {"settings": kube}}, *POLICIES
    )
    assert {"name": "HOTWEIGHTS_WATCH_NAMESPACES", "value": "team-a,team-b"} in (
        pod_spec(objects, "operator")["containers"][0]["env"]
    )
    (config,) = of_kind(objects, "ConfigMap", "agent")
    assert yaml.safe_load(config["data"]["config.yaml"])["kube"] == {
        "namespaces": ["team-a", "team-b"],
        "away_seconds": 5,
    }
    for policy in (
        *of_kind(objects, "MutatingAdmissionPolicy"),
        *of_kind(objects, "ValidatingAdmissionPolicy", "inject-check"),
    ):
        (only,) = policy["spec"]["matchConstraints"]["namespaceSelector"]["matchExpressions"]
        assert only["values"] == ["team-a", "team-b"]
    for policy in of_kind(helm.template(None, *POLICIES), "MutatingAdmissionPolicy"):
        assert "namespaceSelector" not in policy["spec"]["matchConstraints"]


def test_a_restart_is_asked_of_liveness_and_sight_of_readiness(helm: Helm) -> None:
    (operator,) = pod_spec(helm.template(), "operator")["containers"]
    paths = {
        name: operator[f"{name}Probe"]["httpGet"]["path"]
        for name in ("startup", "liveness", "readiness")
    }
    assert paths == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}


@pytest.mark.parametrize("values", [{}, {"agent": {"resources": {"limits": {"memory": "64Gi"}}}}])
def test_the_scheduler_knows_of_the_memory_that_versions_take(helm: Helm, values: Body) -> None:
    """Kubernetes requests the limit where nothing else is requested."""
    agent = pod_spec(helm.template({"sources": [SOURCE]} | values), "agent")["containers"][0]
    limit = agent["resources"]["limits"]["memory"]
    assert agent["resources"]["requests"].get("memory", limit) == limit


def test_one_operator_at_a_time(helm: Helm) -> None:
    (deployment,) = of_kind(helm.template(), "Deployment")
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}


def test_the_chart_carries_the_same_definitions_as_crds(helm: Helm) -> None:
    rendered = {
        body["metadata"]["name"]: body
        for body in of_kind(helm.template(), "CustomResourceDefinition")
    }
    for path in sorted((ROOT / "crds").glob("*.yaml")):
        plain = yaml.safe_load(path.read_text())
        ours = rendered.pop(plain["metadata"]["name"])
        assert ours["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        assert ours["spec"] == plain["spec"]
    assert not rendered


def test_definitions_can_be_left_out_or_given_to_helm(helm: Helm) -> None:
    assert not of_kind(helm.template({"crds": {"enabled": False}}), "CustomResourceDefinition")
    for body in of_kind(helm.template({"crds": {"keep": False}}), "CustomResourceDefinition"):
        assert "helm.sh/resource-policy" not in body["metadata"]["annotations"]


def test_sources_are_mounted_read_only_and_configured(helm: Helm) -> None:
    objects = helm.template({"sources": [SOURCE, CLAIM]})
    spec = pod_spec(objects, "agent")
    mounts = {mount["name"]: mount for mount in spec["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert mounts["source-models"] == {
        "name": "source-models",
        "mountPath": "/models",
        "readOnly": True,
        "mountPropagation": "HostToContainer",  # what is mounted there later arrives too
    }
    assert mounts["source-shared"] == {
        "name": "source-shared",
        "mountPath": "/pvc/weights",
        "readOnly": True,
    }
    assert volumes["source-models"]["hostPath"] == {
        "path": "/srv/models",
        "type": "DirectoryOrCreate",  # agents start on nodes without models too
    }
    assert volumes["source-shared"]["persistentVolumeClaim"] == {
        "claimName": "weights",
        "readOnly": True,
    }


def test_a_changed_source_restarts_the_agents(helm: Helm) -> None:
    def checksum(values: Body) -> Any:
        (agents,) = of_kind(helm.template(values), "DaemonSet", "agent")
        return agents["spec"]["template"]["metadata"]["annotations"]["checksum/config"]

    assert checksum({"sources": [SOURCE]}) == checksum({"sources": [SOURCE]})
    assert checksum({"sources": [SOURCE]}) != checksum(
        {"sources": [{**SOURCE, "namespaces": ["other"]}]}
    )


def test_injection_needs_its_api_and_its_switch(helm: Helm) -> None:
    def injects(*options: str, **inject: object) -> bool:
        return bool(of_kind(helm.template({"inject": inject}, *options), "MutatingAdmissionPolicy"))

    assert injects(*POLICIES)
    assert not injects(*POLICIES, enabled=False)
    assert not injects("--kube-version", "1.33.0")


def test_images_are_named_by_registry_and_tag(helm: Helm) -> None:
    objects = helm.template({"image": {"registry": "registry.example.com/team/", "tag": "2"}})
    assert (
        pod_spec(objects, "agent")["containers"][0]["image"]
        == "registry.example.com/team/hotweights:2"
    )
    assert re.fullmatch(
        r"localhost/hotweights:[0-9.]+",
        pod_spec(helm.template(), "operator")["containers"][0]["image"],
    )


def test_switches_render(helm: Helm) -> None:
    peers: list[Body] = [{"namespaceSelector": {}}]
    objects = helm.template(
        {
            "podMonitor": {"enabled": True},
            "networkPolicy": {"enabled": True, "metricsFrom": peers},
            "rbac": {"aggregate": False},
        }
    )
    assert len(of_kind(objects, "PodMonitor")) == 1
    assert [body["metadata"]["name"] for body in of_kind(objects, "NetworkPolicy")] == [
        "hotweights-agent",
        "hotweights-operator",
    ]
    assert {body["metadata"]["name"] for body in of_kind(objects, "ClusterRole")} == {
        "hotweights-agent",
        "hotweights-operator",
    }


@pytest.mark.parametrize(
    ("agent", "ports"),
    [
        pytest.param({}, [{"port": "peers"}], id="TCP alone"),
        pytest.param({"transports": {"ucx": True}}, None, id="UCX"),
        pytest.param({"transports": {"mpi": True}}, None, id="MPI"),
        pytest.param({"settings": {"ucx_port": 7700}}, None, id="UCX by a setting"),
        pytest.param(
            {"transports": {"mpi": True}, "settings": {"mpi": False}},
            [{"port": "peers"}],
            id="overridden",
        ),
    ],
)
def test_agents_reach_agents_and_all_their_ports_only_where_data_needs_them(
    helm: Helm, agent: Body, ports: list[Body] | None
) -> None:
    (policy,) = of_kind(
        helm.template({"networkPolicy": {"enabled": True}, "agent": agent}),
        "NetworkPolicy",
        "agent",
    )
    (rule,) = policy["spec"]["ingress"]
    (peer,) = rule["from"]
    assert peer.keys() == {"podSelector"}
    assert peer["podSelector"] == policy["spec"]["podSelector"]
    assert rule.get("ports") == ports


@pytest.mark.parametrize("mpi", [True, False])
def test_somebody_buries_the_ranks_of_a_broadcast(helm: Helm, mpi: bool) -> None:
    objects = helm.template({"agent": {"transports": {"mpi": mpi}}})
    (agent,) = of_kind(objects, "DaemonSet", "agent")
    assert agent["spec"]["template"]["spec"].get("shareProcessNamespace", False) is mpi


def test_values_of_an_older_chart_render(helm: Helm) -> None:
    """`helm upgrade --reuse-values` brings none of the new defaults."""
    assert helm.template({"networkPolicy": {"enabled": True}, "agent": {"transports": None}})


def test_extra_settings_reach_the_pods(helm: Helm) -> None:
    extra = {
        "extraEnv": [{"name": "A", "value": "b"}],
        "priorityClassName": "system-node-critical",
        "nodeSelector": {"gpu": "yes"},
        "podLabels": {"team": "x"},
        "podAnnotations": {"note": "y"},
    }
    for component in ("operator", "agent"):
        objects = helm.template({component: extra})
        spec = pod_spec(objects, component)
        assert {"name": "A", "value": "b"} in spec["containers"][0]["env"]
        assert (spec["priorityClassName"], spec["nodeSelector"]) == (
            "system-node-critical",
            {"gpu": "yes"},
        )


def test_the_autoscaler_may_empty_the_operators_node(helm: Helm) -> None:
    name = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes"
    for given, kept in (({}, "tmp"), ({name: "none"}, "none")):
        (deployment,) = of_kind(
            helm.template({"operator": {"podAnnotations": given}}), "Deployment"
        )
        assert deployment["spec"]["template"]["metadata"]["annotations"] == {name: kept}


def test_only_pinned_versions_are_taken_where_that_is_asked_for(helm: Helm) -> None:
    assert not of_kind(helm.template(), "ValidatingAdmissionPolicy", "-digest")
    (policy,) = of_kind(
        helm.template({"requireDigest": True}), "ValidatingAdmissionPolicy", "-digest"
    )
    (rule,) = policy["spec"]["validations"]
    assert "spec.manifest.digest" in rule["message"]


def test_agents_run_with_the_selinux_options_that_are_given(helm: Helm) -> None:
    given = {"type": "spc_t", "level": "s0"}
    objects = helm.template({"agent": {"seLinuxOptions": given}})
    for component in ("agent", "keeper"):  # one connects to the other
        assert pod_spec(objects, component)["securityContext"]["seLinuxOptions"] == given
    assert "seLinuxOptions" not in pod_spec(helm.template(), "agent")["securityContext"]


def test_the_notes_say_what_is_missing(helm: Helm) -> None:
    assert "No source root is allowed yet" in helm.notes({})
    assert "No source root" not in helm.notes({"sources": [SOURCE]})


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        pytest.param({"agents": {}}, "agents", id="unknown key"),
        pytest.param({"agent": {"resource": {}}}, "resource", id="unknown nested key"),
        pytest.param({"agent": {"transports": {"rdma": True}}}, "rdma", id="unknown transport"),
        pytest.param({"agent": {"transports": {"mpi": "yes"}}}, "mpi", id="no switch"),
        pytest.param({"agent": {"settings": {"ucx_port": 65536}}}, "ucx_port", id="no port"),
        pytest.param(
            {"agent": {"settings": {"metrics_port": 80}}},
            "metrics_port",
            id="a port that probes rely on",
        ),
        pytest.param({"agent": {"capabilities": ["SYS_ADMIN"]}}, "capabilities", id="may do more"),
        pytest.param({"image": {"registry": ""}}, "registry", id="Docker Hub's image"),
        pytest.param({"inject": {"bootPolicy": "hold"}}, "bootPolicy", id="boot policy"),
        pytest.param(
            {"agent": {"resources": {"limits": {"memory": None}}}}, "memory", id="no memory limit"
        ),
        pytest.param({"handoff": {"type": "csi"}}, "type", id="handoff not built yet"),
        pytest.param({"sources": [{**SOURCE, "path": "/"}]}, "path", id="the whole file system"),
        pytest.param(
            {"sources": [{**SOURCE, "hostPath": "/srv/../etc"}]}, "hostPath", id="path climbs"
        ),
        pytest.param(
            {"sources": [{**SOURCE, "namespaces": []}]}, "namespaces", id="nobody may read it"
        ),
        pytest.param(
            {"sources": [{**SOURCE, "persistentVolumeClaim": "a"}]}, "sources", id="two volumes"
        ),
        pytest.param({"sources": [{"name": "a", "namespaces": ["*"]}]}, "sources", id="no volume"),
        pytest.param(
            {"inject": {"tokenExpirationSeconds": 60}},
            "tokenExpirationSeconds",
            id="below the API server's least",
        ),
    ],
)
def test_values_that_are_refused(helm: Helm, values: Body, complaint: str) -> None:
    with pytest.raises(Refused, match=complaint):
        helm.template(values)
