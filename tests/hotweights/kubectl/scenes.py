"""Objects of a cluster as the API server sends them: small, and each as a user may meet it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from hotweights.kubectl.views import snapshot
from hotweights.kubectl.views.snapshot import Snapshot

Body = dict[str, Any]
NOW = datetime(2026, 11, 22, 12, 10, tzinfo=UTC)
START = "2026-11-22T11:00:00Z"
SIZE = 5 * 1024**2


def digest(name: str) -> str:
    """Of a version, by its name."""
    return "sha256:" + name.encode().hex().ljust(64, "0")


def named(version: str) -> Body:
    """A version as a rollout's status knows it."""
    return {"name": f"tiny-{version}", "version": version, "digest": digest(version)}


def condition(kind: str, status: str, reason: str, message: str = "") -> Body:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": START,
    }


def rollout(spec: Body | None = None, status: Body | None = None, **metadata: Any) -> Body:
    """A WeightRollout on its way from v1 to v2."""
    return {
        "apiVersion": "hotweights.dev/v1alpha1",
        "kind": "WeightRollout",
        "metadata": {
            "name": "tiny",
            "namespace": "models",
            "uid": "rollout-1",
            "generation": 2,
            "resourceVersion": "1",
            "creationTimestamp": START,
            **metadata,
        },
        "spec": {
            "versionRef": {"name": "tiny-v2"},
            "target": {"selector": {"matchLabels": {"app": "tiny"}}},
            **(spec or {}),
        },
        "status": {
            "observedGeneration": 2,
            "phase": "Activating",
            "message": "1 of 3 pods serve v2, 1 of them are Ready",
            "revision": 2,
            "revisionStartedAt": "2026-11-22T12:07:00Z",
            "target": named("v2"),
            "stable": named("v1"),
            "previous": named("v1"),
            "pods": {"desired": 3, "prepared": 3, "updated": 1, "ready": 1, "available": 3},
            "nodes": {"desired": 2, "staged": 2, "summary": "2/2"},
            "nbytes": {"total": 2 * SIZE, "done": 2 * SIZE},
            **(status or {}),
        },
    }


CANARY: Body = {
    "strategy": {"canary": {"steps": [{"setReplicas": 1}, {"pause": {}}, {"setReplicas": "50%"}]}}
}
WAITS: Body = {
    "phase": "Paused",
    "message": "step 2 of 3: waits for a promotion; 1 of 3 pods serve v2",
    "canary": {
        "step": 1,
        "steps": 3,
        "stepStartedAt": "2026-11-22T12:08:00Z",
        "allowed": 1,
        "waitsFor": "Promotion",
    },
}


def version(name: str = "v2", status: Body | None = None) -> Body:
    """A WeightVersion that is resolved."""
    return {
        "apiVersion": "hotweights.dev/v1alpha1",
        "kind": "WeightVersion",
        "metadata": {
            "name": f"tiny-{name}",
            "namespace": "models",
            "uid": f"version-{name}",
            "generation": 1,
            "resourceVersion": "1",
            "creationTimestamp": START,
        },
        "spec": {"model": "tiny", "version": name, "source": {"uri": f"file:///models/{name}"}},
        "status": {
            "digest": digest(name),
            "nbytes": SIZE,
            "conditions": [
                condition("Resolved", "True", "Resolved"),
                condition("Ready", "True", "Resolved"),
            ],
        }
        if status is None
        else status,
    }


def pod(name: str, node: str, version: str = "v1", **metadata: Any) -> Body:
    """An opted-in pod that is Ready."""
    labels = {
        "app": "tiny",
        "hotweights.dev/inject": "true",
        "hotweights.dev/version": version,
        "hotweights.dev/digest": digest(version).removeprefix("sha256:")[:16],
    }
    ready = {"status": "True", "lastTransitionTime": "2026-11-22T11:05:00Z"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "models",
            "uid": f"uid-{name}",
            "labels": labels,
            **metadata,
        },
        "spec": {
            "nodeName": node,
            "readinessGates": [{"conditionType": "hotweights.dev/weights"}],
            "containers": [{"name": "vllm", "env": [{"name": "HOTWEIGHTS_SOCKET", "value": "x"}]}],
        },
        "status": {
            "phase": "Running",
            "conditions": [
                {"type": "Ready", **ready},
                {"type": "hotweights.dev/weights", **ready},
            ],
            "containerStatuses": [
                {"name": "vllm", "restartCount": 0, "state": {"running": {"startedAt": START}}}
            ],
        },
    }


def engine(name: str, version: str, **more: Any) -> Body:
    """What an agent says of a pod's engine."""
    return {
        "podUID": f"uid-{name}",
        "pod": f"models/{name}",
        "phase": "Serving",
        "digest": digest(version),
        "version": version,
        "probe": "Golden",
        "kind": "vllm 0.32 cpu float32",
        "confirmedAt": "2026-11-22T12:07:30Z",
        "pauseSeconds": 0.059,
        "token": 2,
        **more,
    }


def told(name: str, version: str, prepare: str = "") -> Body:
    """What the operator told a pod."""
    return {
        "uid": f"uid-{name}",
        "name": name,
        "namespace": "models",
        "token": 2,
        "rollout": "rollout-1",
        "revision": 2,
        "digest": digest(version),
        "version": version,
        "prepare": digest(prepare) if prepare else "",
    }


def staged(version: str, **more: Any) -> Body:
    """A version that a node holds."""
    return {
        "digest": digest(version),
        "version": version,
        "phase": "Staged",
        "bytesDone": SIZE,
        "bytesTotal": SIZE,
        "bytesFetched": SIZE,
        "seconds": 0.5,
        **more,
    }


def node_weights(
    name: str, orders: list[Body], engines: list[Body], held: list[Body] | None = None
) -> Body:
    """A NodeWeights whose agent follows."""
    held = [staged("v1"), staged("v2")] if held is None else held
    stage = [
        {
            "digest": item["digest"],
            "namespace": "models",
            "version": item["version"],
            "uri": f"file:///models/{item['version']}",
        }
        for item in held
    ]
    entry = {"uid": "rollout-1", "namespace": "models", "name": "tiny", "pods": orders}
    return {
        "apiVersion": "hotweights.dev/v1alpha1",
        "kind": "NodeWeights",
        "metadata": {
            "name": name,
            "namespace": "hotweights-system",
            "uid": f"nw-{name}",
            "generation": 3,
            "resourceVersion": "1",
        },
        "spec": {"nodeName": name, "rollouts": [{**entry, "stage": stage}]},
        "status": {
            "observedGeneration": 3,
            "bootID": "boot",
            "agentVersion": "0.1.0",
            "endpoint": f"tcp://{name}:7600",
            "capacity": {"memoryBytes": 100 * SIZE, "freeBytes": 50 * SIZE},
            "staged": held,
            "engines": engines,
        },
    }


def node(name: str, zone: str = "", ready: bool = True) -> Body:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "uid": f"node-{name}",
            "labels": {"topology.kubernetes.io/zone": zone} if zone else {},
        },
        "status": {"conditions": [{"type": "Ready", "status": "True" if ready else "False"}]},
    }


def agent(name: str, ready: bool = True) -> Body:
    """The agent's pod of a node."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"hotweights-agent-{name}",
            "namespace": "hotweights-system",
            "uid": f"agent-{name}",
            "labels": {
                "app.kubernetes.io/name": "hotweights",
                "app.kubernetes.io/component": "agent",
                "app.kubernetes.io/version": "0.1.0",
            },
        },
        "spec": {"nodeName": name},
        "status": {"conditions": [{"type": "Ready", "status": "True" if ready else "False"}]},
    }


def fleet(rollout_: Body | None = None) -> dict[str, list[Body] | None]:
    """Three pods on two nodes, in the middle of a rollout: one has changed, one has prepared, one
    has refused.
    """
    refused = {
        "phase": "Refused",
        "reason": "ShapeMismatch",
        "message": "lm_head.weight is (2, 3), the model has (2, 4)",
        "failed": {
            "digest": digest("v2"),
            "rollout": "rollout-1",
            "revision": 2,
            "token": 2,
            "step": "Prepare",
            "reason": "ShapeMismatch",
            "message": "lm_head.weight is (2, 3), the model has (2, 4)",
        },
    }
    return {
        "rollout": [rollout_ or rollout()],
        "version": [version("v1"), version("v2")],
        "pod": [
            pod("tiny-a", "node-0", "v2"),
            pod("tiny-b", "node-0"),
            pod("tiny-c", "node-1"),
        ],
        "state": [
            node_weights(
                "node-0",
                [told("tiny-a", "v2"), told("tiny-b", "v1", "v2")],
                [
                    engine("tiny-a", "v2"),
                    engine("tiny-b", "v1", phase="Prepared", prepared=digest("v2"), way="Beside"),
                ],
            ),
            node_weights(
                "node-1",
                [told("tiny-c", "v1", "v2")],
                [engine("tiny-c", "v1", **refused)],
            ),
        ],
        "node": [node("node-0", "a"), node("node-1", "b")],
        "agent": [agent("node-0"), agent("node-1")],
    }


def snap(bodies: dict[str, list[Body] | None] | None = None) -> Snapshot:
    """All of it, as it is at `NOW`."""
    return snapshot.parse(bodies or fleet(), NOW)
