"""What an agent's real token can do on the real API server: its own node's affairs, and nothing
else.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from hotweights_kube.client import Api, Selection
from hotweights_kube.errors import Forbidden, Invalid, KubeError, TokenRefused
from hotweights_kube.resources import NODE_WEIGHTS, NODES, PODS, WEIGHT_VERSIONS, Resource
from hotweights_kube.token_review import review
from localcluster import paths
from localcluster.controlplane import ControlPlane
from tests.helm.conftest import NAMESPACE, Body, Kubectl
from tests.rights import wait_for_right

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(180, func_only=True)]

SECRETS = Resource("v1", "Secret", "secrets")
CONFIG_MAPS = Resource("v1", "ConfigMap", "configmaps")
ACCOUNT = "hotweights-agent"
GATE = {
    "type": "hotweights.dev/weights",
    "status": "True",
    "reason": "Serving",
    "lastTransitionTime": "2026-01-01T00:00:00Z",
}
READY = {**GATE, "type": "Ready"}
INJECT = "hotweights.dev/inject"
EVIL = [{"op": "replace", "path": "/spec/containers/0/image", "value": "evil"}]
MARKS = {"hotweights.dev/version": "v1", "hotweights.dev/digest": "0123456789abcdef"}


def pod(name: str, node: str, namespace: str = "default", **spec: object) -> Body:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"app": "x"},
            "annotations": {"note": "y"},
        },
        "spec": {"nodeName": node, "containers": [{"name": "vllm", "image": "good"}], **spec},
    }


@pytest.fixture(scope="module")
def nodes(kubectl: Kubectl) -> None:
    """Two nodes, each with its NodeWeights, an agent's pod and a vLLM pod."""
    for node in ("node-a", "node-b"):
        kubectl.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}})
        metadata = {"name": node, "namespace": NAMESPACE}
        kubectl.create(
            {
                "apiVersion": "hotweights.dev/v1alpha1",
                "kind": "NodeWeights",
                "metadata": metadata,
                "spec": {},
            }
        )
        kubectl.create(pod(f"agent-{node}", node, NAMESPACE, serviceAccountName=ACCOUNT))
        kubectl.create(pod(f"vllm-{node}", node))
        kubectl.patch_status(
            "pod",
            f"vllm-{node}",
            {
                "status": {
                    "phase": "Running",
                    "podIP": "10.0.0.1",
                    "conditions": [{**READY, "status": "False"}],
                }
            },
        )


def kubeconfig(plane: ControlPlane, token: str) -> Path:
    path = plane.state / f"{hashlib.sha256(token.encode()).hexdigest()}.kubeconfig"
    paths.write_atomically(path, plane.credentials.kubeconfig(plane.url, token), 0o600)
    return path


@pytest.fixture(scope="module")
def agent_kubeconfig(control_plane: ControlPlane, kubectl: Kubectl, nodes: None) -> Path:
    for right in (("list", "hotweights.dev/nodeweights"), ("list", "pods")):  # role, cluster role
        wait_for_right(kubectl, f"{NAMESPACE}:{ACCOUNT}", right, namespace=NAMESPACE)
    bound = ("--bound-object-kind=Pod", "--bound-object-name=agent-node-a")
    return kubeconfig(
        control_plane, kubectl("create", "token", ACCOUNT, "-n", NAMESPACE, *bound).strip()
    )


@pytest.fixture
async def agent(agent_kubeconfig: Path) -> AsyncIterator[Api]:
    """The agent of node-a, with a token as its pod has it."""
    async with await Api.connect(agent_kubeconfig, timeout_seconds=60) as api:
        yield api


@pytest.fixture
def with_every_right(kubectl: Kubectl) -> Iterator[None]:
    """Somebody has bound the agents to cluster-admin: the policy must hold them all the same."""
    kubectl(
        "create",
        "clusterrolebinding",
        "too-much",
        "--clusterrole=cluster-admin",
        f"--serviceaccount={NAMESPACE}:{ACCOUNT}",
    )
    wait_for_right(kubectl, f"{NAMESPACE}:{ACCOUNT}", ("delete", "secrets"))
    yield
    kubectl("delete", "clusterrolebinding", "too-much")
    wait_for_right(kubectl, f"{NAMESPACE}:{ACCOUNT}", ("delete", "secrets"), granted=False)


async def report(agent: Api, node: str) -> Body:
    return await agent.merge_patch(
        NODE_WEIGHTS, node, {"status": {"bootID": "1"}}, namespace=NAMESPACE, subresource="status"
    )


async def mark(agent: Api, labels: dict[str, str], status: str) -> Body:
    """Labels and the gate in one write; labels of an earlier one that are not named again go."""
    metadata = {"name": "vllm-node-a", "namespace": "default", "labels": labels}
    body = {"metadata": metadata, "status": {"conditions": [{**GATE, "status": status}]}}
    return await agent.apply(PODS, body, manager="hotweights-agent", subresource="status")


async def test_it_reports_its_own_node(agent: Api) -> None:
    await agent.get(NODE_WEIGHTS, "node-a", NAMESPACE)
    assert (await report(agent, "node-a"))["status"]["bootID"] == "1"


@pytest.mark.parametrize(
    ("status", "taken"),
    [
        ({"endpoint": "tcp://10.0.0.1:7600"}, True),
        ({"endpoint": "tcp://[fd00::1]:7600"}, True),
        ({"endpoints": [{"scheme": "ucx", "endpoint": ""}]}, True),
        ({"endpoint": "http://10.0.0.1:80/steal"}, False),
        ({"endpoint": "tcp://user@10.0.0.1:7600"}, False),
        ({"endpoints": [{"scheme": "tcp", "endpoint": "tcp://10.0.0.1:7600/x"}]}, False),
        ({"peerKey": "ed25519:" + "A" * 43 + "="}, True),
        ({"staged": [{"digest": "sha256:" + "a" * 64, "phase": "Staged"}]}, True),
        ({"staged": [{"digest": "anything", "phase": "Staged"}]}, False),
        ({"resolved": [{"uid": "u", "reason": "SourceNotFound"}]}, True),
        ({"resolved": [{"uid": "u", "digest": "sha256:short"}]}, False),
        ({"engines": [{"podUID": "u", "phase": "Serving", "token": 2**53 - 1}]}, True),
        ({"engines": [{"podUID": "u", "phase": "Serving", "token": 2**53}]}, False),
        ({"engines": [{"podUID": "u", "phase": "Serving", "token": -1}]}, False),
    ],
)
async def test_what_its_status_says_has_a_form(agent: Api, status: Body, taken: bool) -> None:
    empty = {
        "endpoint": "",
        "peerKey": "",
        "endpoints": [],
        "staged": [],
        "resolved": [],
        "engines": [],
    }
    patch = {"status": {**empty, **status}}
    write = agent.merge_patch(
        NODE_WEIGHTS, "node-a", patch, namespace=NAMESPACE, subresource="status"
    )
    if taken:
        await write
    else:
        with pytest.raises(Forbidden, match="an agent's endpoints are scheme://address:port"):
            await write


@pytest.mark.parametrize("key", ["ed25519:short", "rsa:" + "A" * 43 + "=", "A" * 70])
async def test_a_key_of_peers_that_is_none_is_refused(agent: Api, key: str) -> None:
    """By the schema before the policy: the operator would copy it into others' specs."""
    with pytest.raises(Invalid, match="peerKey"):
        await agent.merge_patch(
            NODE_WEIGHTS,
            "node-a",
            {"status": {"peerKey": key}},
            namespace=NAMESPACE,
            subresource="status",
        )


async def test_it_marks_its_own_pods_in_one_write_and_takes_the_marks_away(agent: Api) -> None:
    marked = await mark(agent, MARKS, "True")
    assert marked["metadata"]["labels"] == {"app": "x", **MARKS}
    assert [c["status"] for c in marked["status"]["conditions"] if c["type"] == GATE["type"]] == [
        "True"
    ]
    assert (await mark(agent, {}, "False"))["metadata"]["labels"] == {"app": "x"}


async def test_it_marks_by_merge_patch_too(agent: Api) -> None:
    (pod,) = (
        await agent.list(PODS, Selection("default", field_selector="metadata.name=vllm-node-a"))
    ).items
    conditions = pod["status"]["conditions"]
    others = [condition for condition in conditions if condition["type"] != GATE["type"]]
    patch = {"metadata": {"labels": MARKS}, "status": {"conditions": [*others, GATE]}}
    await agent.merge_patch(PODS, "vllm-node-a", patch, namespace="default", subresource="status")


async def test_it_reviews_tokens(agent: Api) -> None:
    with pytest.raises(TokenRefused):
        await review(agent, "nonsense", ["hotweights-agent"])


async def test_another_nodes_weights_are_refused(agent: Api) -> None:
    with pytest.raises(
        Forbidden, match="the agent of node node-a writes only the NodeWeights node-a"
    ):
        await report(agent, "node-b")


async def test_a_token_without_a_node_is_refused(
    control_plane: ControlPlane, kubectl: Kubectl, nodes: None
) -> None:
    loose = kubeconfig(control_plane, kubectl("create", "token", ACCOUNT, "-n", NAMESPACE).strip())
    async with await Api.connect(loose, timeout_seconds=60) as api:
        with pytest.raises(Forbidden, match="the token names no node"):
            await report(api, "node-a")


@pytest.mark.parametrize(
    ("node", "patch", "complaint"),
    [
        pytest.param(
            "node-b",
            {"metadata": {"labels": MARKS}},
            "does not run on node-a",
            id="another node's pod",
        ),
        pytest.param(
            "node-a", {"metadata": {"labels": {"app": "y"}}}, "no other label", id="foreign label"
        ),
        pytest.param(
            "node-a",
            {"metadata": {"labels": {"app": None}}},
            "no other label",
            id="foreign label removed",
        ),
        pytest.param(
            "node-a",
            {"metadata": {"labels": {"a": "b"}}},
            "no other label",
            id="foreign label added",
        ),
        pytest.param(
            "node-a",
            {"metadata": {"labels": {INJECT: "true"}}},
            "no other label",
            id="opting a pod in",
        ),
        pytest.param(
            "node-a",
            {"metadata": {"annotations": {"a": "b"}}},
            "nothing in a pod's metadata",
            id="annotation",
        ),
        pytest.param(
            "node-a",
            {"metadata": {"annotations": None}},
            "nothing in a pod's metadata",
            id="annotations removed",
        ),
        pytest.param(
            "node-a",
            {"metadata": {"finalizers": ["a.b/c"]}},
            "nothing in a pod's metadata",
            id="finalizer",
        ),
        pytest.param(
            "node-a", {"status": {"phase": "Failed"}}, "nothing in a pod's status", id="phase"
        ),
        pytest.param(
            "node-a", {"status": {"phase": None}}, "nothing in a pod's status", id="phase removed"
        ),
        pytest.param(
            "node-a", {"status": {"podIP": "10.9.9.9"}}, "nothing in a pod's status", id="address"
        ),
        pytest.param(
            "node-a",
            {"status": {"hostIP": "10.9.9.9"}},
            "nothing in a pod's status",
            id="field added",
        ),
        pytest.param(
            "node-a",
            {"status": {"conditions": [READY]}},
            "nothing in a pod's status",
            id="another condition",
        ),
        pytest.param(
            "node-a",
            {"status": {"conditions": None}},
            "nothing in a pod's status",
            id="conditions removed",
        ),
    ],
)
async def test_other_changes_of_a_pods_status_are_refused(
    agent: Api, node: str, patch: Body, complaint: str
) -> None:
    with pytest.raises(Forbidden, match=complaint):
        await agent.merge_patch(
            PODS, f"vllm-{node}", patch, namespace="default", subresource="status"
        )


async def test_a_spec_in_a_status_write_changes_nothing(agent: Api) -> None:
    """The API server itself drops it, without a word."""
    after = await agent.json_patch(
        PODS, "vllm-node-a", EVIL, namespace="default", subresource="status"
    )
    assert after["spec"]["containers"][0]["image"] == "good"


async def patch_image(agent: Api) -> None:
    await agent.json_patch(PODS, "vllm-node-a", EVIL, namespace="default")


async def patch_label(agent: Api) -> None:
    await agent.merge_patch(
        PODS, "vllm-node-a", {"metadata": {"labels": MARKS}}, namespace="default"
    )


async def delete_pod(agent: Api) -> None:
    await agent.delete(PODS, "vllm-node-a", namespace="default")


async def create_pod(agent: Api) -> None:
    await agent.create(PODS, pod("new", "node-a"))


async def assign_itself(agent: Api) -> None:
    await agent.merge_patch(NODE_WEIGHTS, "node-a", {"spec": {"rollouts": []}}, namespace=NAMESPACE)


async def delete_nodeweights(agent: Api) -> None:
    await agent.delete(NODE_WEIGHTS, "node-a", namespace=NAMESPACE)


OTHER_WRITES = [patch_image, patch_label, delete_pod, create_pod, assign_itself, delete_nodeweights]


@pytest.mark.parametrize("write", OTHER_WRITES)
async def test_other_writes_are_beyond_its_rights(
    agent: Api, write: Callable[[Api], Awaitable[None]]
) -> None:
    with pytest.raises(Forbidden, match=r"cannot (patch|delete|create)"):
        await write(agent)


@pytest.mark.parametrize("write", OTHER_WRITES)
async def test_other_writes_are_refused_even_with_every_right(
    agent: Api, with_every_right: None, write: Callable[[Api], Awaitable[None]]
) -> None:
    complaint = "an agent writes nothing but the status of its NodeWeights and of its node's pods"
    with pytest.raises(KubeError, match=complaint):
        await write(agent)


@pytest.mark.parametrize(
    ("resource", "namespace"),
    [
        (SECRETS, None),
        (SECRETS, NAMESPACE),
        (CONFIG_MAPS, NAMESPACE),
        (NODES, None),
        (WEIGHT_VERSIONS, None),
        (NODE_WEIGHTS, "default"),
    ],
    ids=lambda value: getattr(value, "plural", value or "all"),
)
async def test_what_it_has_no_business_with_it_cannot_read(
    agent: Api, resource: Resource, namespace: str | None
) -> None:
    with pytest.raises(Forbidden, match="cannot list"):
        await agent.list(resource, Selection(namespace))
