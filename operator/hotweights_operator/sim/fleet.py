"""Nodes and their agents, as far as the operator can tell them from real ones; the kubelets and engines beneath are beside it.

An agent stages, steers its engines one step at a time, marks their pods (the gate and the label in one write, before and after a
commit), and reports. It dies and forgets; what it wrote stays. What it does must be what `hotweights_agent` does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from hotweights_crds.base import digest_label
from hotweights_crds.nodeweights import (
    EngineStatus,
    NodeWeightsSpec,
    NodeWeightsStatus,
    PodAssignment,
    ResolvedVersion,
    StagedVersion,
)
from hotweights_operator.model import DIGEST_LABEL, Agent, Node, NodeState, Pod
from hotweights_operator.sim.api import Api
from hotweights_operator.sim.engine import Engine, Goal, Memory
from hotweights_operator.sim.flaws import Faults
from hotweights_operator.sim.kubelet import Kubelets

NBYTES = 1000
REPAIR_SECONDS = 8.0
Confirmation = tuple[str, str, int]  # pod UID, digest, in which life of its container


@dataclass(slots=True)
class AgentProcess:
    """An agent's memory, which dies with it."""

    boot: int
    staged: dict[str, int] = field(default_factory=dict)  # digest → bytes verified
    images: dict[str, int] = field(default_factory=dict)  # digest → which staging of it
    failed: dict[str, str] = field(default_factory=dict)
    engines: dict[str, Memory] = field(default_factory=dict)  # by pod UID
    started: bool = False

    def holds(self, digest: str) -> bool:
        """Whether the version is whole and here."""
        return self.staged.get(digest, 0) >= NBYTES


class Fleet:
    """The machines."""

    def __init__(self, api: Api, draw: random.Random, now: datetime) -> None:
        """None yet."""
        self.api = api
        self.draw = draw
        self.kubelets = Kubelets(api, draw, now)
        self.agents: dict[str, AgentProcess | None] = {}  # by node; None: dead
        self.contents: dict[str, str] = {}  # URI → digest
        self.faults = Faults()
        self.confirmations: set[Confirmation] = set()
        self._disks: dict[str, PodAssignment] = {}  # pod UID → the highest order that its agent has heard
        self._boots = 0
        self._images = 0

    @property
    def now(self) -> datetime:
        """The true time."""
        return self.kubelets.now

    @now.setter
    def now(self, moment: datetime) -> None:
        self.kubelets.now = moment

    @property
    def engines(self) -> dict[str, Engine]:
        """By pod UID."""
        return self.kubelets.engines

    def pods(self) -> list[Pod]:
        """All pods."""
        return self.kubelets.pods()

    # -- processes -----------------------------------------------------------------------------------------------------

    def add_node(self, name: str) -> None:
        """A node with a running agent."""
        self.api.put("node", name, Node(name, f"uid-{name}"))
        self.start_agent(name)

    def start_agent(self, node: str) -> None:
        """Its pod becomes Ready once it has written its first status; engines tell it what they serve."""
        self._boots += 1
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

    # -- time passes ---------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Every process does a little."""
        for uid, engine in list(self.engines.items()):
            self._engine_step(uid, engine)
        self.kubelets.step()
        here: dict[str, list[str]] = {}
        for uid in self.engines:
            here.setdefault(self.api.get("pod", uid).node, []).append(uid)
        for node, agent in list(self.agents.items()):
            if agent is not None and self.draw.random() < 0.9:
                self._agent_step(node, agent, here.get(node, []))

    def _engine_step(self, uid: str, engine: Engine) -> None:
        if engine.dies_at is not None and self.now >= engine.dies_at:
            self.api.counts[_death(engine)] += 1
            self.kubelets.end_container(uid, oom=engine.dies_of_memory)
        elif engine.phase == "Starting" and self.now >= engine.boots_until:
            engine.phase = "Booting"
        elif engine.repaired_at is not None and self.now >= engine.repaired_at:
            self.api.counts["commit breaks in the middle and is repaired"] += 1
            engine.phase, engine.repaired_at = "Serving", None
            engine.confirmed_at = self.kubelets.clock(self.api.get("pod", uid).node)
        elif engine.committing and engine.busy_until is not None and self.now >= engine.busy_until:
            self._finish_commit(uid, engine)

    def _agent_step(self, node: str, agent: AgentProcess, here: list[str]) -> None:
        state: NodeState | None = self.api.get("state", node)
        if state is None:
            return
        self._stage(agent, state.spec)
        if node in self.faults.flaky_agents and any(0 < done < NBYTES for done in agent.staged.values()):
            self.api.counts["agent dies while it stages"] += 1
            self.kill_agent(node)
            self.start_agent(node)
            return
        wanted = self._wanted(state.spec)
        engines = []
        for uid, order in wanted.items():
            engine = self.engines.get(uid) if uid in here else None
            if engine is not None:
                self._steer(uid, engine, order, agent)
            engines.append(self._report(uid, engine, order, agent))
        for uid in here:
            engine = self.engines.get(uid)
            if engine is not None and uid not in wanted and engine.phase != "Starting":
                plain = PodAssignment(uid=uid, name=uid, namespace="")
                engines.append(self._report(uid, engine, plain, agent))
        if self.draw.random() < 0.75 or not agent.started:
            self._write(node, agent, state.generation, engines, state.spec)
        for uid in here:
            if uid in wanted and (engine := self.engines.get(uid)) is not None:
                self._mark(uid, engine, wanted[uid])

    def _wanted(self, spec: NodeWeightsSpec) -> dict[str, PodAssignment]:
        """By pod, the order that counts: the highest token of all entries, and never lower than what the disk remembers."""
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

    # -- one engine ----------------------------------------------------------------------------------------------------

    def _memory(self, uid: str, engine: Engine, agent: AgentProcess) -> Memory:
        memory = agent.engines.get(uid)
        if memory is None or memory.life != engine.life:
            memory = agent.engines[uid] = Memory(engine.life)
        return memory

    def _goal(self, digest: str, wanted: PodAssignment, agent: AgentProcess) -> Goal:
        return (wanted.token, wanted.revision, agent.images.get(digest, 0))

    def _aim(self, engine: Engine, wanted: PodAssignment, agent: AgentProcess, memory: Memory) -> str:
        """The version that it is to be brought to next. What was given up makes way for what comes next."""
        following = wanted.prepare if wanted.prepare != engine.digest else ""
        if not wanted.digest or (wanted.digest == engine.digest and not engine.boots):
            return following
        makes_way = following != wanted.digest and agent.holds(following)
        gone = memory.gave_up(wanted.digest, self._goal(wanted.digest, wanted, agent)) if makes_way else None
        return following if gone else wanted.digest

    def _steer(self, uid: str, engine: Engine, wanted: PodAssignment, agent: AgentProcess) -> None:
        """One frame between agent and engine, or two where it answers at once."""
        if engine.phase in ("Starting", "Dirty") or engine.committing or wanted.token < engine.token:
            return
        memory = self._memory(uid, engine, agent)
        memory.only((wanted.digest, wanted.prepare))
        if engine.phase == "Booting" and not wanted.digest:
            engine.phase, engine.boots, engine.token = "Serving", False, wanted.token
            return
        digest = self._aim(engine, wanted, agent, memory)
        if engine.prepared not in (digest or wanted.digest, wanted.prepare):
            engine.prepared = ""
        goal = self._goal(digest, wanted, agent)
        if not digest or digest == engine.digest or not agent.holds(digest) or memory.gave_up(digest, goal):
            return
        if engine.prepared != digest:
            self._prepare(uid, engine, digest, memory, goal)
        if digest == wanted.digest and engine.prepared == digest and self.draw.random() < 0.5:
            effort = memory.effort("Commit", digest, goal)
            if effort.again_at is None or self.now >= effort.again_at:
                self._commit(uid, engine, wanted)

    def _prepare(self, uid: str, engine: Engine, digest: str, memory: Memory, goal: Goal) -> None:
        memory.effort("Prepare", digest, goal)
        if engine.preparing != digest:
            engine.preparing = digest
            engine.busy_until = self.now + timedelta(seconds=self.draw.choice((0.0, 0.0, 1.0, 2.0)))
            flaw = self.faults.flaw("killing", uid, digest)
            if flaw is not None and not engine.boots:  # a second copy beside the one that serves
                engine.dies_at, engine.dies_of_memory = self.now + timedelta(seconds=1.0), flaw.oom
                engine.busy_until = self.now + timedelta(seconds=60.0)
        if engine.busy_until is not None and self.now < engine.busy_until:
            return
        engine.preparing = ""
        refused = self.faults.flaw("refused", uid, digest) is not None
        at_boot = engine.boots and self.faults.flaw("refused at boot", uid, digest) is not None
        if refused or at_boot:
            self.api.counts["engine refuses at boot" if engine.boots else "engine refuses to prepare"] += 1
            memory.fails("Prepare", digest, "ShapeMismatch", self.now, booting=engine.boots, lasting=True)
            return
        engine.prepared = digest
        memory.succeeded(digest)

    def _commit(self, uid: str, engine: Engine, wanted: PodAssignment) -> None:
        """The label goes before the switch begins; short commits are over before anybody has looked."""
        self.kubelets.mark(uid, False, "", DIGEST_LABEL)
        engine.committing, engine.token = wanted.digest, wanted.token
        if not engine.boots:
            engine.phase = "Committing"
        seconds = self.draw.choice((0.0, 0.0, 0.5, 2.5))
        engine.busy_until = self.now + timedelta(seconds=seconds)
        if not seconds:
            self._finish_commit(uid, engine)

    def _finish_commit(self, uid: str, engine: Engine) -> None:
        digest, engine.committing, engine.busy_until = engine.committing, "", None
        if self._commit_fails(uid, engine, digest):
            return
        pod: Pod = self.api.get("pod", uid)
        engine.phase, engine.digest, engine.boots, engine.prepared = "Serving", digest, False, ""
        engine.confirmed_at = self.kubelets.clock(pod.node)
        self.confirmations.add((uid, digest, engine.life))
        memory = self._heard(uid, engine)
        if memory is not None:
            memory.succeeded(digest)
            memory.efforts.pop(("Commit", digest), None)
        crash = self.faults.flaw("crashing", uid, digest)
        engine.dies_at = self.now + timedelta(seconds=crash.seconds) if crash else None

    def _commit_fails(self, uid: str, engine: Engine, digest: str) -> bool:
        flaw = self.faults.flaw("dirty", uid, digest)
        if flaw is not None or (uid in self.faults.dirty_commits and not engine.boots):
            repairs = self.faults.dirty_commits.pop(uid, True)
            engine.phase, engine.prepared = "Dirty", ""
            if repairs and not engine.boots:
                engine.repaired_at = self.now + timedelta(seconds=flaw.seconds if flaw else REPAIR_SECONDS)
            else:
                engine.digest, engine.confirmed_at = "", None
                engine.dies_at = self.now + timedelta(seconds=15)
            self._note_failure(uid, engine, digest, "EngineDirty", lasting=True)
            return True
        left = self.faults.failing_commits.pop(uid, 0)
        mismatched = self.faults.flaw("mismatched", uid, digest) is not None
        if not left and not mismatched:
            return False
        if left > 1:
            self.faults.failing_commits[uid] = left - 1
        engine.phase = "Booting" if engine.boots else "Serving"
        if mismatched:
            self.api.counts["probe gives wrong tokens at boot" if engine.boots else "probe gives wrong tokens"] += 1
            self._note_failure(uid, engine, digest, "ProbeMismatch", lasting=True)
        else:
            self._note_failure(uid, engine, digest, "CommitFailed", lasting=False)
        return True

    def _heard(self, uid: str, engine: Engine) -> Memory | None:
        """The agent's memory of the engine, if it lives to hear the answer."""
        agent = self.agents.get(self.api.get("pod", uid).node)
        return self._memory(uid, engine, agent) if agent is not None else None

    def _note_failure(self, uid: str, engine: Engine, digest: str, reason: str, *, lasting: bool) -> None:
        memory = self._heard(uid, engine)
        if memory is None or ("Commit", digest) not in memory.efforts:
            return
        effort = memory.fails("Commit", digest, reason, self.now, booting=engine.boots, lasting=lasting)
        if not lasting:
            how = "until it is given up" if effort.given_up else "and succeeds when it is tried again"
            self.api.counts[f"commit fails {how}"] += 1

    # -- what it tells -------------------------------------------------------------------------------------------------

    def _mark(self, uid: str, engine: Engine, wanted: PodAssignment) -> None:
        """The gate is True exactly when the engine serves what its pod is assigned."""
        settled = engine.phase == "Serving" and wanted.token >= engine.token
        serves = settled and wanted.digest in ("", engine.digest)
        label = digest_label(engine.digest) if engine.phase == "Serving" else ""
        self.kubelets.mark(uid, serves, label, DIGEST_LABEL)

    def _phase(self, engine: Engine, wanted: PodAssignment, agent: AgentProcess, memory: Memory) -> tuple[str, str]:
        """The phase and the reason."""
        if engine.phase in ("Dirty", "Committing"):
            return engine.phase, "EngineDirty" if engine.phase == "Dirty" else ""
        digest = self._aim(engine, wanted, agent, memory)
        if digest and digest != engine.digest:
            gone = memory.gave_up(digest, self._goal(digest, wanted, agent))
            if gone is not None:
                return "Refused" if gone.reason == "ShapeMismatch" else "Failed", gone.reason
            if not engine.boots and (engine.preparing or engine.prepared == digest):
                return "Preparing" if engine.preparing else "Prepared", ""
        return engine.phase, ""

    def _report(self, uid: str, engine: Engine | None, wanted: PodAssignment, agent: AgentProcess) -> EngineStatus:
        if engine is None or engine.phase == "Starting":
            return EngineStatus(pod_uid=uid, phase="Disconnected", token=wanted.token, reason="EngineNotConnected")
        memory = self._memory(uid, engine, agent)
        phase, reason = self._phase(engine, wanted, agent, memory)
        confirmed = engine.digest if engine.phase == "Serving" else ""
        return EngineStatus.model_construct(
            pod_uid=uid,
            pod="",
            phase=phase,
            digest=confirmed,
            version="",
            prepared=engine.prepared,
            token=max(engine.token, wanted.token),
            confirmed_at=engine.confirmed_at.isoformat() if engine.confirmed_at and confirmed else "",
            pause_seconds=0.0,
            failed=memory.failed,
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


def _death(engine: Engine) -> str:
    """How an engine comes to its end, for the counts."""
    if engine.phase == "Dirty":
        return "commit breaks in the middle and the engine dies"
    if engine.preparing:
        return f"engine {'is killed for its memory' if engine.dies_of_memory else 'dies'} while it prepares"
    return "engine dies after it served"
