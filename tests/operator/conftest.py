"""A real API server with our CRDs, the operator as a real process, and nodes whose agents and
kubelets are a few lines here.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from hotweights_crds.base import digest_label
from hotweights_crds.conditions import find
from hotweights_crds.nodeweights import NodeWeightsSpec
from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_kube import (
    NODE_WEIGHTS,
    NODES,
    PODS,
    WEIGHT_ROLLOUTS,
    WEIGHT_VERSIONS,
    AlreadyExists,
    Api,
    Invalid,
    KubeError,
    NotFound,
)
from hotweights_kube.resources import NAMESPACES, Resource
from localcluster import binaries
from localcluster.controlplane import ControlPlane
from tests.ports import free_ports
from tests.rights import wait_for_right

ROOT = Path(__file__).parents[2]
Body = dict[str, Any]
_numbers = itertools.count()
SERVICE_ACCOUNTS = Resource("v1", "ServiceAccount", "serviceaccounts")


class Refused(Exception):
    """kubectl failed; the message is what it printed."""


class Kubectl:
    """kubectl as the admin."""

    def __init__(self, kubeconfig: Path) -> None:
        self._program = binaries.ensure(["kubectl"])["kubectl"]
        self._kubeconfig = kubeconfig

    def __call__(self, *words: str | Path, text: str = "") -> str:
        """What it prints; `Refused` with what it complains about."""
        command = [self._program, f"--kubeconfig={self._kubeconfig}", *words]
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=150, check=False
        )
        if done.returncode:
            raise Refused(done.stderr)
        return done.stdout

    def apply(self, body: Body) -> str:
        """As users do."""
        return self("apply", "-f", "-", text=json.dumps(body))


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    # No kubelet reports here: after some silence, as after an outage of the API server, it would
    # take the nodes for dead and have their pods not Ready, and nobody would ever say otherwise.
    without = ["--controllers=-node-lifecycle-controller"]
    with ControlPlane(controller_manager_arguments=without) as plane:
        yield plane


@pytest.fixture(scope="session")
def kubectl(control_plane: ControlPlane) -> Kubectl:
    """With our CRDs installed, and served: discovery learns of them after they are Established."""
    admin = Kubectl(control_plane.kubeconfig)
    admin("apply", *(f"-f{path}" for path in sorted((ROOT / "crds").glob("*.yaml"))))
    admin("wait", "--for=condition=Established", "crd", "--all", "--timeout=90s")
    end = time.monotonic() + 60
    while True:
        try:
            admin("get", "weightversions,weightrollouts,nodeweights", "--all-namespaces")
            admin("explain", "weightrollout.spec", "--recursive=false")
        except Refused:
            if time.monotonic() > end:
                raise
        else:
            return admin


@pytest_asyncio.fixture
async def api(control_plane: ControlPlane, kubectl: Kubectl) -> AsyncIterator[Api]:
    async with await Api.connect(control_plane.kubeconfig, timeout_seconds=30) as api:
        yield api


class Engine:
    """What the agent of a test says about a pod's engine."""

    def __init__(self) -> None:
        self.phase, self.digest, self.prepared, self.token, self.confirmed_at = (
            "Serving",
            "",
            "",
            0,
            "",
        )
        self.refused, self.revision = "", 0


class FakeNode:
    """A node with its kubelet and agent; the objects are real, what they do is what a status
    says.
    """

    def __init__(self, scene: Scene, name: str) -> None:
        self.scene, self.name = scene, name
        self.engines: dict[str, Engine] = {}
        self.refuses: set[str] = set()  # digests that engines refuse
        self.contents: dict[str, str] = scene.contents

    async def create(self) -> None:
        """The Node, Ready, and the agent's pod, Ready."""
        await self.scene.api.create(
            NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": self.name}}
        )
        await self._beat()
        await self.scene.pod(
            f"agent-{self.name}",
            self.name,
            {"app.kubernetes.io/name": "hotweights", "app.kubernetes.io/component": "agent"},
            namespace=self.scene.system,
        )

    async def _beat(self) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        condition = {"type": "Ready", "status": "True", "reason": "Test", "lastHeartbeatTime": now}
        await self.scene.api.merge_patch(
            NODES, self.name, {"status": {"conditions": [condition]}}, subresource="status"
        )

    async def run(self) -> None:
        """Follow the spec, for ever."""
        for turn in itertools.count():
            await asyncio.sleep(0.1)
            try:
                if turn % 50 == 0:
                    await self._beat()
                await self._follow()
            except Invalid:
                raise  # this is nothing that an agent or a kubelet would write
            except KubeError as error:
                self.scene.troubles.append(f"{self.name}: {error}")
                await asyncio.sleep(0.5)

    async def _follow(self) -> None:
        try:
            body = await self.scene.api.get(NODE_WEIGHTS, self.name, self.scene.system)
        except NotFound:
            return
        spec = NodeWeightsSpec.from_dict(body["spec"])
        staged = {item.digest for entry in spec.rollouts for item in entry.stage}
        pods: dict[str, Any] = {}
        for order in (pod for entry in spec.rollouts for pod in entry.pods):
            if order.uid not in pods or order.token > pods[order.uid].token:
                pods[order.uid] = order
        for order in pods.values():
            await self._steer(order, staged)
        status = {
            "observedGeneration": body["metadata"]["generation"],
            "bootID": "boot",
            "endpoint": f"tcp://{self.name}:1",
            "staged": [
                {"digest": d, "phase": "Staged", "bytesDone": 10, "bytesTotal": 10}
                for d in sorted(staged)
            ],
            "engines": [self._report(uid) for uid in sorted(self.engines)],
            "resolved": [
                {
                    "uid": item.uid,
                    "digest": self.contents[item.uri],
                    "nbytes": 10,
                    "tensors": 1,
                    "chunks": 1,
                }
                for item in spec.resolve
            ],
        }
        if body.get("status") != status:
            await self.scene.api.merge_patch(
                NODE_WEIGHTS,
                self.name,
                {"status": status},
                namespace=self.scene.system,
                subresource="status",
            )

    async def _steer(self, order: Any, staged: set[str]) -> None:
        engine = self.engines.setdefault(order.uid, Engine())
        if order.token < engine.token:
            return
        # an order to serve what is served is answered too: where an operator sees a pod's life later
        # than what was confirmed in it, it asks once more
        asked_again = order.token > engine.token and order.digest == engine.digest != ""
        engine.token = order.token
        goal = order.digest if order.digest not in ("", engine.digest) else order.prepare
        engine.phase = "Serving"
        if goal and goal in self.refuses and goal != engine.digest:
            engine.phase, engine.refused, engine.revision = "Refused", goal, order.revision
        elif goal in staged and engine.prepared != goal:
            engine.phase, engine.prepared = "Prepared", goal
        elif goal and goal == order.digest and goal in staged and self.scene.may_switch():
            engine.digest, engine.confirmed_at = goal, _in_a_second()
        elif asked_again:
            engine.confirmed_at = _in_a_second()
        await self.scene.set_ready(order.name, order.digest in ("", engine.digest), engine.digest)

    def _report(self, uid: str) -> Body:
        engine = self.engines[uid]
        refused: Body = {
            "reason": "ShapeMismatch",
            "message": "lm_head.weight is (2, 3), the model has (2, 4)",
        }
        refused["failed"] = {
            "step": "Prepare",
            "digest": engine.refused,
            "revision": engine.revision,
            **refused,
        }
        return {
            "podUID": uid,
            "phase": engine.phase,
            "digest": engine.digest,
            "prepared": engine.prepared,
            "token": engine.token,
            "confirmedAt": engine.confirmed_at,
            **(refused if engine.phase == "Refused" else {}),
        }


def _in_a_second() -> str:
    return (datetime.now(UTC) + timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Scene:
    """Namespaces, nodes and pods of one test, and the operator's process."""

    def __init__(self, api: Api, kubectl: Kubectl, kubeconfig: Path, folder: Path) -> None:
        number = next(_numbers)
        self.api, self.kubectl, self.kubeconfig, self.folder = api, kubectl, kubeconfig, folder
        self.namespace, self.system = f"models-{number}", f"system-{number}"
        self.contents: dict[str, str] = {}
        self.nodes: dict[str, FakeNode] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.tasks: list[asyncio.Task[None]] = []
        self.shown: dict[str, tuple[bool, str]] = {}
        self.switches_left = math.inf  # so many engines switch, the next ones wait
        self.health_port = free_ports()[0]
        self.troubles: list[str] = []
        self._prefix = f"n{number}"

    def may_switch(self) -> bool:
        """Whether one more engine switches."""
        may = self.switches_left > 0
        self.switches_left -= may
        return may

    async def set_up(self, nodes: int = 2) -> None:
        """Namespaces and nodes."""
        for name in (self.namespace, self.system):
            await self.api.create(
                NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            )
            # its controller is slow after an outage
            account = {"metadata": {"name": "default", "namespace": name}}
            with contextlib.suppress(AlreadyExists):
                await self.api.create(SERVICE_ACCOUNTS, account)
        for index in range(nodes):
            node = FakeNode(self, f"{self._prefix}-{index}")
            self.nodes[node.name] = node
            await node.create()
            self.tasks.append(asyncio.create_task(node.run()))

    async def pod(self, name: str, node: str, labels: dict[str, str], namespace: str = "") -> Body:
        """A pod that runs."""
        namespace = namespace or self.namespace
        body: Body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": labels},
            "spec": {
                "nodeName": node,
                "automountServiceAccountToken": False,
                "tolerations": [{"operator": "Exists"}],
                "containers": [{"name": "main", "image": "none"}],
            },
        }
        await eventually(lambda: self._created(body), "the pod is taken")
        started = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        container = {
            "name": "main",
            "ready": True,
            "restartCount": 0,
            "image": "none",
            "imageID": "",
            "state": {"running": {"startedAt": started}},
        }
        status = {
            "phase": "Running",
            "containerStatuses": [container],
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        return await self.api.merge_patch(
            PODS, name, {"status": status}, namespace=namespace, subresource="status"
        )

    async def _created(self, body: Body) -> bool:
        try:
            await self.api.create(PODS, body)
        except KubeError:  # its service account is still being made
            return False
        return True

    async def engine_pod(self, index: int, node: int = 0) -> Body:
        """An opted-in pod on one of the nodes."""
        labels = {"app": "llm", "hotweights.dev/inject": "true"}
        body = await self.pod(f"llm-{index}", f"{self._prefix}-{node}", labels)
        self.nodes[f"{self._prefix}-{node}"].engines[body["metadata"]["uid"]] = Engine()
        return body

    async def set_ready(self, pod: str, ready: bool, digest: str) -> None:
        """What an agent and a kubelet would say, when it changes: labels and gate, and then
        Ready.
        """
        if self.shown.get(pod) == (ready, digest):
            return
        labels = {"hotweights.dev/digest": digest_label(digest) or None}
        await self.api.merge_patch(
            PODS, pod, {"metadata": {"labels": labels}}, namespace=self.namespace
        )
        status = "True" if ready else "False"
        conditions = [
            {"type": type_, "status": status} for type_ in ("hotweights.dev/weights", "Ready")
        ]
        await self.api.merge_patch(
            PODS,
            pod,
            {"status": {"conditions": conditions}},
            namespace=self.namespace,
            subresource="status",
        )
        self.shown[pod] = (ready, digest)

    async def version(self, name: str) -> None:
        """A WeightVersion."""
        uri = f"file:///models/{name}"
        self.contents[uri] = "sha256:" + f"{sum(map(ord, name)):064x}"
        body = {
            "apiVersion": WEIGHT_VERSIONS.api_version,
            "kind": "WeightVersion",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {"model": "tiny", "version": name, "source": {"uri": uri}},
        }
        await self.api.create(WEIGHT_VERSIONS, body)

    def rollout(self, version: str, **spec: Any) -> Body:
        """A WeightRollout, as users write it."""
        return {
            "apiVersion": WEIGHT_ROLLOUTS.api_version,
            "kind": "WeightRollout",
            "metadata": {"name": "llm", "namespace": self.namespace},
            "spec": {
                "versionRef": {"name": version},
                "target": {"selector": {"matchLabels": {"app": "llm"}}},
                **spec,
            },
        }

    async def status(self) -> WeightRolloutStatus:
        """The rollout's."""
        body = await self.api.get(WEIGHT_ROLLOUTS, "llm", self.namespace)
        return WeightRolloutStatus.from_dict(body.get("status") or {})

    async def reaches(
        self, condition: str, reason: str = "", seconds: float = 150.0
    ) -> WeightRolloutStatus:
        """Wait until a condition is True (with this reason); the status then."""
        found: list[WeightRolloutStatus] = []

        async def holds() -> bool:
            status = await self.status()
            held = find(status.conditions, condition)
            found[:] = [status]
            generation = (await self.api.get(WEIGHT_ROLLOUTS, "llm", self.namespace))["metadata"][
                "generation"
            ]
            current = status.observed_generation == generation
            return (
                held is not None
                and held.status == "True"
                and current
                and reason in ("", held.reason)
            )

        await eventually(
            holds,
            f"{condition} {reason}",
            seconds,
            lambda: f"{found}\n{self.log()}\n{self.troubles[-5:]}\n{self.ended()}",
        )
        return found[0]

    def ended(self) -> list[BaseException | None]:
        """Of the nodes that do not follow any more: why."""
        return [task.exception() for task in self.tasks if task.done() and not task.cancelled()]

    def start_operator(self, kubeconfig: Path | None = None) -> None:
        """As a process: for this test's namespace as the admin, or for all namespaces as somebody
        else.
        """
        log = (self.folder / "operator.log").open("ab")
        watched = [] if kubeconfig else [f"--watch-namespace={self.namespace}"]
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "hotweights_operator", f"--namespace={self.system}",
                *watched, "--metrics-port=0", f"--health-port={self.health_port}",
            ],
            env={**os.environ, "KUBECONFIG": str(kubeconfig or self.kubeconfig), "POD_NAME": "operator"},
            stdout=log,
            stderr=log,
        )  # fmt: skip
        log.close()

    async def grant(self) -> str:
        """What the chart lets the operator do, for all namespaces; the objects, to take the rights
        away again. The account is not among them: without it the token is nobody's.
        """
        helm = str(binaries.ensure(["helm"])["helm"])
        words = [
            helm,
            "template",
            "hotweights",
            str(ROOT / "helm" / "hotweights"),
            "-n",
            self.system,
        ]
        rendered = await asyncio.to_thread(
            lambda: subprocess.check_output(words, text=True, timeout=60)
        )
        kinds = ("ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
        bodies = [body for body in yaml.safe_load_all(rendered) if body]
        account = [body for body in bodies if body["kind"] == "ServiceAccount"]
        rights = [body for body in bodies if body["kind"] in kinds]
        objects = yaml.dump_all(account + rights)
        await asyncio.to_thread(lambda: self.kubectl("apply", "-f", "-", text=objects))
        await self.has_rights(True)
        return yaml.dump_all(rights)

    async def has_rights(self, granted: bool) -> None:
        """Wait until the API server acts on it."""
        account = f"{self.system}:hotweights-operator"
        for kind, namespace in (("weightrollouts", ""), ("nodeweights", self.system)):
            await asyncio.to_thread(
                wait_for_right,
                self.kubectl,
                account,
                ("list", f"hotweights.dev/{kind}"),
                namespace=namespace,
                granted=granted,
            )

    def kill_operator(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def log(self) -> str:
        """The operator's last words."""
        path = self.folder / "operator.log"
        return path.read_text()[-6000:] if path.exists() else ""

    async def close(self) -> None:
        """End what was started. Raises what ended a node before: nothing followed there any more."""
        self.kill_operator()
        for task in self.tasks:
            task.cancel()
        ends = await asyncio.gather(*self.tasks, return_exceptions=True)
        for node in self.nodes:
            await self.api.delete(NODES, node)
        for name in (self.namespace, self.system):
            await self.api.delete(NAMESPACES, name)
        for end in ends:
            if not isinstance(end, asyncio.CancelledError):
                raise end or RuntimeError("a node ended by itself")


@pytest_asyncio.fixture
async def scene(
    api: Api, kubectl: Kubectl, control_plane: ControlPlane, tmp_path: Path
) -> AsyncIterator[Scene]:
    made = Scene(api, kubectl, control_plane.kubeconfig, tmp_path)
    yield made
    await made.close()


async def eventually(
    query: Callable[[], Awaitable[bool]],
    what: str,
    seconds: float = 60.0,
    details: Callable[[], str] = lambda: "",
) -> None:
    """Ask until it is so."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while loop.time() < end:
        try:
            if await query():
                return
        except KubeError:
            pass
        await asyncio.sleep(0.1)
    raise AssertionError(f"not within {seconds:.0f} s: {what}\n{details()}")
