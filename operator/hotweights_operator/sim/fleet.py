"""Nodes, their agents, and the engines in their pods, as far as the operator can tell them from real ones.

An engine's own state is the truth; what its agent wrote last is what the world knows; both drift apart whenever a process dies
or a report is late. That is the point: nobody may be told that a pod serves what it does not.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from hotweights_crds.nodeweights import (
    EngineStatus,
    NodeWeightsSpec,
    NodeWeightsStatus,
    PodAssignment,
    ResolvedVersion,
    StagedVersion,
)
from hotweights_operator.cache import Agent
from hotweights_operator.model import Node, Pod
from hotweights_operator.sim.api import Api

NBYTES = 1000


@dataclass(slots=True)
class Engine:
    """The process in a pod's container."""

    started_at: datetime
    boots_until: datetime
    phase: str = "Starting"  # Starting, Booting, Serving, Committing, Failed, Dirty
    digest: str = ""
    prepared: str = ""
    refused: str = ""
    token: int = 0
    confirmed_at: datetime | None = None
    committing: str = ""
    failed_token: int = -1
    dies_at: datetime | None = None


@dataclass(slots=True)
class AgentProcess:
    """An agent's memory, which dies with it."""

    boot: int
    staged: dict[str, int] = field(default_factory=dict)  # digest → bytes verified
    failed: dict[str, str] = field(default_factory=dict)
    started: bool = False


@dataclass(slots=True)
class Faults:
    """What is wrong with the world at present."""

    incompatible: set[tuple[str, str]] = field(default_factory=set)  # pod UID, digest: refused at prepare
    breaking_commits: dict[str, str] = field(default_factory=dict)  # pod UID → Failed or Dirty, once
    corrupt: set[str] = field(default_factory=set)  # digests whose source is damaged
    unreadable: set[str] = field(default_factory=set)  # URIs that no agent may read


Confirmation = tuple[str, str, datetime]  # pod UID, digest, when


@dataclass(slots=True)
class Fleet:
    """The machines."""

    api: Api
    draw: random.Random
    now: datetime
    engines: dict[str, Engine] = field(default_factory=dict)  # by pod UID
    agents: dict[str, AgentProcess | None] = field(default_factory=dict)  # by node; None: dead
    contents: dict[str, str] = field(default_factory=dict)  # URI → digest
    faults: Faults = field(default_factory=Faults)
    confirmations: list[Confirmation] = field(default_factory=list)
    boots: int = 0

    # -- processes -----------------------------------------------------------------------------------------------------

    def add_node(self, name: str) -> None:
        """A node with a running agent."""
        self.api.put("node", name, Node(name, f"uid-{name}"))
        self.start_agent(name)

    def start_agent(self, node: str) -> None:
        """Its pod becomes Ready once it has written its first status."""
        self.boots += 1
        self.agents[node] = AgentProcess(self.boots)

    def kill_agent(self, node: str) -> None:
        """What it held in memory is gone; what it wrote stays."""
        self.agents[node] = None
        self.api.put("agent", node, Agent(f"agent-{node}", node, False))

    def remove_node(self, node: str) -> None:
        """The machine is gone, and with it, by garbage collection, its objects and pods."""
        self.agents.pop(node, None)
        for pod in self.pods():
            if pod.node == node:
                self.remove_pod(pod.uid)
        self.api.delete("state", node)
        self.api.delete("agent", node)
        self.api.delete("node", node)

    def start_pod(self, pod: Pod) -> None:
        """A new pod: its engine starts to load."""
        self.engines[pod.uid] = self._process()
        self.api.put("pod", pod.uid, replace(pod, engine_started_at=self._shown(self.now)))

    def restart_container(self, uid: str) -> None:
        """The engine's process dies, and the kubelet starts another."""
        pod = self.api.get("pod", uid)
        self.engines[uid] = self._process()
        shown = self._shown(self.now)
        self.api.put("pod", uid, replace(pod, ready=False, was_ready=True, engine_started_at=shown))

    def remove_pod(self, uid: str) -> None:
        """A pod is deleted."""
        self.engines.pop(uid, None)
        self.api.delete("pod", uid)

    def pods(self) -> list[Pod]:
        """All pods."""
        return [pod for _, pod in self.api.objects["pod"].values()]

    def _process(self) -> Engine:
        return Engine(self.now, self.now + timedelta(seconds=self.draw.randint(3, 8)))

    @staticmethod
    def _shown(moment: datetime) -> datetime:
        """Kubernetes shows whole seconds."""
        return moment.replace(microsecond=0)

    # -- time passes ---------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Every process does a little."""
        for uid, engine in list(self.engines.items()):
            if engine.dies_at is not None and self.now >= engine.dies_at:
                self.restart_container(uid)
            elif engine.phase == "Starting" and self.now >= engine.boots_until:
                engine.phase = "Booting"
        for node, agent in list(self.agents.items()):
            if agent is not None and self.draw.random() < 0.9:
                self._agent_step(node, agent)

    def _agent_step(self, node: str, agent: AgentProcess) -> None:
        state = self.api.get("state", node)
        if state is None:
            return
        self._stage(agent, state.spec)
        best = {pod.uid: pod for entry in state.spec.rollouts for pod in sorted(entry.pods, key=lambda p: p.token)}
        for entry in state.spec.rollouts:
            for pod in entry.pods:
                if pod.token > best[pod.uid].token:
                    best[pod.uid] = pod
        engines = []
        for uid, wanted in best.items():
            engine = self.engines.get(uid)
            if engine is not None and self.api.get("pod", uid).node == node:
                self._steer(uid, engine, wanted, agent)
            engines.append(self._report(uid, engine, wanted, agent))
        for uid, engine in self.engines.items():
            if uid not in best and engine.phase != "Starting" and self.api.get("pod", uid).node == node:
                engines.append(self._report(uid, engine, PodAssignment(uid=uid, name=uid, namespace=""), agent))
        if self.draw.random() < 0.75 or not agent.started:
            self._write(node, agent, state.generation, engines, state.spec)
        for uid, wanted in best.items():
            self._gate(uid, wanted)

    def _stage(self, agent: AgentProcess, spec: NodeWeightsSpec) -> None:
        wanted = {item.digest: item for entry in spec.rollouts for item in entry.stage}
        agent.staged = {digest: done for digest, done in agent.staged.items() if digest in wanted}
        agent.failed = {digest: why for digest, why in agent.failed.items() if digest in self.faults.corrupt}
        for digest in wanted:
            if digest in self.faults.corrupt:
                if agent.staged.get(digest, 0) < NBYTES:
                    agent.failed[digest] = "ChecksumMismatch"
                continue
            agent.staged[digest] = min(NBYTES, agent.staged.get(digest, 0) + self.draw.choice((200, 500, 1000)))

    def _steer(self, uid: str, engine: Engine, wanted: PodAssignment, agent: AgentProcess) -> None:
        """One frame between agent and engine."""
        if engine.phase in ("Starting", "Dirty") or wanted.token < engine.token:
            return
        if engine.phase == "Committing":
            self._finish_commit(uid, engine, wanted)
            return
        engine.token = wanted.token
        is_staged = agent.staged.get(wanted.digest, 0) >= NBYTES
        if engine.phase == "Booting":
            if not wanted.digest:
                engine.phase = "Serving"
            elif is_staged and (uid, wanted.digest) not in self.faults.incompatible:
                engine.committing, engine.phase = wanted.digest, "Committing"
            return
        goal = wanted.digest if wanted.digest not in ("", engine.digest) else wanted.prepare
        if engine.failed_token != wanted.token:
            engine.phase = "Serving"
        engine.refused = goal if (uid, goal) in self.faults.incompatible and agent.staged.get(goal, 0) >= NBYTES else ""
        if engine.prepared not in ("", wanted.digest, wanted.prepare):
            engine.prepared = ""
        if goal and goal != engine.digest and agent.staged.get(goal, 0) >= NBYTES and not engine.refused:
            if engine.prepared != goal:
                engine.prepared = goal
            elif goal == wanted.digest and engine.failed_token != wanted.token:
                engine.committing, engine.phase = goal, "Committing"

    def _finish_commit(self, uid: str, engine: Engine, wanted: PodAssignment) -> None:
        how = self.faults.breaking_commits.pop(uid, "")
        digest, engine.committing = engine.committing, ""
        if how == "Dirty":
            engine.phase, engine.dies_at = "Dirty", self.now + timedelta(seconds=15)
            engine.digest = ""
        elif how == "Failed" and engine.confirmed_at is not None:
            engine.phase, engine.failed_token = "Failed", engine.token
        else:
            engine.phase, engine.digest, engine.confirmed_at = "Serving", digest, self.now
            self.confirmations.append((uid, digest, self.now))

    def _report(self, uid: str, engine: Engine | None, wanted: PodAssignment, agent: AgentProcess) -> EngineStatus:
        if engine is None or engine.phase == "Starting":
            return EngineStatus(pod_uid=uid, phase="Disconnected", token=wanted.token, reason="EngineNotConnected")
        phase, reason = engine.phase, ""
        if engine.phase == "Serving" and engine.refused:
            phase, reason = "Refused", "ShapeMismatch"
        elif engine.phase == "Serving" and engine.prepared:
            phase = "Prepared"
        elif engine.phase in ("Failed", "Dirty"):
            reason = "CommitFailed" if engine.phase == "Failed" else "EngineDirty"
        return EngineStatus.model_construct(
            pod_uid=uid,
            pod="",
            phase=phase,
            digest=engine.digest,
            version="",
            prepared=engine.prepared,
            token=max(engine.token, wanted.token),
            confirmed_at=engine.confirmed_at.isoformat() if engine.confirmed_at and engine.digest else "",
            pause_seconds=0.0,
            reason=reason,
            message="simulated" if reason else "",
        )

    def _write(
        self, node: str, agent: AgentProcess, generation: int, engines: list[EngineStatus], spec: NodeWeightsSpec
    ) -> None:
        staged = [
            StagedVersion(
                digest=digest, phase="Staged" if done >= NBYTES else "Fetching", bytes_done=done, bytes_total=NBYTES
            )
            for digest, done in agent.staged.items()
            if digest not in agent.failed
        ]
        staged += [
            StagedVersion(digest=digest, phase="Failed", reason=why, message="model.safetensors: chunk 3")
            for digest, why in agent.failed.items()
        ]
        resolved = [
            ResolvedVersion(uid=item.uid, reason="SourceNotAllowed", message="not under an allowed root")
            if item.uri in self.faults.unreadable
            else ResolvedVersion(uid=item.uid, digest=self.contents[item.uri], nbytes=NBYTES, tensors=1, chunks=1)
            for item in spec.resolve
        ]
        status = NodeWeightsStatus(
            observed_generation=generation,
            boot_id=f"boot-{agent.boot}",
            endpoint=f"tcp://{node}:1",
            staged=staged,
            engines=engines,
            resolved=resolved,
        )
        self.api.set_status(node, status)
        if not agent.started:
            agent.started = True
            self.api.put("agent", node, Agent(f"agent-{node}", node, True))

    def _gate(self, uid: str, wanted: PodAssignment) -> None:
        """The pod is Ready when its engine answers and serves what was assigned."""
        pod, engine = self.api.get("pod", uid), self.engines.get(uid)
        if pod is None or engine is None:
            return
        serves = engine.phase in ("Serving", "Failed") and wanted.digest in ("", engine.digest)
        if pod.ready != serves:
            self.api.put("pod", uid, replace(pod, ready=serves, was_ready=pod.was_ready or serves))
