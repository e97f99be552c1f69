"""The samples on a cluster: the files of ``config/samples`` word for word, and what they ask the
cluster for.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

from e2e.harness.environment import NAMESPACE, SAMPLES, SYSTEM, Environment
from e2e.harness.kubectl import Kubectl, eventually

START_SECONDS = 900


def models_volume(environment: Environment) -> str:
    """The PersistentVolumeClaim that the samples want, bound to the folder of the models."""
    name = f"{NAMESPACE}-models"
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadOnlyMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "claimRef": {"namespace": NAMESPACE, "name": "models"},
            "hostPath": {"path": str(environment.models_on_nodes)},
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "models", "namespace": NAMESPACE},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "volumeName": name,
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    return str(yaml.safe_dump_all([volume, claim]))


def make_namespace(environment: Environment) -> None:
    """The samples' namespace, with nothing in it but the models."""
    kubectl = environment.in_samples
    kubectl(
        "delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait=true", timeout_seconds=300
    )
    kubectl(
        "delete", "persistentvolume", f"{NAMESPACE}-models", "--ignore-not-found", "--wait=true"
    )
    kubectl.apply(SAMPLES / "namespace.yaml")
    kubectl("apply", "--filename", "-", stdin=models_volume(environment))


def start_pods(environment: Environment) -> None:
    """The sample Deployment, Ready, and its pods on version v0 by a rollout of their own."""
    kubectl = environment.in_samples
    make_namespace(environment)
    kubectl.apply(
        SAMPLES / "vllm.yaml", SAMPLES / "weightversion-v0.yaml", SAMPLES / "weightrollout-v0.yaml"
    )
    if not injects(environment):
        kubectl(
            "patch",
            "deployment",
            "tiny-llama",
            "--patch-file",
            str(SAMPLES / "manual-injection.yaml"),
        )
    kubectl(
        "rollout",
        "status",
        "deployment/tiny-llama",
        f"--timeout={START_SECONDS}s",
        timeout_seconds=START_SECONDS + 10,
    )
    kubectl(
        "wait",
        "--for=condition=Ready",
        "weightrollout/tiny-llama",
        "--timeout=300s",
        timeout_seconds=310,
    )


def injects(environment: Environment) -> bool:
    """Whether the label is enough on this cluster; before Kubernetes 1.36 the template is
    patched.
    """
    group = json.loads(environment.kubectl("get", "--raw", "/apis/admissionregistration.k8s.io/v1"))
    return any(resource["name"] == "mutatingadmissionpolicies" for resource in group["resources"])


def scale(environment: Environment, replicas: int) -> None:
    """Ask for so many pods, and wait until there are so many, Ready or not."""
    kubectl = environment.in_samples
    kubectl("scale", "deployment/tiny-llama", f"--replicas={replicas}")
    eventually(
        f"{replicas} pods",
        lambda: len(kubectl.pods("app=tiny-llama")) == replicas,
        START_SECONDS,
    )


def engine_status(environment: Environment) -> dict[str, dict[str, Any]]:
    """What the agents say of every engine, by pod UID."""
    items = environment.kubectl.get("nodeweights", "--namespace", SYSTEM)["items"]
    return {
        engine["podUID"]: engine
        for item in items
        for engine in item.get("status", {}).get("engines", [])
    }


def version_of(environment: Environment, pod: str) -> str:
    """The version label of a pod, empty without one."""
    body = environment.in_samples.get("pod", pod)
    return str(body["metadata"].get("labels", {}).get("hotweights.dev/version", ""))


def system_pods(environment: Environment, component: str) -> list[dict[str, Any]]:
    """The operator's pods, or the agents', by name."""
    kubectl = Kubectl(environment.kubectl.binary, environment.kubectl.kubeconfig, SYSTEM)
    return kubectl.pods(f"app.kubernetes.io/component={component}")


def until_ready(
    environment: Environment, name: str = "tiny-llama", timeout_seconds: float = 400
) -> None:
    """Wait as a user waits."""
    environment.in_samples(
        "wait",
        "--for=condition=Ready",
        f"weightrollout/{name}",
        f"--timeout={timeout_seconds:.0f}s",
        timeout_seconds=timeout_seconds + 10,
    )


def condition(environment: Environment, type_: str, name: str = "tiny-llama") -> dict[str, Any]:
    """One condition of a rollout, empty while it is not there."""
    body = environment.in_samples.get("weightrollout", name)
    return next((c for c in body.get("status", {}).get("conditions", []) if c["type"] == type_), {})


def until_condition(
    environment: Environment,
    type_: str,
    reason: str,
    name: str = "tiny-llama",
    timeout_seconds: float = 300,
) -> dict[str, Any]:
    """The condition once it has this reason."""
    found: dict[str, Any] = eventually(
        f"{type_}/{reason} on {name}",
        lambda: (c := condition(environment, type_, name)).get("reason") == reason and c,
        timeout_seconds,
    )
    return found
