"""The chart's rights held against the API server's audit log: operator and agents, with their own
service accounts, play two rollouts. Nothing that they ask for is refused, and a right that nobody
used has to give its reason here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from hotweights_kube import PODS, WEIGHT_ROLLOUTS, WEIGHT_VERSIONS, Api, KubeError
from hotweights_transports.handoff import frames, sockets
from localcluster import binaries
from localcluster.controlplane import ControlPlane
from tests.agent.fake_engine import FakeEngine
from tests.agent.kube.agent_process import AgentProcess
from tests.helm.conftest import (
    NAMESPACE,
    SOURCE,
    WITHOUT_KUBELETS,
    Body,
    Helm,
    Kubectl,
    wait_for_definitions,
    wait_for_policies,
)
from tests.rights import wait_for_right

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(600, func_only=True)]

TENANT = "models"
NODE_NAMES = ("audit-a", "audit-b")
GATE = "hotweights.dev/weights"
ACCOUNTS = {
    f"system:serviceaccount:{NAMESPACE}:hotweights-{part}": part for part in ("operator", "agent")
}
POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "users": list(ACCOUNTS)}, {"level": "None"}],
}


class Right(NamedTuple):
    """One verb on one resource, by one of ours."""

    part: str
    group: str
    resource: str
    verb: str


AGAIN = "the object is read again when a write to it was refused"
LATER = {
    Right("operator", "hotweights.dev", "weightversions", "get"): AGAIN,
    Right("operator", "hotweights.dev", "weightrollouts", "get"): AGAIN,
    Right("operator", "hotweights.dev", "nodeweights", "get"): AGAIN,
    Right("operator", "events.k8s.io", "events", "patch"): "the same is said of it again",
    Right("agent", "hotweights.dev", "nodeweights", "get"): (
        "it asks for its own after the API server was away, until there is an answer"
    ),
}
"""What these rollouts need not use, and when it is used."""


class Cluster:
    """The control plane with its audit log, the chart, and what a test plays on it."""

    def __init__(self, plane: ControlPlane, kubectl: Kubectl, log: Path) -> None:
        self.plane, self.kubectl, self.log = plane, kubectl, log
        self.pods: dict[str, Body] = {}

    def pod(self, name: str, namespace: str, labels: Mapping[str, str], **spec: object) -> None:
        body: Body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": dict(labels)},
            "spec": {"containers": [{"name": "vllm", "image": "i"}], **spec},
        }
        self.pods[name] = self.kubectl.create(body)
        running = {
            "name": "vllm",
            "ready": True,
            "restartCount": 0,
            "image": "i",
            "imageID": "",
            "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
        }
        status = {
            "phase": "Running",
            "podIP": "127.0.0.1",
            "podIPs": [{"ip": "127.0.0.1"}],
            "containerStatuses": [running],
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        self.kubectl.patch_status("pod", name, {"status": status}, "-n", namespace)

    def token(self, pod: str, audience: str = "") -> str:
        """As the kubelet would project it into that pod."""
        metadata, spec = self.pods[pod]["metadata"], self.pods[pod]["spec"]
        return self.plane.service_account_token(
            metadata["namespace"],
            spec["serviceAccountName"],
            audiences=[audience] if audience else [],
            bound_to={"kind": "Pod", "apiVersion": "v1", "name": pod, "uid": metadata["uid"]},
        )

    def rights(self) -> set[Right]:
        """Of operator and agents, as the chart's objects on the API server give them. Roles that
        are aggregated into view, edit and admin are people's: none of ours is bound to them.
        """
        found: set[Right] = set()
        roles = {
            (role["kind"], role["metadata"].get("namespace", ""), role["metadata"]["name"]): role
            for role in self.kubectl.get("clusterroles,roles", "-A")["items"]
        }
        for binding in self.kubectl.get("clusterrolebindings,rolebindings", "-A")["items"]:
            for subject in binding.get("subjects") or []:
                user = f"system:serviceaccount:{subject.get('namespace', '')}:{subject['name']}"
                if user not in ACCOUNTS:
                    continue
                reference = binding["roleRef"]
                namespace = binding["metadata"].get("namespace", "")
                place = namespace if reference["kind"] == "Role" else ""
                for rule in roles[reference["kind"], place, reference["name"]]["rules"]:
                    found |= {
                        Right(ACCOUNTS[user], group, resource, verb)
                        for group in rule["apiGroups"]
                        for resource in rule["resources"]
                        for verb in rule["verbs"]
                    }
        return found

    def audited(self) -> list[Body]:
        """What ours asked the API server for."""
        whole, _, _ = self.log.read_text().rpartition("\n")  # one may be being written
        return [json.loads(line) for line in whole.splitlines()]


def used(audited: list[Body]) -> set[Right]:
    """The rights that were used with success; what needs none (the API's own documents) is left
    out.
    """
    found = set()
    for event in audited:
        reference = event.get("objectRef", {})
        if "resource" in reference and event["responseStatus"]["code"] < 400:
            resource = "/".join(filter(None, (reference["resource"], reference.get("subresource"))))
            part = ACCOUNTS[event["user"]["username"]]
            found.add(Right(part, reference.get("apiGroup", ""), resource, event["verb"]))
    return found


@pytest.fixture(scope="module")
def cluster(helm: Helm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("audit")
    policy, log = folder / "policy.yaml", folder / "audit.log"
    policy.write_text(yaml.safe_dump(POLICY))
    arguments = [f"--audit-policy-file={policy}", f"--audit-log-path={log}"]
    # each line is there before its answer is
    arguments += ["--audit-log-mode=blocking", "--audit-log-format=json"]
    with ControlPlane(
        apiserver_arguments=arguments, controller_manager_arguments=WITHOUT_KUBELETS
    ) as plane:
        kubectl = Kubectl(binaries.ensure(["kubectl"])["kubectl"], plane.kubeconfig)
        helm.install(plane.kubeconfig, {"sources": [SOURCE]})
        wait_for_definitions(kubectl)
        wait_for_policies(kubectl)
        for account in ("operator", "agent"):
            name = f"{NAMESPACE}:hotweights-{account}"
            for kind in ("pods", "hotweights.dev/nodeweights"):  # by a cluster role, and by a role
                wait_for_right(kubectl, name, ("list", kind), namespace=NAMESPACE)
        kubectl("create", "namespace", TENANT)
        kubectl("create", "serviceaccount", "tenant", "-n", TENANT)
        found = Cluster(plane, kubectl, log)
        agents = {
            "app.kubernetes.io/name": "hotweights",
            "app.kubernetes.io/component": "agent",
        }
        engines = {"app": "llm", "hotweights.dev/inject": "true"}
        for node in NODE_NAMES:
            kubectl.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}})
            ready = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
            kubectl.patch_status("node", node, ready)
            of_node = {"nodeName": node, "tolerations": [{"operator": "Exists"}]}
            account = "hotweights-agent"
            found.pod(f"agent-{node}", NAMESPACE, agents, serviceAccountName=account, **of_node)
            found.pod(f"llm-{node}", TENANT, engines, serviceAccountName="tenant", **of_node)
        yield found


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """v1 and v2."""
    for number, version in enumerate(("v1", "v2")):
        (tmp_path / version).mkdir()
        save_file(
            {"w": np.full((64, 64), number, np.float32)},
            tmp_path / version / "model.safetensors",
        )
    return tmp_path


@pytest.fixture
def agents(cluster: Cluster, weights: Path) -> Iterator[dict[str, AgentProcess]]:
    settings = {
        "roots": [{"path": str(weights), "namespaces": [TENANT]}],
        "staging": {"reserve_bytes": 0},
        "engines": {"reconnect_seconds": 1.0},
    }
    started: dict[str, AgentProcess] = {}
    with tempfile.TemporaryDirectory(prefix="hw") as folder:
        for node in NODE_NAMES:
            token = partial(cluster.token, f"agent-{node}")
            place = Path(folder) / node[-1]
            started[node] = AgentProcess(cluster.plane, token, node, place, settings)
            started[node].start()
        yield started
        for agent in started.values():
            agent.stop()
            print(agent.log.read_text()[-4000:])


@pytest.fixture
def operator(cluster: Cluster, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    kubeconfig = cluster.plane.kubeconfig_for(NAMESPACE, "hotweights-operator")
    words = ("--metrics-port=0", "--health-port=0", f"--namespace={NAMESPACE}")
    log = tmp_path / "operator.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "hotweights_operator", *words],
            env={**os.environ, "KUBECONFIG": str(kubeconfig), "POD_NAME": "operator"},
            stdout=output,
            stderr=output,
        )
    yield process
    process.terminate()
    process.wait(60)
    print(log.read_text()[-4000:])


@pytest.fixture
async def admin(cluster: Cluster) -> AsyncIterator[Api]:
    async with await Api.connect(cluster.plane.kubeconfig, timeout_seconds=60) as api:
        yield api


async def eventually(look: Callable[[], Any], what: str, seconds: float = 180.0) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not await look():
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(f"it did not come about in time: {what}")
        await asyncio.sleep(0.1)


async def play_kubelets(admin: Api) -> None:
    """Ready follows the gate, for ever."""
    while True:
        for node in NODE_NAMES:
            with contextlib.suppress(KubeError):
                body = await admin.get(PODS, f"llm-{node}", TENANT)
                states = {c["type"]: c["status"] for c in body["status"]["conditions"]}
                gate = states.get(GATE, "False")
                if states.get("Ready") != gate:
                    status = {"conditions": [{"type": "Ready", "status": gate}]}
                    await admin.apply(
                        PODS,
                        {
                            "metadata": {"name": f"llm-{node}", "namespace": TENANT},
                            "status": status,
                        },
                        manager="kubelet",
                        subresource="status",
                    )
        await asyncio.sleep(0.1)


async def connected(agent: AgentProcess, token: str) -> FakeEngine:
    engine = FakeEngine(agent.socket, token)

    async def welcome() -> bool:
        try:
            return all(isinstance(said, frames.Welcome) for said in await engine.start())
        except (OSError, sockets.ConnectionClosed):
            await engine.stop()
            return False

    await eventually(welcome, "the agent listens")
    return engine


def assert_routes_name_keys(nodes: list[Body]) -> None:
    """Each as that node's agent shows it: so what was pulled here was pulled from who proved it."""
    shown = {body["metadata"]["name"]: body["status"]["peerKey"] for body in nodes}
    named = [
        (peer["node"], peer["key"])
        for body in nodes
        for entry in body["spec"]["rollouts"]
        for item in entry["stage"]
        for peer in item.get("parents", [])
    ]
    assert named
    assert all(shown[node] == key for node, key in named)


async def test_every_right_is_used_and_nothing_is_refused(
    cluster: Cluster,
    admin: Api,
    agents: dict[str, AgentProcess],
    operator: subprocess.Popen[bytes],
    weights: Path,
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        kubelets = asyncio.create_task(play_kubelets(admin))
        stack.callback(kubelets.cancel)
        for node, agent in agents.items():
            token = cluster.token(f"llm-{node}", "hotweights-agent")
            stack.push_async_callback((await connected(agent, token)).stop)
        for name in ("v1", "v2"):
            source = {"uri": f"file://{weights / name}"}
            spec: Body = {"model": "m", "version": name, "source": source}
            await admin.create(WEIGHT_VERSIONS, _object("WeightVersion", name, spec))
        spec = {
            "versionRef": {"name": "v1"},
            "target": {"selector": {"matchLabels": {"app": "llm"}}},
        }
        await admin.create(WEIGHT_ROLLOUTS, _object("WeightRollout", "llm", spec))

        async def complete(version: str) -> bool:
            status = (await admin.get(WEIGHT_ROLLOUTS, "llm", TENANT)).get("status", {})
            return bool(
                status.get("phase") == "Complete" and status["target"]["version"] == version
            )

        await eventually(partial(complete, "v1"), "v1 is complete")
        again = {"spec": {"versionRef": {"name": "v2"}}}
        await admin.merge_patch(WEIGHT_ROLLOUTS, "llm", again, namespace=TENANT)
        await eventually(partial(complete, "v2"), "v2 is complete")
        assert operator.poll() is None
    assert_routes_name_keys(cluster.kubectl.get("nodeweights", "-n", NAMESPACE)["items"])
    audited = cluster.audited()
    refused = [
        (event["user"]["username"], event["verb"], event["requestURI"])
        for event in audited
        if event["responseStatus"]["code"] in (401, 403)
    ]
    assert refused == []
    rights, seen = cluster.rights(), used(audited)
    assert {right.part for right in rights} == {"operator", "agent"}
    assert seen <= rights, "used by another right than the chart's"
    assert rights - seen <= LATER.keys(), "rights that nobody used; let them go, or say when"
    assert LATER.keys() <= rights, "what the chart does not give needs no reason"


def _object(kind: str, name: str, spec: Body) -> Body:
    return {
        "apiVersion": "hotweights.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": name, "namespace": TENANT},
        "spec": spec,
    }
