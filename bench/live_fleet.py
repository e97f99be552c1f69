"""The agents of `bench.fleet` on a real API server: nodes, pods and kubelets that are objects, and
one process that plays all of them over one watch.

Each step of an agent is one write of its node's status; around a commit the pod's gate closes and
opens with the labels, one write by the agent each time, and a kubelet follows with Ready. The
fleet's own writes are bounded (`WRITES`), so that it does not drown the API server in whose answers
the operator is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Coroutine, Iterable
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any

from bench.fleet import (
    ANSWER_SECONDS,
    DIGESTS,
    GATE,
    KUBELET_SECONDS,
    MODELS,
    SYSTEM,
    Agent,
    Engine,
    orders_of,
    stamp,
)
from hotweights_crds.base import digest_label
from hotweights_kube import (
    NODE_WEIGHTS,
    NODES,
    PODS,
    WEIGHT_ROLLOUTS,
    WEIGHT_VERSIONS,
    AlreadyExists,
    Api,
    Body,
    Conflict,
    Selection,
    watch,
)
from hotweights_kube.resources import NAMESPACES, Resource

WRITES = 32
SERVICE_ACCOUNTS = Resource("v1", "ServiceAccount", "serviceaccounts")
AGENT_LABELS = {"app.kubernetes.io/name": "hotweights", "app.kubernetes.io/component": "agent"}


class LiveFleet:
    """Nodes with one pod each, that serve what they booted until a rollout says otherwise."""

    def __init__(self, api: Api, nodes: int, seed: int = 0) -> None:
        self.api, self.size = api, nodes
        self.agents: dict[str, Agent] = {}
        self.moments: dict[tuple[str, str], list[float]] = {}
        """(told or served, digest) → when this was seen of each pod, by the event loop's clock."""
        self.written: Counter[str] = Counter()
        """Writes by who would have done them: agent, gate, kubelet."""
        self._draw = random.Random(seed)
        self._born = stamp(datetime.now(UTC) - timedelta(hours=1))
        self._gate = asyncio.Semaphore(WRITES)
        self._bodies: dict[str, Body] = {}
        self._seen: set[tuple[str, str, str]] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def set_up(self) -> None:
        """All objects but rollouts."""
        for name in (SYSTEM, MODELS):
            await self._made(NAMESPACES, {"metadata": {"name": name}})
            account = {"metadata": {"name": "default", "namespace": name}}
            await self._made(SERVICE_ACCOUNTS, account)
        await self._all(self._add_node(f"node-{number:05}") for number in range(self.size))
        for name in DIGESTS:
            spec = {"model": "m", "version": name, "source": {"uri": f"file:///models/{name}"}}
            metadata = {"name": name, "namespace": MODELS}
            await self.api.create(
                WEIGHT_VERSIONS, _typed(WEIGHT_VERSIONS, {"metadata": metadata, "spec": spec})
            )

    async def roll_out(self, version: str, strategy: str = "AllAtOnce") -> float:
        """Have all pods serve a version; when it was written, by the event loop's clock."""
        spec = {
            "versionRef": {"name": version},
            "target": {"selector": {"matchLabels": {"app": "llm"}}},
            "strategy": {"type": strategy},
        }
        metadata = {"name": "llm", "namespace": MODELS}
        await self.api.apply(WEIGHT_ROLLOUTS, {"metadata": metadata, "spec": spec}, manager="user")
        return asyncio.get_running_loop().time()

    async def follow(self) -> None:
        """Play agents and kubelets, for ever."""
        async with (
            asyncio.TaskGroup() as group,
            aclosing(watch(self.api, NODE_WEIGHTS, Selection(SYSTEM))) as changes,
        ):
            async for change in changes:
                if change.type in ("ADDED", "MODIFIED"):
                    self._hear(change.body, group)

    # -- what happens ---------------------------------------------------------------------------

    def _hear(self, body: Body, group: asyncio.TaskGroup) -> None:
        node = body["metadata"]["name"]
        agent, self._bodies[node] = self.agents[node], body
        if body["metadata"]["generation"] == agent.generation:
            return  # its own word, or somebody's annotation
        for uid, order in orders_of(body).items():
            self._note("told", uid, order.get("digest", ""))
        for engine in agent.closes(body):
            group.create_task(self._show(engine, is_open=False))
        if not agent.looks:
            agent.looks = True
            group.create_task(self._look(agent))

    async def _look(self, agent: Agent) -> None:
        again = True
        while again:
            await asyncio.sleep(self._draw.uniform(*ANSWER_SECONDS))
            agent.looks = False
            step = agent.step(self._bodies[agent.node])
            again = step.again
            agent.looks = again
            for uid, digest in step.committing.items():
                self._note("served", uid, digest)
            await self._patch("agent", NODE_WEIGHTS, agent.node, SYSTEM, {"status": agent.status()})
            for uid in step.committing:
                await self._show(agent.engines[uid], is_open=True)

    def _note(self, what: str, uid: str, digest: str) -> None:
        if digest and (what, uid, digest) not in self._seen:
            self._seen.add((what, uid, digest))
            now = asyncio.get_running_loop().time()
            self.moments.setdefault((what, digest), []).append(now)

    async def _show(self, engine: Engine, *, is_open: bool) -> None:
        """As the agent writes it, gate and label in one go; the kubelet follows."""
        gate, labels = "True" if is_open else "False", {}
        if is_open:
            labels = {"hotweights.dev/digest": digest_label(engine.digest)}
        before = "False" if is_open else "True"
        body: Body = {"metadata": {"labels": labels}, "status": self._conditions(before, gate)}
        await self._patch("gate", PODS, engine.pod, MODELS, body)
        await asyncio.sleep(KUBELET_SECONDS)
        body = {"status": self._conditions(gate, gate)}
        await self._patch("kubelet", PODS, engine.pod, MODELS, body)

    def _conditions(self, ready: str, gate: str) -> Body:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {
            "conditions": [
                {"type": "Ready", "status": ready, "lastTransitionTime": now},
                {"type": GATE, "status": gate, "lastTransitionTime": now},
            ]
        }

    async def _patch(
        self, who: str, resource: Resource, name: str, namespace: str, body: Body
    ) -> None:
        self.written[who] += 1
        async with self._gate:
            await self.api.merge_patch(
                resource, name, body, namespace=namespace, subresource="status", manager=who
            )

    # -- as it is at first ----------------------------------------------------------------------

    async def _add_node(self, node: str) -> None:
        ready = {"type": "Ready", "status": "True", "lastTransitionTime": self._born}
        await self._made(NODES, {"metadata": {"name": node}})
        await self.api.merge_patch(
            NODES, node, {"status": {"conditions": [ready]}}, subresource="status"
        )
        await self._pod(f"agent-{node}", node, SYSTEM, AGENT_LABELS)
        labels = {"app": "llm", "hotweights.dev/inject": "true"}
        uid = await self._pod(f"llm-{node}", node, MODELS, labels)
        self.agents[node] = Agent(node, {uid: Engine(f"llm-{node}", "", "", token=0)}, set())

    async def _pod(self, name: str, node: str, namespace: str, labels: dict[str, str]) -> str:
        """A pod that runs; its UID."""
        variable = {"name": "HOTWEIGHTS_SOCKET", "value": "/run/hotweights/agent.sock"}
        body: Body = {
            "metadata": {"name": name, "namespace": namespace, "labels": labels},
            "spec": {
                "nodeName": node,
                "automountServiceAccountToken": False,
                "tolerations": [{"operator": "Exists"}],
                "containers": [{"name": "vllm", "image": "none", "env": [variable]}],
            },
        }
        made = await self.api.create(PODS, _typed(PODS, body))
        container = {
            "name": "vllm",
            "image": "none",
            "imageID": "",
            "ready": True,
            "restartCount": 0,
            "state": {"running": {"startedAt": self._born[:19] + "Z"}},
        }
        status = {"phase": "Running", "containerStatuses": [container]}
        conditions = self._conditions("True", "True")
        await self.api.merge_patch(
            PODS, name, {"status": status | conditions}, namespace=namespace, subresource="status"
        )
        return str(made["metadata"]["uid"])

    async def _made(self, resource: Resource, body: Body) -> None:
        with contextlib.suppress(AlreadyExists, Conflict):
            await self.api.create(resource, _typed(resource, body))

    async def _all(self, works: Iterable[Coroutine[Any, Any, None]]) -> None:
        """Do these, so many at a time."""

        async def bounded(work: Awaitable[None]) -> None:
            async with self._gate:
                await work

        await asyncio.gather(*(bounded(work) for work in works))


def _typed(resource: Resource, body: Body) -> Body:
    return {"apiVersion": resource.api_version, "kind": resource.kind, **body}
