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


@dataclass(frozen=True)
class Step:
    """What an agent did: by pod UID, the digests."""

    preparing: dict[str, str]
    committing: dict[str, str]
    again: bool  # it will look once more, unasked


@dataclass
class Agent:
    """One node's agent. It decides and tells; who writes that down is its fleet's."""

    node: str
    engines: dict[str, Engine]  # pod UID → engine
    staged: set[str]  # digests
    resolved: dict[str, str] = field(default_factory=dict)  # UID of the WeightVersion → digest
    generation: int = 0  # that it has heard of
    looks: bool = False  # it has heard of a change and will look

    def closes(self, body: Body) -> list[Engine]:
        """Its node's NodeWeights are these now: the engines whose gates close, because they are to
        commit.
        """
        self.generation = body["metadata"]["generation"]
        return [
            self.engines[uid]
            for uid, order in orders_of(body).items()
            if self.engines[uid].prepared == order["digest"] != ""
        ]

    def step(self, body: Body) -> Step:
        """Do the next thing that the NodeWeights ask for."""
        spec, orders = body["spec"], orders_of(body)
        self.generation = body["metadata"]["generation"]
        self.resolved = {
            item["uid"]: DIGESTS[item["version"]] for item in spec.get("resolve") or ()
        }
        staged = {
            item["digest"]
            for entry in spec.get("rollouts") or ()
            for item in entry.get("stage") or ()
        }
        new, self.staged = staged - self.staged, staged
        for uid, order in orders.items():
            self.engines[uid].token = order["token"]
        preparing = {} if new else self._to_prepare(orders)
        for uid, digest in preparing.items():
            self.engines[uid].prepared = digest
        committing = {} if new or preparing else self._to_commit(orders)
        for uid, digest in committing.items():
            engine = self.engines[uid]
            engine.digest, engine.prepared = digest, ""
            engine.confirmed_at = stamp(datetime.now(UTC))
        more = self._to_prepare(orders) or self._to_commit(orders)
        return Step(preparing, committing, bool((new or preparing) and more))

    def status(self) -> Body:
        """All that it tells of its node."""
        names = {digest: version for version, digest in DIGESTS.items()} | {"": ""}
        full = {"phase": "Staged", "bytesDone": VERSION_NBYTES, "bytesTotal": VERSION_NBYTES}
        return {
            "observedGeneration": self.generation,
            "bootID": "boot",
            "agentVersion": "bench",
            "endpoint": f"tcp://{self.node}:7400",
            "staged": [
                {"digest": digest, "version": names[digest], **full}
                for digest in sorted(self.staged)
            ],
            "resolved": [
                {"uid": u, "digest": d, "nbytes": VERSION_NBYTES}
                for u, d in sorted(self.resolved.items())
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
                for uid, engine in self.engines.items()
            ],
        }

    def _to_prepare(self, orders: dict[str, Body]) -> dict[str, str]:
        """Pod UID → what its engine can prepare now."""
        goals = {
            uid: order["digest"]
            if order.get("digest", "") not in ("", self.engines[uid].digest)
            else order.get("prepare", "")
            for uid, order in orders.items()
        }
        return {
            uid: goal
            for uid, goal in goals.items()
            if goal in self.staged
            and goal not in (self.engines[uid].digest, self.engines[uid].prepared)
        }

    def _to_commit(self, orders: dict[str, Body]) -> dict[str, str]:
        """Pod UID → what its engine has prepared and is told to serve."""
        return {
            u: o["digest"]
            for u, o in orders.items()
            if o.get("digest") and self.engines[u].prepared == o["digest"]
        }


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
        self._born = stamp(datetime.now(UTC) - timedelta(hours=1))
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
        store, digest, now = self.server.store, DIGESTS["v0"], stamp(datetime.now(UTC))
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
            for uid, order in orders_of(body).items():
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
        for engine in agent.closes(body):
            self._later(WATCH_SECONDS, self._gate, engine, False)
        self._look_soon(agent)

    def _look_soon(self, agent: Agent) -> None:
        if not agent.looks:
            agent.looks = True
            self._later(self._draw.uniform(*ANSWER_SECONDS), self._look, agent)

    def _look(self, agent: Agent) -> None:
        """One step, and the report of it."""
        agent.looks = False
        step = agent.step(self.server.objects["NodeWeights"][agent.node])
        for what, done in (("prepared", step.preparing), ("served", step.committing)):
            for uid, digest in done.items():
                self._note(what, uid, digest)
        self._report(agent)
        for uid in step.committing:
            self._gate(agent.engines[uid], True)
        if step.again:
            self._look_soon(agent)

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
        agent.generation = self.server.objects["NodeWeights"][agent.node]["metadata"]["generation"]
        self.server.patch_now("NodeWeights", agent.node, {"status": agent.status()})


def stamp(moment: datetime) -> str:
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


def orders_of(body: Body) -> dict[str, Body]:
    """Pod UID → the order that counts."""
    found: dict[str, Body] = {}
    for entry in body["spec"].get("rollouts") or ():
        for order in entry.get("pods") or ():
            if order["uid"] not in found or order["token"] > found[order["uid"]]["token"]:
                found[order["uid"]] = order
    return found


def _with_condition(body: Body, type_: str, holds: bool) -> Body:
    """The pod with this condition as it is now."""
    status, now = "True" if holds else "False", stamp(datetime.now(UTC))
    changed = {"type": type_, "status": status, "lastTransitionTime": now}
    conditions = [
        changed if found["type"] == type_ and found["status"] != status else found
        for found in body["status"]["conditions"]
    ]
    return {**body, "status": {**body["status"], "conditions": conditions}}
