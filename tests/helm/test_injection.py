"""What one label does to a pod, on the real API server."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import yaml

from tests.helm.conftest import CHART, ROOT, Body, Kubectl, Refused, opted_in, until

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(180, func_only=True)]

SAMPLES = ROOT / "config" / "samples"
PLUGIN = (
    f"/run/hotweights/plugin/{yaml.safe_load((CHART / 'Chart.yaml').read_text())['appVersion']}"
)
VLLM: Body = {"name": "vllm", "image": "vllm"}
EVICTABLE = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes"
HEALTH: Body = {"httpGet": {"path": "/health", "port": 8000}}
SIDECAR: Body = {
    "name": "proxy",
    "image": "proxy",
    "env": [{"name": "OWN", "value": "untouched"}],
}


def environment(pod: Body, container: int = 0) -> dict[str, str]:
    """The plain variables of a container."""
    return {
        entry["name"]: entry.get("value", "")
        for entry in pod["spec"]["containers"][container].get("env", [])
    }


def ours(pod: Body) -> Body:
    """The spec without what the API server adds to any pod, with lists in an order that can be
    compared.
    """
    spec = copy.deepcopy(pod["spec"])

    def own(entries: list[Any]) -> list[Any]:
        return sorted(
            (entry for entry in entries if not entry["name"].startswith("kube-api-access")),
            key=lambda e: str(e["name"]),
        )

    spec["volumes"] = own(spec["volumes"])
    for container in spec["containers"]:
        container["volumeMounts"] = own(container["volumeMounts"])
        container["env"] = own(container["env"])
    result: Body = spec
    return result


def with_env(*env: Body) -> Body:
    return {**VLLM, "env": list(env)}


def test_a_pod_without_the_label_stays_as_it_is(kubectl: Kubectl) -> None:
    pod = opted_in("plain", VLLM)
    pod["metadata"]["labels"] = {"hotweights.dev/inject": "false"}
    spec = kubectl.dry_run(pod)["spec"]
    assert "readinessGates" not in spec
    assert "env" not in spec["containers"][0]


def test_the_only_container_gets_everything(kubectl: Kubectl) -> None:
    pod = kubectl.dry_run(opted_in("one", VLLM))
    assert pod["spec"]["readinessGates"] == [{"conditionType": "hotweights.dev/weights"}]
    env = pod["spec"]["containers"][0]["env"]
    assert env[0] == {
        "name": "HOTWEIGHTS_NODE",
        "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "spec.nodeName"}},
    }, "a variable may refer only to one before it"
    assert environment(pod) == {
        "HOTWEIGHTS_NODE": "",
        "HOTWEIGHTS_SOCKET": "/run/hotweights/$(HOTWEIGHTS_NODE)/agent.sock",
        "HOTWEIGHTS_TOKEN_FILE": "/var/run/secrets/hotweights/token",
        "HOTWEIGHTS_BOOT_POLICY": "Hold",
        "HOTWEIGHTS_BOOT_TIMEOUT_SECONDS": "120",
        "PYTHONPATH": PLUGIN,
    }, "VLLM_PLUGINS here would replace the image's"
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert volumes["hotweights"]["hostPath"] == {"path": "/run/hotweights", "type": "Directory"}
    assert volumes["hotweights-plugin"]["hostPath"] == {
        "path": PLUGIN,
        "type": "Directory",
    }, "the kubelet starts no container before the agent has laid the plugin out"
    assert volumes["hotweights-token"]["projected"]["sources"] == [
        {
            "serviceAccountToken": {
                "audience": "hotweights-agent",
                "expirationSeconds": 3600,
                "path": "token",
            }
        }
    ]
    mounts = {mount["name"]: mount for mount in pod["spec"]["containers"][0]["volumeMounts"]}
    assert mounts["hotweights"] == {
        "name": "hotweights",
        "mountPath": "/run/hotweights",
        "readOnly": True,
    }
    assert mounts["hotweights-plugin"]["mountPath"] == PLUGIN
    assert mounts["hotweights-token"]["readOnly"]


@pytest.mark.parametrize("position", [0, 1], ids=["first", "second"])
def test_the_annotation_names_the_engine(kubectl: Kubectl, position: int) -> None:
    containers = [SIDECAR, SIDECAR | {"name": "other"}]
    containers[position] = VLLM
    pod = kubectl.dry_run(
        opted_in("two", *containers, annotations={"hotweights.dev/container": "vllm"})
    )
    assert environment(pod, position)["PYTHONPATH"] == PLUGIN
    assert environment(pod, 1 - position) == {"OWN": "untouched"}


def test_what_the_user_set_is_merged_or_kept(kubectl: Kubectl) -> None:
    pod = kubectl.dry_run(
        opted_in(
            "merged",
            with_env(
                {"name": "VLLM_PLUGINS", "value": "mine"},
                {"name": "PYTHONPATH", "value": "/a:/b"},
                {"name": "AFTER", "value": "$(PYTHONPATH)"},
                {"name": "HOTWEIGHTS_BOOT_TIMEOUT_SECONDS", "value": "7"},
            ),
        )
    )
    env = environment(pod)
    assert env["VLLM_PLUGINS"] == "mine", "the plugin adds its own names inside"
    assert env["PYTHONPATH"] == f"{PLUGIN}:/a:/b"
    assert env["HOTWEIGHTS_BOOT_TIMEOUT_SECONDS"] == "7"
    names = list(env)
    assert names.index("PYTHONPATH") < names.index("AFTER"), "a variable refers to one before it"


def test_a_list_of_plugins_may_come_from_anywhere(kubectl: Kubectl) -> None:
    reference = {"configMapKeyRef": {"name": "mine", "key": "plugins"}}
    pod = kubectl.dry_run(
        opted_in("from", with_env({"name": "VLLM_PLUGINS", "valueFrom": reference}))
    )
    assert environment(pod)["PYTHONPATH"] == PLUGIN
    kept = [e for e in pod["spec"]["containers"][0]["env"] if e["name"] == "VLLM_PLUGINS"]
    assert kept == [{"name": "VLLM_PLUGINS", "valueFrom": reference}]


def test_an_empty_path_counts_as_none(kubectl: Kubectl) -> None:
    pod = kubectl.dry_run(opted_in("empty", with_env({"name": "PYTHONPATH"})))
    assert environment(pod)["PYTHONPATH"] == PLUGIN


def test_a_users_own_gates_and_volumes_stay(kubectl: Kubectl) -> None:
    container = {**VLLM, "volumeMounts": [{"name": "mine", "mountPath": "/mine"}]}
    pod = kubectl.dry_run(
        opted_in(
            "gates",
            container,
            readinessGates=[{"conditionType": "example.com/a"}],
            volumes=[{"name": "mine", "emptyDir": {}}],
        )
    )
    assert [gate["conditionType"] for gate in pod["spec"]["readinessGates"]] == [
        "example.com/a",
        "hotweights.dev/weights",
    ]
    assert {"mine", "hotweights", "hotweights-token"} <= {
        volume["name"] for volume in pod["spec"]["volumes"]
    }


def test_a_pod_without_api_token_is_injected_too(kubectl: Kubectl) -> None:
    pod = kubectl.dry_run(opted_in("no-token", VLLM, automountServiceAccountToken=False))
    assert [volume["name"] for volume in pod["spec"]["volumes"]] == [
        "hotweights",
        "hotweights-plugin",
        "hotweights-token",
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "hotweights,hotweights-plugin"),
        ("mine", "mine,hotweights,hotweights-plugin"),
        ("hotweights,hotweights-plugin", "hotweights,hotweights-plugin"),
    ],
)
def test_the_autoscaler_may_empty_the_node(
    kubectl: Kubectl, before: str | None, after: str
) -> None:
    annotations = {EVICTABLE: before} if before else None
    pod = kubectl.dry_run(opted_in("evictable", VLLM, annotations=annotations))
    assert pod["metadata"]["annotations"][EVICTABLE] == after


def probes(pod: Body) -> Body:
    engine = pod["spec"]["containers"][0]
    return {
        name: (engine[name]["periodSeconds"], engine[name]["failureThreshold"])
        for name in ("startupProbe", "livenessProbe", "readinessProbe")
        if name in engine
    }


@pytest.mark.parametrize(
    ("given", "made"),
    [
        pytest.param({}, {}, id="no probe"),
        pytest.param(
            {"startupProbe": {**HEALTH, "periodSeconds": 10, "failureThreshold": 60}},
            {"startupProbe": (10, 360)},
            id="KServe's ten minutes",
        ),
        pytest.param(
            {"startupProbe": {**HEALTH, "periodSeconds": 7}},
            {"startupProbe": (7, 515)},
            id="rounded up",
        ),
        pytest.param(
            {"startupProbe": {**HEALTH, "periodSeconds": 10, "failureThreshold": 1000}},
            {"startupProbe": (10, 1000)},
            id="more than that already",
        ),
        pytest.param(
            {"livenessProbe": {**HEALTH, "periodSeconds": 20}},
            {"startupProbe": (20, 180), "livenessProbe": (20, 3)},
            id="liveness alone",
        ),
        pytest.param(
            {"readinessProbe": HEALTH}, {"readinessProbe": (10, 3)}, id="readiness ends nothing"
        ),
    ],
)
def test_the_first_probe_bears_with_staging(kubectl: Kubectl, given: Body, made: Body) -> None:
    first = kubectl.dry_run(opted_in("probed", {**VLLM, **given}))
    assert probes(first) == made
    if "startupProbe" in made:
        assert first["spec"]["containers"][0]["startupProbe"]["httpGet"]["path"] == "/health"
    assert probes(kubectl.dry_run({**opted_in("probed"), "spec": first["spec"]})) == made


def test_the_annotation_sets_the_boot_policy(kubectl: Kubectl) -> None:
    pod = kubectl.dry_run(
        opted_in("serve", VLLM, annotations={"hotweights.dev/boot-policy": "Serve"})
    )
    assert environment(pod)["HOTWEIGHTS_BOOT_POLICY"] == "Serve"


def test_injecting_twice_changes_nothing(kubectl: Kubectl) -> None:
    """As when another policy or webhook changes the pod, and ours runs again."""
    first = kubectl.dry_run(
        opted_in(
            "twice",
            with_env(
                {"name": "VLLM_PLUGINS", "value": "mine"}, {"name": "PYTHONPATH", "value": "/a"}
            ),
        )
    )
    again = {**opted_in("twice"), "spec": first["spec"]}
    assert ours(kubectl.dry_run(again)) == ours(first)


@contextmanager
def another_policy(kubectl: Kubectl, name: str, patch: Body) -> Iterator[Body]:
    """A mutating policy beside ours, that was noticed; gives the label that has it change a pod."""
    policy = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": name},
        "spec": {
            "reinvocationPolicy": "IfNeeded",
            "failurePolicy": "Fail",
            "matchConstraints": {
                "objectSelector": {"matchLabels": {"changed-by": name}},
                "resourceRules": [
                    {
                        "apiGroups": [""],
                        "apiVersions": ["v1"],
                        "operations": ["CREATE"],
                        "resources": ["pods"],
                    }
                ],
            },
            "mutations": [patch],
        },
    }
    kubectl.create(policy)
    kubectl.create(
        {**policy, "kind": "MutatingAdmissionPolicyBinding", "spec": {"policyName": name}}
    )
    plain = {"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [VLLM]}}
    label = {"changed-by": name}
    plain["metadata"] = {"name": "plain", "namespace": "default", "labels": label}

    def noticed() -> bool:
        changed = kubectl.dry_run(plain)["spec"]["containers"]
        return len(changed) > 1 or bool(changed[0].get("env"))

    try:
        until(noticed, f"the policy {name} is noticed")
        yield label
    finally:
        kubectl("delete", "mutatingadmissionpolicies,mutatingadmissionpolicybindings", name)


def test_another_policy_may_change_the_pod_before_or_after_ours(kubectl: Kubectl) -> None:
    """A second mutating policy adds a variable; where it runs after ours, ours is asked again."""
    expression = (
        "Object{spec: Object.spec{containers: object.spec.containers.map(c, "
        "Object.spec.containers{name: c.name,"
        " env: [Object.spec.containers.env{name: 'LATER', value: 'yes'}]})}}"
    )
    patch = {
        "patchType": "ApplyConfiguration",
        "applyConfiguration": {"expression": expression},
    }
    with another_policy(kubectl, "variable", patch) as label:
        pod = opted_in("reinvoked", VLLM)
        pod["metadata"]["labels"] |= label
        made = kubectl.dry_run(pod)
    assert environment(made)["LATER"] == "yes"
    assert made["spec"]["readinessGates"] == [{"conditionType": "hotweights.dev/weights"}]
    names = [entry["name"] for entry in made["spec"]["containers"][0]["env"]]
    assert len(names) == len(set(names))


ADD_A_PROXY = """\
object.spec.containers.exists(c, c.name == 'istio-proxy') ? [] : [JSONPatch{
  op: 'add', path: '/spec/containers/0',
  value: Object.spec.containers{name: 'istio-proxy', image: 'istio/proxyv2'}
}]"""


def test_a_sidecar_that_another_policy_adds_is_no_engine(kubectl: Kubectl) -> None:
    """In front of all containers. Which of two policies runs first is chance (the API server walks
    a Go map: `calculatePolicyData` in its policy_source.go), so the engine says what it starts.
    """
    patch = {"patchType": "JSONPatch", "jsonPatch": {"expression": ADD_A_PROXY}}
    with another_policy(kubectl, "mesh", patch) as label:
        pod = opted_in("meshed", {**VLLM, "command": ["vllm", "serve", "/models/x"]})
        pod["metadata"]["labels"] |= label
        assert_only_the_engine_is_injected(kubectl.dry_run(pod))


def test_a_sidecar_that_a_webhook_adds_is_no_engine(kubectl: Kubectl) -> None:
    """As Istio does. Webhooks run after all policies, which are asked again then: whatever the
    engine starts, it is known by what we gave it before.
    """
    pod = opted_in("meshed", VLLM)
    spec = kubectl.dry_run(pod)["spec"]
    spec["containers"].insert(0, {"name": "istio-proxy", "image": "istio/proxyv2"})
    assert_only_the_engine_is_injected(kubectl.dry_run({**pod, "spec": spec}))


def assert_only_the_engine_is_injected(made: Body) -> None:
    names = [container["name"] for container in made["spec"]["containers"]]
    assert names == ["istio-proxy", "vllm"]
    assert environment(made, 0) == {}
    assert environment(made, 1)["PYTHONPATH"] == PLUGIN
    assert made["spec"]["readinessGates"] == [{"conditionType": "hotweights.dev/weights"}]


@pytest.mark.parametrize(
    "starts",
    [
        pytest.param({"command": ["vllm", "serve", "/models/x"]}, id="vllm serve"),
        pytest.param({"command": ["/opt/venv/bin/vllm"], "args": ["serve", "m"]}, id="by its path"),
        pytest.param(
            {"args": ["python3", "-m", "vllm.entrypoints.openai.api_server"]}, id="module"
        ),
        pytest.param({"command": ["sh", "-c", "ulimit -n 9999\nexec vllm serve m"]}, id="a shell"),
        pytest.param({"env": [{"name": "HOTWEIGHTS_SOCKET", "value": "/s"}]}, id="by hand"),
    ],
)
def test_the_engine_is_the_container_that_starts_vllm(kubectl: Kubectl, starts: Body) -> None:
    router = {**SIDECAR, "args": ["--vllm-port=8200", "--connector", "vllm", "--model=vllm/x"]}
    pod = kubectl.dry_run(opted_in("two", router, {**VLLM, **starts}))
    assert environment(pod, 0) == {"OWN": "untouched"}
    assert environment(pod, 1)["PYTHONPATH"] == PLUGIN


def test_the_annotation_is_believed_before_what_a_container_starts(kubectl: Kubectl) -> None:
    other = {"name": "other", "image": "x", "command": ["vllm", "serve", "m"]}
    annotations = {"hotweights.dev/container": "vllm"}
    pod = kubectl.dry_run(opted_in("two", VLLM, other, annotations=annotations))
    assert environment(pod)["PYTHONPATH"] == PLUGIN
    assert environment(pod, 1) == {}


@pytest.mark.parametrize(
    ("pod", "complaint"),
    [
        pytest.param(
            opted_in("x", VLLM, SIDECAR),
            r"several containers \(vllm, proxy\).* set the annotation "
            r"hotweights.dev/container to its name",
            id="two containers",
        ),
        pytest.param(
            opted_in(
                "x", *({"name": n, "image": n, "command": ["vllm", "serve", n]} for n in "ab")
            ),
            r"several containers \(a, b\).* set the annotation",
            id="two engines",
        ),
        pytest.param(
            opted_in("x", VLLM, annotations={"hotweights.dev/container": "engine"}),
            'names "engine", but the pod has: vllm',
            id="annotation names nobody",
        ),
        pytest.param(
            opted_in("x", VLLM, annotations={"hotweights.dev/boot-policy": "hold"}),
            'hotweights.dev/boot-policy is "hold": write Hold or Serve',
            id="boot policy",
        ),
        pytest.param(
            opted_in(
                "x",
                with_env(
                    {
                        "name": "PYTHONPATH",
                        "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}},
                    }
                ),
            ),
            "PYTHONPATH comes from a reference .*: write it as a plain value",
            id="variable by reference",
        ),
    ],
)
def test_pods_that_could_never_be_ready_are_refused(
    kubectl: Kubectl, pod: Body, complaint: str
) -> None:
    with pytest.raises(Refused, match=complaint):
        kubectl.dry_run(pod)


def serving(*arguments: str) -> Body:
    return opted_in("x", {**VLLM, "command": ["vllm", "serve"], "args": ["/models/x", *arguments]})


def in_shell(line: str) -> Body:
    return opted_in("x", {**VLLM, "command": ["sh", "-c", line]})


def labelled(pod: Body, **labels: str) -> Body:
    pod["metadata"]["labels"] |= {"ray.io/cluster": "ray", **labels}
    return pod


SEVERAL = {"leaderworkerset.sigs.k8s.io/size": "2"}
PODS_OF_ONE_ENGINE = "one of several pods of an engine"


@pytest.mark.parametrize(
    ("pod", "complaint"),
    [
        pytest.param(opted_in("x", VLLM, annotations=SEVERAL), PODS_OF_ONE_ENGINE, id="LWS"),
        pytest.param(serving("--headless"), PODS_OF_ONE_ENGINE, id="headless"),
        pytest.param(serving("--nnodes=2"), PODS_OF_ONE_ENGINE, id="nnodes"),
        pytest.param(serving("--distributed-executor-backend", "ray"), "Ray", id="Ray's workers"),
        pytest.param(labelled(opted_in("x", VLLM)), "Ray", id="a pod of Ray"),
        pytest.param(serving("--data-parallel-size", "2"), "data parallelism", id="DP"),
        pytest.param(serving("-dp=16"), "data parallelism", id="DP in short"),
        pytest.param(serving("--data_parallel_size=2"), "data parallelism", id="underscores"),
        pytest.param(in_shell("exec vllm serve m \\\n -dp 4"), "data parallelism", id="a shell"),
        pytest.param(serving("--runner=pooling"), "pooling model", id="pooling"),
        pytest.param(serving("--task", "embed"), "pooling model", id="an older argument"),
        pytest.param(
            opted_in("x", with_env({"name": "VLLM_USE_RUST_FRONTEND", "value": "1"})),
            "Rust",
            id="Rust",
        ),
    ],
)
def test_engines_that_cannot_be_updated_are_refused_at_once(
    kubectl: Kubectl, pod: Body, complaint: str
) -> None:
    with pytest.raises(Refused, match=f"Hotweights cannot update this pod: .*{complaint}"):
        kubectl.dry_run(pod)


@pytest.mark.parametrize("name", ["gvisor", "kata-qemu"])
def test_sandboxes_are_refused(kubectl: Kubectl, name: str) -> None:
    with runtime_class(kubectl, name), pytest.raises(Refused, match=f"runtime class {name} lets"):
        kubectl.dry_run(opted_in("x", VLLM, runtimeClassName=name))


def test_the_runtime_class_of_gpus_is_not_a_sandbox(kubectl: Kubectl) -> None:
    with runtime_class(kubectl, "nvidia"):
        assert environment(kubectl.dry_run(opted_in("x", VLLM, runtimeClassName="nvidia")))


@contextmanager
def runtime_class(kubectl: Kubectl, name: str) -> Iterator[None]:
    made = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": name}}
    kubectl.create({**made, "handler": name})
    plain = {**opted_in("x", VLLM, runtimeClassName=name)}
    plain["metadata"] = {"name": "x", "namespace": "default"}

    def noticed() -> bool:  # by a cache of the API server's
        try:
            kubectl.dry_run(plain)
        except Refused:
            return False
        return True

    try:
        until(noticed, f"the runtime class {name} is known")
        yield
    finally:
        kubectl("delete", "runtimeclass", name)


@pytest.mark.parametrize(
    "pod",
    [
        serving("--nnodes=1", "--data-parallel-size=1", "--tensor-parallel-size", "2"),
        serving("--distributed-executor-backend=mp", "--runner", "generate"),
        serving("--served-model-name=ray", "--data-parallel-size-local", "1"),
        opted_in("x", VLLM, annotations={"leaderworkerset.sigs.k8s.io/size": "1"}),
        opted_in("x", with_env({"name": "VLLM_USE_RUST_FRONTEND", "value": "0"})),
    ],
    ids=["one of each", "named defaults", "names", "a group of one", "switched off"],
)
def test_arguments_that_do_no_harm_are_let_in(kubectl: Kubectl, pod: Body) -> None:
    assert environment(kubectl.dry_run(pod))["PYTHONPATH"] == PLUGIN


def test_a_reference_in_another_container_does_not_matter(kubectl: Kubectl) -> None:
    other = {
        **SIDECAR,
        "env": [{"name": "PYTHONPATH", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
    }
    pod = kubectl.dry_run(
        opted_in("other", VLLM, other, annotations={"hotweights.dev/container": "vllm"})
    )
    assert environment(pod)["PYTHONPATH"] == PLUGIN


@pytest.mark.parametrize(
    ("level", "objection"),
    [
        ("baseline", r'hostPath volumes \(volumes "hotweights", "hotweights-plugin"\)'),
        ("restricted", r'"hotweights", "hotweights-plugin" use restricted volume type "hostPath"'),
    ],
)
def test_pod_security_refuses_the_host_folder(kubectl: Kubectl, level: str, objection: str) -> None:
    labels = {"pod-security.kubernetes.io/enforce": level}
    kubectl.create(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": level, "labels": labels}}
    )
    until(lambda: "default" in accounts(kubectl, level), "the namespace has its service account")
    pod = opted_in("x", VLLM)
    pod["metadata"]["namespace"] = level
    with pytest.raises(Refused, match=f'violates PodSecurity "{level}:latest".*{objection}'):
        kubectl.dry_run(pod)


def accounts(kubectl: Kubectl, namespace: str) -> list[str]:
    found = kubectl.get("serviceaccounts", "-n", namespace)["items"]
    return [account["metadata"]["name"] for account in found]


def test_the_patch_by_hand_equals_the_injection(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", SAMPLES / "vllm.yaml")
    try:
        template = kubectl.get("deployment", "tiny-llama", "-n", "hotweights-samples")["spec"][
            "template"
        ]
        patch = (
            "patch",
            "deployment",
            "tiny-llama",
            "-n",
            "hotweights-samples",
            "--dry-run=server",
            "-o",
            "json",
        )
        by_hand = yaml.safe_load(
            kubectl(*patch, "--patch-file", SAMPLES / "manual-injection.yaml")
        )["spec"]["template"]
    finally:
        kubectl("delete", "-f", SAMPLES / "vllm.yaml")

    def as_pod(template: Body) -> Body:
        metadata = {"name": "x", "namespace": "default", **template["metadata"]}
        metadata.pop("creationTimestamp", None)
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}

    assert by_hand != template
    untouched = as_pod(copy.deepcopy(by_hand))
    del untouched["metadata"]["labels"]["hotweights.dev/inject"]
    one, other = kubectl.dry_run(untouched), kubectl.dry_run(as_pod(template))
    assert ours(one) == ours(other)
    assert one["metadata"]["annotations"] == other["metadata"]["annotations"]
