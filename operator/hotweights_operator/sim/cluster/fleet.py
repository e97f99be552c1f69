"""Nodes and their agents, as far as the operator can tell them from real ones.

An agent stages what its object lists, steers its engines (`agents`), marks their pods and reports
(`node_report`). It dies and forgets; what it wrote stays, and so does what its disk remembers: the
highest order that each pod was ever given.
"""

from __future__ import annotations

import random
from datetime import datetime

from hotweights_crds.nodeweights import EngineStatus, NodeWeightsSpec, PodAssignment
from hotweights_operator.model.objects import Agent, Node, NodeState, Pod
from hotweights_operator.sim.cluster.agents import NBYTES, AgentProcess, Confirmation, Steering
from hotweights_operator.sim.cluster.api import Api
from hotweights_operator.sim.cluster.bad_versions import ActiveFaults
from hotweights_operator.sim.cluster.engine import Engine
from hotweights_operator.sim.cluster.kubelet import Kubelets
from hotweights_operator.sim.cluster.node_report import engine_status, node_status


class Fleet:
    """The machines, with all that runs on them."""

    def __init__(self, api: Api, draw: random.Random, now: datetime) -> None:
        self.api = api
        self.draw = draw
        self.kubelets = Kubelets(api, draw, now)
        self.agents: dict[str, AgentProcess | None] = {}  # by node; None: dead
        self.contents: dict[str, str] = {}  # URI → digest
        self._steering = Steering(self.kubelets, draw, self.agents)
        # pod UID → the highest order that its agent has heard
        self._disks: dict[str, PodAssignment] = {}
        self._boots = 0
        self._images = 0

    @property
    def now(self) -> datetime:
        """The true time; nodes' clocks may differ (`Kubelets.clock`)."""
        return self.kubelets.now

    @now.setter
    def now(self, moment: datetime) -> None:
        self.kubelets.now = moment

    @property
    def engines(self) -> dict[str, Engine]:
        """All engines that run, by pod UID."""
        return self.kubelets.engines

    @property
    def faults(self) -> ActiveFaults:
        """What is wrong at present; stories change it."""
        return self._steering.faults

    @property
    def confirmations(self) -> set[Confirmation]:
        """All that engines ever confirmed, so that a report can be held against it."""
        return self._steering.confirmations

    def pods(self) -> list[Pod]:
        """All pods that the API server has, terminating ones too."""
        return self.kubelets.pods()

    @property
    def hesitates(self) -> bool:
        """Whether an agent could have gone on just now, and will the next time or the one after
        it.
        """
        return self._steering.hesitates

    # -- processes ------------------------------------------------------------------------------

    def add_node(self, name: str) -> None:
        """A node with a running agent."""
        self.api.put("node", name, Node(name, f"uid-{name}"))
        self.start_agent(name)

    def start_agent(self, node: str) -> None:
        """Its pod becomes Ready once it has written its first status; engines tell it what they
        serve.
        """
        self._boots += 1
        self.api.put("agent", node, Agent(f"agent-{node}", node, False))
        self.agents[node] = AgentProcess(self._boots)
        for uid, engine in self.engines.items():
            if self.api.get("pod", uid).node == node:
                engine.prepared = engine.preparing = ""
                engine.confirmed_at = self.kubelets.clock(node) if engine.digest else None

    def kill_agent(self, node: str) -> None:
        """What it held in memory is gone; what it wrote stays."""
        self.agents[node] = None
        self.api.put("agent", node, Agent(f"agent-{node}", node, False))

    def remove_node(self, node: str) -> None:
        """The machine is gone, and with it, by garbage collection, its objects and pods."""
        self.agents.pop(node, None)
        for pod in self.pods():
            if pod.node == node:
                self.kubelets.remove_pod(pod.uid)
        for kind in ("state", "agent", "node"):
            self.api.delete(kind, node)
        self.api.refusing.discard(node)

    # -- time passes ----------------------------------------------------------------------------

    def step(self) -> None:
        """Every process does a little: engines first, then kubelets, then most of the agents."""
        self._steering.hesitates = False
        for uid, engine in list(self.engines.items()):
            self._steering.step(uid, engine)
        self.kubelets.step()
        here: dict[str, list[str]] = {}
        for uid in self.engines:
            here.setdefault(self.api.get("pod", uid).node, []).append(uid)
        for node, agent in list(self.agents.items()):
            # now and then one is too slow for this step
            if agent is not None and self.draw.random() < 0.9:
                self._agent_step(node, agent, here.get(node, []))

    def _agent_step(self, node: str, agent: AgentProcess, here: list[str]) -> None:
        state: NodeState | None = self.api.get("state", node)
        if state is None:
            return
        self._stage(agent, state.spec)
        if node in self.faults.flaky_agents and any(
            0 < done < NBYTES for done in agent.staged.values()
        ):
            self.api.counts["agent dies while it stages"] += 1
            self.kill_agent(node)
            self.start_agent(node)
            return
        wanted = self._wanted(state.spec)
        engines: list[EngineStatus] = []
        for uid, order in wanted.items():
            engine = self.engines.get(uid) if uid in here else None
            if engine is not None:
                self._steering.steer(uid, engine, order, agent)
            engines.append(engine_status(uid, engine, order, agent))
        for uid in here:
            engine = self.engines.get(uid)
            if engine is not None and uid not in wanted and engine.phase != "Starting":
                plain = PodAssignment(uid=uid, name=uid, namespace="")
                engines.append(engine_status(uid, engine, plain, agent))
        if self.draw.random() < 0.75 or not agent.started:
            self._write(node, agent, state, engines)
        for uid in here:
            if uid in wanted and (engine := self.engines.get(uid)) is not None:
                self._steering.mark(uid, engine, wanted[uid])

    def _wanted(self, spec: NodeWeightsSpec) -> dict[str, PodAssignment]:
        """By pod, the order that counts: the highest token of all entries, and never lower than
        what the disk remembers.
        """
        best: dict[str, PodAssignment] = {}
        for entry in spec.rollouts:
            for pod in entry.pods:
                if pod.uid not in best or pod.token > best[pod.uid].token:
                    best[pod.uid] = pod
        for uid, order in best.items():
            known = self._disks.get(uid)
            if known is not None and order.token < known.token:
                self.api.counts["stale token is refused"] += 1
                best[uid] = known
            else:
                self._disks[uid] = order
        return best

    def _stage(self, agent: AgentProcess, spec: NodeWeightsSpec) -> None:
        wanted = {item.digest for entry in spec.rollouts for item in entry.stage}
        agent.staged = {digest: done for digest, done in agent.staged.items() if digest in wanted}
        agent.failed = {digest: why for digest, why in agent.failed.items() if digest in wanted}
        for digest in sorted(wanted):
            done = agent.staged.get(digest, 0)
            if done >= NBYTES:
                continue
            if self.faults.is_corrupt(digest):
                self.api.counts["source is corrupt"] += digest not in agent.failed
                agent.failed[digest] = "ChecksumMismatch"
                continue
            agent.staged[digest] = min(NBYTES, done + self.draw.choice((200, 500, 1000)))
            if agent.holds(digest):
                self._images += 1
                agent.images[digest] = self._images

    def _write(
        self, node: str, agent: AgentProcess, state: NodeState, engines: list[EngineStatus]
    ) -> None:
        unreadable = self.faults.unreadable
        status = node_status(
            node, agent, state.generation, engines, state.spec, self.contents, unreadable
        )
        self.api.set_status(node, status)
        if not agent.started:
            agent.started = True
            self.api.put("agent", node, Agent(f"agent-{node}", node, True))
