"""What Prometheus finds in Kubernetes, as targets with the same labels: Debian's is built without that
discovery, so a test looks for it. What becomes of the labels is Prometheus' own business again.

https://prometheus.io/docs/prometheus/latest/configuration/configuration/#kubernetes_sd_config
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tests.operator.conftest import Kubectl

_META = "__meta_kubernetes_"
Body = dict[str, Any]


def resolved(kubectl: Kubectl, configuration: Body) -> Body:
    """The configuration with what its discovery finds now in its stead; and with what the
    reloader beside a Prometheus would have filled in.
    """
    text = json.dumps(configuration).replace("$(SHARD)", "0").replace("$(POD_NAME)", "test-0")
    found: Body = json.loads(text)
    for job in found["scrape_configs"]:
        (sought,) = job.pop("kubernetes_sd_configs")
        look = {"pod": _pods, "endpoints": _endpoints}[sought["role"]]
        job["static_configs"] = [
            group for name in sought["namespaces"]["names"] for group in look(kubectl, name)
        ]
    return found


def _pods(kubectl: Kubectl, namespace: str) -> Iterator[Body]:
    for pod in _listed(kubectl, "pods", namespace):
        for container in pod["spec"]["containers"]:
            for port in container.get("ports", ()):
                if address := pod["status"].get("podIP"):
                    labels = {
                        **_of_pod(pod),
                        "pod_container_name": container["name"],
                        "pod_container_port_name": port.get("name", ""),
                        "pod_container_port_number": str(port["containerPort"]),
                    }
                    yield _group(address, port["containerPort"], labels)


def _endpoints(kubectl: Kubectl, namespace: str) -> Iterator[Body]:
    services = {body["metadata"]["name"]: body for body in _listed(kubectl, "services", namespace)}
    pods = {body["metadata"]["name"]: body for body in _listed(kubectl, "pods", namespace)}
    for endpoints in _listed(kubectl, "endpoints", namespace):
        service = services[endpoints["metadata"]["name"]]
        for subset in endpoints.get("subsets", ()):
            for address in subset.get("addresses", ()):
                pod = pods[address["targetRef"]["name"]]
                for port in subset["ports"]:
                    labels = {
                        **_of_pod(pod),
                        **_labelled("service", service),
                        "service_name": service["metadata"]["name"],
                        "endpoint_port_name": port["name"],
                        "endpoint_address_target_kind": "Pod",
                        "endpoint_address_target_name": pod["metadata"]["name"],
                    }
                    yield _group(address["ip"], port["port"], labels)


def _of_pod(pod: Body) -> dict[str, str]:
    return {
        **_labelled("pod", pod),
        "namespace": pod["metadata"]["namespace"],
        "pod_name": pod["metadata"]["name"],
        "pod_phase": pod["status"]["phase"],
    }


def _labelled(what: str, body: Body) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in body["metadata"].get("labels", {}).items():
        name = re.sub(r"[^a-zA-Z0-9_]", "_", key)
        found |= {f"{what}_label_{name}": value, f"{what}_labelpresent_{name}": "true"}
    return found


def _group(address: str, port: int, labels: dict[str, str]) -> Body:
    return {
        "targets": [f"{address}:{port}"],
        "labels": {f"{_META}{name}": value for name, value in labels.items()},
    }


def _listed(kubectl: Kubectl, what: str, namespace: str) -> list[Body]:
    return list(json.loads(kubectl("get", what, "-n", namespace, "-o", "json"))["items"])
