"""Agents as real processes, with the rights and policies of the chart, against a real API server;
engines are played.
"""

from __future__ import annotations

import asyncio
import re
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hotweights_kube import NODE_WEIGHTS, PODS, Api, Body, KubeError
from hotweights_storage.resolve import publish
from hotweights_storage.sources.file import open_folder
from hotweights_transports.handoff import frames, sockets
from localcluster.controlplane import ControlPlane
from tests.agent.fake_engine import FakeEngine, until
from tests.agent.kube.agent_process import AgentProcess
from tests.helm.conftest import NAMESPACE, Kubectl, control_plane, helm, kubectl

__all__ = ["control_plane", "helm", "kubectl"]

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(400, func_only=True)]

ACCOUNT = "hotweights-agent"
NODES = ("agent-test-a", "agent-test-b")
GATE = "hotweights.dev/weights"


def pod_body(name: str, node: str, namespace: str, account: str) -> Body:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": "vllm"}},
        "spec": {
            "nodeName": node,
            "serviceAccountName": account,
            "containers": [{"name": "c", "image": "i"}],
        },
    }


class Cluster:
    """The control plane with two nodes, an agent's pod and two engines' pods on each."""

    def __init__(self, plane: ControlPlane, kubectl: Kubectl) -> None:
        self.plane, self.kubectl = plane, kubectl
        self.pods: dict[str, Body] = {}
        for node in NODES:
            self.node = kubectl.create(
                {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}}
            )
            self.pods[f"agent-{node}"] = kubectl.create(
                pod_body(f"agent-{node}", node, NAMESPACE, ACCOUNT)
            )
            for number in (0, 1):
                name = f"vllm-{node}-{number}"
                self.pods[name] = kubectl.create(pod_body(name, node, "default", "default"))
            metadata = {"name": node, "namespace": NAMESPACE}
            kubectl.create(
                {
                    "apiVersion": "hotweights.dev/v1alpha1",
                    "kind": "NodeWeights",
                    "metadata": metadata,
                    "spec": {},
                }
            )

    def token(self, pod: str, audience: str = "") -> str:
        """As the kubelet would project it into that pod."""
        metadata = self.pods[pod]["metadata"]
        return self.plane.service_account_token(
            metadata["namespace"],
            self.pods[pod]["spec"]["serviceAccountName"],
            audiences=[audience] if audience else [],
            bound_to={"kind": "Pod", "apiVersion": "v1", "name": pod, "uid": metadata["uid"]},
        )

    def uid(self, pod: str) -> str:
        return str(self.pods[pod]["metadata"]["uid"])


@pytest.fixture(scope="module")
def cluster(control_plane: ControlPlane, kubectl: Kubectl) -> Cluster:
    return Cluster(control_plane, kubectl)


@pytest.fixture
async def admin(cluster: Cluster) -> AsyncIterator[Api]:
    async with await Api.connect(cluster.plane.kubeconfig) as api:
        yield api


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hw") as path:
        yield Path(path)


Launch = Callable[..., AgentProcess]


@pytest.fixture
def launch(cluster: Cluster, folder: Path, checkpoints: Path) -> Iterator[Launch]:
    started: list[AgentProcess] = []

    def start(node: str, **changes: object) -> AgentProcess:
        settings = {
            "roots": [{"path": str(checkpoints), "namespaces": ["default"]}],
            "staging": {"reserve_bytes": 0, "patience_seconds": 3.0},
            "engines": {"reconnect_seconds": 3.0},
            "kube": {"request_seconds": 3.0, "away_seconds": 1.0},
            **changes,
        }
        token = partial(cluster.token, f"agent-{node}")
        agent = AgentProcess(cluster.plane, token, node, folder / node[-1], settings)
        started.append(agent)
        agent.start()
        return agent

    yield start
    for agent in started:
        agent.stop(signal.SIGKILL)
        print(agent.log.read_text()[-6000:])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1 and v2 differ in one tensor; big is large enough to be interrupted."""
    root = tmp_path_factory.mktemp("weights")
    random = np.random.default_rng(0)
    base = {f"layer.{i}.w": random.random((512, 512), dtype=np.float32) for i in range(8)}
    for version in ("v1", "v2"):
        (root / version).mkdir()
        save_file(base, root / version / "model.safetensors")
        base = {**base, "layer.0.w": base["layer.0.w"] + 1}
    (root / "big").mkdir()
    big = {f"layer.{i}.w": random.random((4096, 2048), dtype=np.float32) for i in range(24)}
    save_file(big, root / "big" / "model.safetensors")
    return root


@pytest.fixture(scope="module")
def digests(checkpoints: Path) -> dict[str, str]:
    found = {}
    for version in ("v1", "v2", "big"):
        with open_folder(checkpoints / version) as source:
            found[version] = publish(source, "m", version).digest
    return found


class Operator:
    """Writes one node's spec, as the operator does."""

    def __init__(
        self, cluster: Cluster, admin: Api, checkpoints: Path, digests: dict[str, str], node: str
    ) -> None:
        self.cluster, self.admin, self.checkpoints, self.digests, self.node = (
            cluster,
            admin,
            checkpoints,
            digests,
            node,
        )

    def item(self, version: str, **changes: object) -> Body:
        uri = f"file://{self.checkpoints / version}"
        item = {
            "digest": self.digests[version],
            "namespace": "default",
            "model": "m",
            "version": version,
            "uri": uri,
        }
        return {**item, **changes}

    def pod(self, number: int, token: int, version: str = "", prepare: str = "") -> Body:
        name = f"vllm-{self.node}-{number}"
        return {
            "uid": self.cluster.uid(name),
            "name": name,
            "namespace": "default",
            "token": token,
            "digest": self.digests.get(version, ""),
            "version": version,
            "prepare": self.digests.get(prepare, ""),
        }

    async def write(
        self, stage: list[Body], pods: list[Body], resolve: list[Body] | None = None
    ) -> None:
        rollout = {"uid": "r", "namespace": "default", "name": "r", "stage": stage, "pods": pods}
        spec = {"rollouts": [rollout], "resolve": resolve or []}
        await self.admin.merge_patch(NODE_WEIGHTS, self.node, {"spec": spec}, namespace=NAMESPACE)

    async def forget(self) -> None:
        """Empty the node's status: what an earlier test's agent wrote last says nothing of the one
        that starts now.
        """
        patch: Body = {"status": None}
        await self.admin.merge_patch(
            NODE_WEIGHTS, self.node, patch, namespace=NAMESPACE, subresource="status"
        )

    async def status(self) -> Body:
        body = await self.admin.get(NODE_WEIGHTS, self.node, NAMESPACE)
        return dict(body.get("status") or {})

    async def staged(self, version: str) -> Body:
        """Its entry, once it is staged."""

        async def look() -> Any:
            entries = {s["digest"]: s for s in (await self.status()).get("staged", [])}
            found = entries.get(self.digests[version])
            return found if found and found["phase"] == "Staged" else None

        return dict(await eventually(look))

    async def engine(self, number: int, **wanted: object) -> Body:
        """Its entry, once it says all that."""
        uid = self.cluster.uid(f"vllm-{self.node}-{number}")

        async def look() -> Any:
            entries = {e["podUID"]: e for e in (await self.status()).get("engines", [])}
            found = entries.get(uid)
            return found if found and all(found.get(k) == v for k, v in wanted.items()) else None

        return dict(await eventually(look))

    async def shown(self, number: int, gate: str, version: str, reason: str = "") -> Body:
        """The pod's condition, once the pod shows this."""

        async def look() -> Any:
            body = await self.admin.get(PODS, f"vllm-{self.node}-{number}", "default")
            conditions = body.get("status", {}).get("conditions", [])
            found = next((c for c in conditions if c["type"] == GATE), None)
            labels = body["metadata"]["labels"]
            digest = self.digests.get(version, "")[7:23]
            right = (
                labels.get("hotweights.dev/version", ""),
                labels.get("hotweights.dev/digest", ""),
            ) == (
                version,
                digest,
            )
            return (
                found
                if found and found["status"] == gate and right and reason in ("", found["reason"])
                else None
            )

        return dict(await eventually(look))


async def eventually(look: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            found = await look()
        except KubeError:
            found = None
        if found:
            return found
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError("it did not come about in time")
        await asyncio.sleep(0.1)


@pytest.fixture
async def a(
    cluster: Cluster, admin: Api, checkpoints: Path, digests: dict[str, str]
) -> AsyncIterator[Operator]:
    operator = Operator(cluster, admin, checkpoints, digests, NODES[0])
    await operator.forget()
    yield operator
    await operator.write([], [])


@pytest.fixture
async def b(
    cluster: Cluster, admin: Api, checkpoints: Path, digests: dict[str, str]
) -> AsyncIterator[Operator]:
    operator = Operator(cluster, admin, checkpoints, digests, NODES[1])
    await operator.forget()
    yield operator
    await operator.write([], [])


async def answers_of(engine: FakeEngine) -> list[frames.Frame]:
    """The agent's answers to its processes, as soon as it listens and has its tokens reviewed."""

    async def look() -> list[frames.Frame] | None:
        try:
            answers = await engine.start()
        except (OSError, sockets.ConnectionClosed):
            answers = []
        if answers and "Busy" not in [getattr(answer, "reason", "") for answer in answers]:
            return answers
        await engine.stop()  # it is to connect again
        return None

    return list(await eventually(look))


async def connect(agent: AgentProcess, cluster: Cluster, pod: str, **changes: Any) -> FakeEngine:
    """An engine of that pod, which is welcome."""
    engine = FakeEngine(agent.socket, cluster.token(pod, "hotweights-agent"), **changes)
    answers = await answers_of(engine)
    assert all(isinstance(answer, frames.Welcome) for answer in answers), answers
    return engine


async def test_from_the_source_to_the_gate_and_back(
    cluster: Cluster, a: Operator, launch: Launch
) -> None:
    agent = launch(a.node)
    item = a.item("v1")
    resolve = {
        "uid": "w1",
        "name": "w1",
        **{k: item[k] for k in ("namespace", "model", "version", "uri")},
    }
    await a.write([], [], [resolve])

    async def resolved() -> Any:
        return (await a.status()).get("resolved")

    assert [r["digest"] for r in await eventually(resolved)] == [a.digests["v1"]]
    await a.write([item], [a.pod(0, 1, "v1")])
    engine = await connect(agent, cluster, f"vllm-{a.node}-0", world_size=2)
    await a.shown(0, "True", "v1")
    found = await a.engine(0, phase="Serving", digest=a.digests["v1"], token=1)
    assert found["pauseSeconds"] == 0.042
    assert engine.tables[a.digests["v1"]]["version"] == "v1"

    await a.write([item, a.item("v2")], [a.pod(0, 2, "v1", prepare="v2")])
    await a.engine(0, phase="Prepared", prepared=a.digests["v2"], digest=a.digests["v1"])
    await a.shown(0, "True", "v1")
    assert (await a.staged("v2"))["bytesFetched"] == 2**20, "one tensor of eight is new"
    await a.write([item, a.item("v2")], [a.pod(0, 3, "v2")])
    await a.shown(0, "True", "v2")
    await a.write([item, a.item("v2")], [a.pod(0, 4, "v1")])
    await a.shown(0, "True", "v1")
    assert [c.version for c in engine.commits] == ["v1", "v2", "v1"]
    await engine.stop()
    await a.shown(0, "False", "", "EngineNotConnected")
    assert 'hotweights_agent_commits_total{result="Committed"} 3.0' in agent.metrics()
    assert agent.stop() == 0


async def test_a_pod_without_a_version_keeps_what_it_booted(
    cluster: Cluster, a: Operator, launch: Launch
) -> None:
    agent = launch(a.node)
    await a.write([], [a.pod(1, 1)])
    engine = await connect(agent, cluster, f"vllm-{a.node}-1")
    assert "as assigned" in (await a.shown(1, "True", ""))["message"]
    assert (engine.keeps, engine.commits) == (1, [])
    await engine.stop()


async def test_a_node_pulls_from_its_parent_and_from_nobody_else(
    a: Operator, b: Operator, launch: Launch
) -> None:
    await b.write([], [])  # what the test before left there may be this very version
    launch(a.node)
    child = launch(b.node)
    await a.write([a.item("v1")], [])
    await a.staged("v1")
    told = await a.status()
    parent = {"node": a.node, "endpoint": told["endpoint"], "key": told["peerKey"]}

    async def key() -> str:  # a status that was emptied has the empty one
        return str((await b.status()).get("peerKey", ""))

    own = await eventually(key)
    assert own != told["peerKey"]

    async def refused() -> bool:
        return "it did not prove that it is the agent of this route" in child.log.read_text()

    # as if another pod had the parent's address by now
    wrong = {**parent, "key": own}
    await b.write([b.item("v1", uri="file:///nowhere", parents=[wrong])], [])
    await eventually(refused)
    await b.write([b.item("v1", uri="file:///nowhere", parents=[parent])], [])
    found = await b.staged("v1")
    assert found["bytesFetched"] == found["bytesTotal"] == 8 * 2**20
    fetched = re.search(
        r'hotweights_agent_fetched_bytes_total\{transport="tcp"\} (\S+)', child.metrics()
    )
    assert fetched is not None
    assert float(fetched[1]) == 8 * 2**20


async def test_pods_of_other_nodes_and_other_tokens_are_refused(
    cluster: Cluster, a: Operator, launch: Launch
) -> None:
    agent = launch(a.node)
    engine = await connect(agent, cluster, f"vllm-{a.node}-0")
    await engine.stop()
    tokens = {
        "NotThisNode": cluster.token(f"vllm-{NODES[1]}-0", "hotweights-agent"),
        "TokenInvalid": cluster.token(f"vllm-{a.node}-0"),
    }
    for reason, token in tokens.items():
        stranger = FakeEngine(agent.socket, token)
        answers = await answers_of(stranger)
        await stranger.stop()
        assert [getattr(answer, "reason", "") for answer in answers] == [reason, reason]


async def test_an_agent_restarts_and_nothing_is_committed_anew(
    cluster: Cluster, a: Operator, launch: Launch
) -> None:
    agent = launch(a.node)
    await a.write([a.item("v1")], [a.pod(0, 11, "v1")])
    engine = await connect(agent, cluster, f"vllm-{a.node}-0")
    await a.shown(0, "True", "v1")
    await a.engine(0, phase="Serving", digest=a.digests["v1"])
    boot = (await a.status())["bootID"]
    agent.stop(signal.SIGKILL)
    await engine.stop()
    agent.start()
    again = await connect(
        agent, cluster, f"vllm-{a.node}-0", state="Serving", digest=a.digests["v1"], commit_token=11
    )

    async def restarted() -> Any:
        return (await a.status())["bootID"] != boot

    await eventually(restarted)
    await a.staged("v1")
    await a.engine(0, phase="Serving", digest=a.digests["v1"])
    await a.shown(0, "True", "v1")
    assert again.commits == []
    await again.stop()


async def test_sigkill_while_staging(a: Operator, launch: Launch) -> None:
    staging = {"reserve_bytes": 0, "patience_seconds": 3.0}
    slowly = staging | {"bandwidth_bytes_per_second": 8 << 20}  # it is not through before we look
    agent = launch(a.node, staging=slowly)
    await a.write([a.item("big")], [])

    async def fetching() -> Any:
        return [s for s in (await a.status()).get("staged", []) if s["phase"] == "Fetching"]

    async def another() -> Any:
        return (await a.status())["bootID"] != boot_id

    await eventually(fetching)
    boot_id = (await a.status())["bootID"]
    agent.stop(signal.SIGKILL)
    agent.configure(agent.settings | {"staging": staging})
    agent.start()
    await eventually(another)
    assert (await a.staged("big"))["bytesDone"] == 24 * 2**25


async def test_the_api_server_is_away_and_a_container_restarts(
    cluster: Cluster, a: Operator, launch: Launch
) -> None:
    agent = launch(a.node)
    await a.write([a.item("v1"), a.item("v2")], [a.pod(0, 21, "v2")])
    engine = await connect(agent, cluster, f"vllm-{a.node}-0")
    await a.shown(0, "True", "v2")
    token = engine.token
    cluster.plane.stop_apiserver()
    await asyncio.sleep(5)
    await engine.stop()
    restarted = FakeEngine(agent.socket, token)
    answers = await restarted.start()
    assert all(isinstance(answer, frames.Welcome) for answer in answers), "its token is still known"
    await until(lambda: bool(restarted.commits), 120.0)
    assert [c.digest for c in restarted.commits] == [a.digests["v2"]], (
        "it was told what to serve without the API server"
    )
    await asyncio.sleep(12)
    cluster.plane.start_apiserver()
    await a.shown(0, "True", "v2")
    await a.engine(0, phase="Serving", digest=a.digests["v2"])
    await a.write([a.item("v1"), a.item("v2")], [a.pod(0, 22, "v1")])
    await a.shown(0, "True", "v1")
    await restarted.stop()


PATIENT = {"mpi": True, "staging": {"reserve_bytes": 0, "patience_seconds": 20.0}}


async def together(a: Operator, b: Operator, version: str, name: str) -> None:
    """Tell both nodes to get the version by one broadcast, which ``a`` leads."""

    async def offered(node: Operator) -> Any:
        found = {one["scheme"]: one for one in (await node.status()).get("endpoints", [])}
        return found if found.get("mpi", {}).get("endpoint") else None

    await eventually(partial(offered, b))  # the head does not wait for one that still starts
    endpoints = await eventually(partial(offered, a))
    assert endpoints["mpi"]["megabytesPerSecond"] > 0, endpoints
    key = (await a.status())["peerKey"]
    job = {
        "name": name,
        "head": endpoints["mpi"]["endpoint"],
        "members": list(NODES),
        "headKey": key,
    }
    parent = {"node": a.node, "endpoint": endpoints["tcp"]["endpoint"], "key": key}
    await a.write([a.item(version, collective=job)], [])
    await b.write([b.item(version, collective=job, parents=[parent])], [])


async def test_a_broadcast_to_both(a: Operator, b: Operator, launch: Launch) -> None:
    agents = [launch(node, **PATIENT) for node in NODES]
    await together(a, b, "v1", "whole")
    for operator in (a, b):
        staged = await operator.staged("v1")
        assert staged["message"] == f"by a broadcast to 2 nodes, for which {a.node} read the source"
    assert re.search(r'fetched_bytes_total\{transport="mpi"\} [1-9]', agents[1].metrics())


@pytest.mark.parametrize("killed", [0, 1])
async def test_a_broadcast_that_loses_a_node(
    a: Operator, b: Operator, launch: Launch, killed: int
) -> None:
    agents = [launch(node, **PATIENT) for node in NODES]
    await together(a, b, "big", f"loses {killed}")
    victim = (a, b)[killed]

    async def flows() -> Any:
        return any(
            0 < staged["bytesDone"] < staged["bytesTotal"]
            for staged in (await b.status()).get("staged", [])
        )

    await eventually(flows)
    agents[killed].stop(signal.SIGKILL)
    agents[killed].start()
    other = await (b, a)[killed].staged("big")
    assert other["bytesDone"] == other["bytesTotal"]
    if victim is a:
        assert "the broadcast was lost" in other["message"]
    staged = await victim.staged("big")
    assert staged["bytesDone"] == staged["bytesTotal"]
    assert await (b, a)[killed].staged("big") == other, "what was staged stays"
