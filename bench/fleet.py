"""Nodes, agents, kubelets and pods that are timers, around the API server of `bench.apiserver`.

An agent looks at its node's NodeWeights some 0.1-0.4 s after it changed and takes one step: it
reads sources and stages, or its engines prepare, or they commit. Each step is one write of the
status. Around a commit the pod's gate closes and opens, with the labels, and the kubelet follows
with Ready: four writes of the pod. Nothing ever fails here: what is measured is the operator.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from bench.apiserver import Server
from hotweights_crds.base import API_VERSION
from hotweights_kube.resources import Body

SYSTEM, MODELS, ROLLOUT_UID = "hotweights-system", "models", "rollout-llm"
ANSWER_SECONDS = (0.1, 0.4)
KUBELET_SECONDS = 0.05
WATCH_SECONDS = 0.01
VERSION_NBYTES = 16 << 30
DIGESTS = {"v0": f"sha256:{'0123456789abcdef' * 4}", "v1": f"sha256:{'fedcba9876543210' * 4}"}
GATE = "hotweights.dev/weights"
_KINDS = {
    "NodeWeights": "state",
    "Node": "node",
    "WeightVersion": "version",
    "WeightRollout": "rollout",
}


def kind_of(body: Body) -> str:
    """What the operator calls this kind of object."""
    return _KINDS.get(body["kind"]) or (
        "pod" if body["metadata"]["namespace"] == MODELS else "agent"
    )


@dataclass
class Engine:
    """One pod's engine, as its agent tells of it."""

    pod: str
    digest: str
    confirmed_at: str
    prepared: str = ""
    token: int = 1


@dataclass
class Agent:
    """One node's agent."""

    node: str
    engines: dict[str, Engine]  # pod UID → engine
    staged: set[str]  # digests
    resolved: dict[str, str] = field(default_factory=dict)  # UID of the WeightVersion → digest
    generation: int = 0  # that it has heard of
    looks: bool = False  # it has heard of a change and will look


class Fleet:
    """``nodes`` x ``pods`` that serve v0, as an operator has left them, and a v1 that nobody has
    read yet.
    """

    def __init__(self, server: Server, nodes: int, pods: int, seed: int = 0) -> None:
        self.server, self.size = server, nodes * pods
        self.agents: dict[str, Agent] = {}
        self.moments: dict[tuple[str, str], float] = {}
        """When every pod was first told, had prepared, and served: by (what, digest), in seconds of
        the event loop's clock.
        """
        self.counts: Counter[tuple[str, str]] = Counter()
        """The pods that are told to serve, have prepared, and serve a digest now."""
        self.noted: Callable[[str, str], None] = lambda what, digest: None
        """Called within the write that changed one of these."""
        self._books: dict[tuple[str, str], str] = {}  # (what, pod UID) → digest
        self._draw = random.Random(seed)
        self._born = _stamp(datetime.now(UTC) - timedelta(hours=1))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tell: Callable[[str, Body], None] = lambda kind, body: None
        server.stored = self._stored
        for number in range(nodes):
            self._add_node(f"node-{number:05}", pods)
        self._add_rollout()

    def begin(self, tell: Callable[[str, Body], None]) -> None:
        """From now on there are watches: ``tell`` hears of every change, the kind as the operator
        calls it.
        """
        self._loop, self._tell = asyncio.get_running_loop(), tell

    def edit(self, **spec: object) -> None:
        """What a user does to the rollout."""
        with self.server.counted():
            self.server.patch_now("WeightRollout", "llm", {"spec": spec})

    def touched(self, node: str) -> Body:
        """An agent has something new to say that matters to nobody: its node's NodeWeights, of
        which no watch tells.
        """
        tell, self._loop = self._loop, None
        free = {"capacity": {"freeBytes": self._draw.randrange(1 << 40)}}
        body = self.server.patch_now("NodeWeights", node, {"status": free})
        self._loop = tell
        return body

    # -- as it is at first ----------------------------------------------------------------------

    def _add_node(self, node: str, pods: int) -> None:
        ready = [{"type": "Ready", "status": "True", "lastTransitionTime": self._born}]
        store, digest, now = self.server.store, DIGESTS["v0"], _stamp(datetime.now(UTC))
        store(
            "Node",
            {"metadata": {"name": node, "uid": f"uid-{node}"}, "status": {"conditions": ready}},
        )
        names = [f"llm-{node}-{index:03}" for index in range(pods)]
        agent = Agent(node, {f"uid-{name}": Engine(name, digest, now) for name in names}, {digest})
        self.agents[node] = agent
        metadata = {"name": f"agent-{node}", "namespace": SYSTEM, "uid": f"uid-agent-{node}"}
        store(
            "Pod",
            {"metadata": metadata, "spec": {"nodeName": node}, "status": {"conditions": ready}},
        )
        for name in names:
            store("Pod", self._pod(name, node))
        metadata = {"name": node, "namespace": SYSTEM, "uid": f"uid-weights-{node}"}
        weights = {
            "apiVersion": API_VERSION,
            "metadata": metadata,
            "spec": {"nodeName": node},
            "status": {},
        }
        store("NodeWeights", weights)
        self.server.apply_now("NodeWeights", _settled(agent), f"hotweights-rollout-{ROLLOUT_UID}")
        self._report(agent)

    def _pod(self, name: str, node: str) -> Body:
        conditions = [
            {"type": type_, "status": "True", "lastTransitionTime": self._born}
            for type_ in ("Ready", GATE)
        ]
        labels = {"app": "llm", "hotweights.dev/inject": "true", **_shown(DIGESTS["v0"])}
        variable = {"name": "HOTWEIGHTS_SOCKET", "value": "/run/hotweights/agent.sock"}
        container = {
            "name": "vllm",
            "restartCount": 0,
            "ready": True,
            "state": {"running": {"startedAt": self._born}},
        }
        return {
            "metadata": {"name": name, "namespace": MODELS, "uid": f"uid-{name}", "labels": labels},
            "spec": {"nodeName": node, "containers": [{"name": "vllm", "env": [variable]}]},
            "status": {
                "phase": "Running",
                "conditions": conditions,
                "containerStatuses": [container],
            },
        }

    def _add_rollout(self) -> None:
        said = {
            "status": "True",
            "reason": "Resolved",
            "message": "",
            "lastTransitionTime": self._born,
        }
        conditions = [{"type": type_, **said} for type_ in ("Resolved", "Ready")]
        resolved = {"digest": DIGESTS["v0"], "nbytes": VERSION_NBYTES, "conditions": conditions}
        for name, known in (("v0", resolved), ("v1", {})):
            version = {"model": "m", "version": name, "source": {"uri": f"file:///models/{name}"}}
            metadata = {"name": name, "namespace": MODELS, "uid": f"version-{name}"}
            self.server.store(
                "WeightVersion", {"metadata": metadata, "spec": version, "status": known}
            )
        spec = {
            "versionRef": {"name": "v0"},
            "target": {"selector": {"matchLabels": {"app": "llm"}}},
            "strategy": {"type": "AllAtOnce"},
        }
        served = {"name": "v0", "version": "v0", "digest": DIGESTS["v0"]}
        times = {"startedAt": self._born, "finishedAt": self._born}
        history = [{"revision": 1, "version": "v0", "outcome": "Complete", **times}]
        status = {
            "revision": 1,
            "preparedRevision": 1,
            "target": served,
            "stable": served,
            "history": history,
        }
        metadata = {
            "name": "llm",
            "namespace": MODELS,
            "uid": ROLLOUT_UID,
            "creationTimestamp": self._born,
        }
        self.server.store("WeightRollout", {"metadata": metadata, "spec": spec, "status": status})

    # -- what happens ---------------------------------------------------------------------------

    def _stored(self, body: Body) -> None:
        """Keep the books, wake the agent, and tell those who watch."""
        kind = kind_of(body)
        if kind == "state":
            for uid, order in _orders(body).items():
                self._note("told", uid, order["digest"])
        if self._loop is None:
            return
        if kind == "state":
            self._hear(self.agents[body["metadata"]["name"]], body)
        self._loop.call_later(WATCH_SECONDS, self._tell, kind, body)

    def _note(self, what: str, uid: str, digest: str) -> None:
        before = self._books.get((what, uid))
        if before == digest:
            return
        self._books[what, uid] = digest
        self.counts[what, digest] += 1
        if before is not None:
            self.counts[what, before] -= 1
        if self._loop is not None and self.counts[what, digest] == self.size:
            self.moments.setdefault((what, digest), self._loop.time())
        self.noted(what, digest)

    def _later(self, seconds: float, act: Callable[..., None], *arguments: object) -> None:
        def counted() -> None:
            with self.server.counted():
                act(*arguments)

        if self._loop is not None:
            self._loop.call_later(seconds, counted)

    def _hear(self, agent: Agent, body: Body) -> None:
        """The agent's watch: new orders close the gates of those who are to commit, and are looked
        at soon.
        """
        if body["metadata"]["generation"] == agent.generation:
            return  # its own word
        agent.generation = body["metadata"]["generation"]
        for uid, order in _orders(body).items():
            if agent.engines[uid].prepared == order["digest"] != "":
                self._later(WATCH_SECONDS, self._gate, agent.engines[uid], False)
        self._look_soon(agent)

    def _look_soon(self, agent: Agent) -> None:
        if not agent.looks:
            agent.looks = True
            self._later(self._draw.uniform(*ANSWER_SECONDS), self._look, agent)

    def _look(self, agent: Agent) -> None:
        """One step, and the report of it."""
        agent.looks = False
        body = self.server.objects["NodeWeights"][agent.node]
        spec, orders = body["spec"], _orders(body)
        agent.resolved = {item["uid"]: DIGESTS[item["version"]] for item in spec.get("resolve", ())}
        staged = {item["digest"] for entry in spec["rollouts"] for item in entry["stage"]}
        new, agent.staged = staged - agent.staged, staged
        for uid, order in orders.items():
            agent.engines[uid].token = order["token"]
        preparing = {} if new else self._to_prepare(agent, orders)
        for uid, digest in preparing.items():
            agent.engines[uid].prepared = digest
            self._note("prepared", uid, digest)
        committing = {} if new or preparing else self._to_commit(agent, orders)
        for uid, digest in committing.items():
            engine = agent.engines[uid]
            engine.digest, engine.prepared, engine.confirmed_at = (
                digest,
                "",
                _stamp(datetime.now(UTC)),
            )
            self._note("served", uid, digest)
        self._report(agent)
        for uid in committing:
            self._gate(agent.engines[uid], True)
        if (new or preparing) and (
            self._to_prepare(agent, orders) or self._to_commit(agent, orders)
        ):
            self._look_soon(agent)

    def _to_prepare(self, agent: Agent, orders: dict[str, Body]) -> dict[str, str]:
        """Pod UID → what its engine can prepare now."""
        goals = {
            uid: order["digest"]
            if order["digest"] not in ("", agent.engines[uid].digest)
            else order.get("prepare", "")
            for uid, order in orders.items()
        }
        return {
            uid: goal
            for uid, goal in goals.items()
            if goal in agent.staged
            and goal not in (agent.engines[uid].digest, agent.engines[uid].prepared)
        }

    def _to_commit(self, agent: Agent, orders: dict[str, Body]) -> dict[str, str]:
        """Pod UID → what its engine has prepared and is told to serve."""
        return {
            u: o["digest"]
            for u, o in orders.items()
            if o["digest"] and agent.engines[u].prepared == o["digest"]
        }

    def _gate(self, engine: Engine, is_open: bool) -> None:
        """As the agent writes it, with the labels; the kubelet follows."""
        body = self.server.objects["Pod"][engine.pod]
        labels = {**body["metadata"]["labels"], **_shown(engine.digest)}
        self.server.store(
            "Pod",
            _with_condition(
                {**body, "metadata": {**body["metadata"], "labels": labels}}, GATE, is_open
            ),
        )
        self._later(KUBELET_SECONDS, self._ready, engine, is_open)

    def _ready(self, engine: Engine, is_ready: bool) -> None:
        self.server.store(
            "Pod", _with_condition(self.server.objects["Pod"][engine.pod], "Ready", is_ready)
        )

    def _report(self, agent: Agent) -> None:
        """The whole status, as agents write it."""
        names = {digest: version for version, digest in DIGESTS.items()}
        full = {"phase": "Staged", "bytesDone": VERSION_NBYTES, "bytesTotal": VERSION_NBYTES}
        body = self.server.objects["NodeWeights"][agent.node]
        agent.generation = body["metadata"]["generation"]
        status = {
            "observedGeneration": agent.generation,
            "bootID": "boot",
            "agentVersion": "bench",
            "endpoint": f"tcp://{agent.node}:7400",
            "staged": [
                {"digest": digest, "version": names[digest], **full}
                for digest in sorted(agent.staged)
            ],
            "resolved": [
                {"uid": u, "digest": d, "nbytes": VERSION_NBYTES}
                for u, d in sorted(agent.resolved.items())
            ],
            "engines": [
                {
                    "podUID": uid,
                    "pod": f"{MODELS}/{engine.pod}",
                    "phase": "Prepared" if engine.prepared else "Serving",
                    "digest": engine.digest,
                    "version": names[engine.digest],
                    "prepared": engine.prepared,
                    "token": engine.token,
                    "confirmedAt": engine.confirmed_at,
                }
                for uid, engine in agent.engines.items()
            ],
        }
        self.server.patch_now("NodeWeights", agent.node, {"status": status})


def _stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _shown(digest: str) -> dict[str, str]:
    return {"hotweights.dev/digest": digest.removeprefix("sha256:")[:16]}


def _settled(agent: Agent) -> Body:
    """What a rollout that is complete wants of a node."""
    digest = DIGESTS["v0"]
    stage = {
        "digest": digest,
        "namespace": MODELS,
        "model": "m",
        "version": "v0",
        "uri": "file:///models/v0",
    }
    order = {"namespace": MODELS, "token": 1, "digest": digest, "version": "v0", "revision": 1}
    pods = [{"uid": uid, "name": engine.pod, **order} for uid, engine in agent.engines.items()]
    entry = {"uid": ROLLOUT_UID, "namespace": MODELS, "name": "llm", "stage": [stage], "pods": pods}
    return {"metadata": {"name": agent.node}, "spec": {"rollouts": [entry]}}


def _orders(body: Body) -> dict[str, Body]:
    """Pod UID → the order that counts."""
    found: dict[str, Body] = {}
    for entry in body["spec"].get("rollouts", ()):
        for order in entry["pods"]:
            if order["uid"] not in found or order["token"] > found[order["uid"]]["token"]:
                found[order["uid"]] = order
    return found


def _with_condition(body: Body, type_: str, holds: bool) -> Body:
    """The pod with this condition as it is now."""
    status, now = "True" if holds else "False", _stamp(datetime.now(UTC))
    changed = {"type": type_, "status": status, "lastTransitionTime": now}
    conditions = [
        changed if found["type"] == type_ and found["status"] != status else found
        for found in body["status"]["conditions"]
    ]
    return {**body, "status": {**body["status"], "conditions": conditions}}
