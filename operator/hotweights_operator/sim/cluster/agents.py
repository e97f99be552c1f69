"""An agent's memory of its node, and how it steers one engine. What it does must be what
`hotweights_agent` does.

One step at a time and by level: hand a version over once it is here, commit once it is prepared,
and mark the pod (the gate and the label in one write) before and after. What was given up stays so
for that very order; meanwhile the engine makes ready what comes next.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import timedelta

from hotweights_crds.base import digest_label
from hotweights_crds.nodeweights import PodAssignment
from hotweights_operator.model.objects import DIGEST_LABEL, Pod
from hotweights_operator.sim.cluster.bad_versions import ActiveFaults
from hotweights_operator.sim.cluster.engine import Engine, Goal, Memory
from hotweights_operator.sim.cluster.kubelet import Kubelets

NBYTES = 1000  # of every version
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

    def memory(self, uid: str, engine: Engine) -> Memory:
        """What it remembers of an engine in its present life."""
        found = self.engines.get(uid)
        if found is None or found.life != engine.life:
            found = self.engines[uid] = Memory(engine.life)
        return found

    def goal(self, digest: str, wanted: PodAssignment) -> Goal:
        """What is tried for a version of an assignment."""
        return (wanted.token, (wanted.rollout, wanted.revision), self.images.get(digest, 0))

    def aim(self, engine: Engine, wanted: PodAssignment, memory: Memory) -> str:
        """The version that it is to be brought to next. What was given up makes way for what comes
        next.
        """
        following = wanted.prepare if wanted.prepare != engine.digest else ""
        if not wanted.digest or (wanted.digest == engine.digest and not engine.boots):
            return following
        makes_way = following != wanted.digest and self.holds(following)
        gone = (
            memory.gave_up(wanted.digest, self.goal(wanted.digest, wanted)) if makes_way else None
        )
        return following if gone else wanted.digest


class Steering:
    """What happens between agents and engines, and what engines do by themselves."""

    def __init__(
        self, kubelets: Kubelets, draw: random.Random, agents: dict[str, AgentProcess | None]
    ) -> None:
        """``agents`` are those of all nodes, as they come and go."""
        self.faults = ActiveFaults()
        self.confirmations: set[Confirmation] = set()
        self.hesitates = False  # an agent could go on, and has not yet
        self._kubelets = kubelets
        self._draw = draw
        self._agents = agents
        self._counts = kubelets.api.counts

    def step(self, uid: str, engine: Engine) -> None:
        """What an engine does by itself."""
        if engine.dies_at is not None and self._kubelets.now >= engine.dies_at:
            self._counts[_death(engine)] += 1
            self._kubelets.end_container(uid, oom=engine.dies_of_memory)
        elif engine.phase == "Starting" and self._kubelets.now >= engine.boots_until:
            engine.phase = "Booting"
        elif engine.repaired_at is not None and self._kubelets.now >= engine.repaired_at:
            self._counts["commit breaks in the middle and is repaired"] += 1
            engine.phase, engine.repaired_at = "Serving", None
            engine.confirmed_at = self._kubelets.clock(self._kubelets.api.get("pod", uid).node)
        elif (
            engine.committing
            and engine.busy_until is not None
            and self._kubelets.now >= engine.busy_until
        ):
            self._finish_commit(uid, engine)

    def steer(self, uid: str, engine: Engine, wanted: PodAssignment, agent: AgentProcess) -> None:
        """One frame between agent and engine, or two where it answers at once."""
        if (
            engine.phase in ("Starting", "Dirty")
            or engine.committing
            or wanted.token < engine.token
        ):
            return
        memory = agent.memory(uid, engine)
        memory.only((wanted.digest, wanted.prepare))
        if engine.phase == "Booting" and not wanted.digest:
            engine.phase, engine.boots, engine.token = "Serving", False, wanted.token
            return
        digest = agent.aim(engine, wanted, memory)
        if engine.prepared not in (digest or wanted.digest, wanted.prepare):
            engine.prepared = ""
        goal = agent.goal(digest, wanted)
        if (
            not digest
            or digest == engine.digest
            or not agent.holds(digest)
            or memory.gave_up(digest, goal)
        ):
            return
        if digest == wanted.golden and self._lacks_golden_tokens(uid, engine, memory, goal, digest):
            return
        if engine.prepared != digest:
            self._prepare(uid, engine, digest, memory, goal)
        if digest == wanted.digest and engine.prepared == digest:
            if self._draw.random() >= 0.5:
                self.hesitates = True
                return
            effort = memory.effort("Commit", digest, goal)
            if effort.again_at is None or self._kubelets.now >= effort.again_at:
                self._commit(uid, engine, wanted)

    def _lacks_golden_tokens(
        self, uid: str, engine: Engine, memory: Memory, goal: Goal, digest: str
    ) -> bool:
        """Whether the version is given up before the engine is asked, as the agent knows enough."""
        if self.faults.flaw("unrecorded", uid, digest) is None:
            return False
        self._counts["version has no golden tokens where they are demanded"] += 1
        if engine.prepared == digest:  # from before it was demanded
            engine.prepared = ""
        memory.effort("Prepare", digest, goal)
        memory.fails(
            "Prepare",
            digest,
            "NoGoldenTokens",
            self._kubelets.now,
            booting=engine.boots,
            lasting=True,
        )
        return True

    def _prepare(self, uid: str, engine: Engine, digest: str, memory: Memory, goal: Goal) -> None:
        memory.effort("Prepare", digest, goal)
        if engine.preparing != digest:
            engine.preparing = digest
            engine.busy_until = self._kubelets.now + timedelta(
                seconds=self._draw.choice((0.0, 0.0, 1.0, 2.0))
            )
            flaw = self.faults.flaw("killing", uid, digest)
            if flaw is not None and not engine.boots:  # a second copy beside the one that serves
                engine.dies_at, engine.dies_of_memory = (
                    self._kubelets.now + timedelta(seconds=1.0),
                    flaw.oom,
                )
                engine.busy_until = self._kubelets.now + timedelta(seconds=60.0)
        if engine.busy_until is not None and self._kubelets.now < engine.busy_until:
            return
        engine.preparing = ""
        refused = self.faults.flaw("refused", uid, digest) is not None
        at_boot = engine.boots and self.faults.flaw("refused at boot", uid, digest) is not None
        if refused or at_boot:
            self._counts[
                "engine refuses at boot" if engine.boots else "engine refuses to prepare"
            ] += 1
            memory.fails(
                "Prepare",
                digest,
                "ShapeMismatch",
                self._kubelets.now,
                booting=engine.boots,
                lasting=True,
            )
            return
        engine.prepared = digest
        memory.succeeded(digest)

    def _commit(self, uid: str, engine: Engine, wanted: PodAssignment) -> None:
        """The label goes before the switch begins, and the gate where it is no short one; short
        commits are over before anybody has looked.
        """
        engine.committing, engine.token = wanted.digest, wanted.token
        if not engine.boots:
            engine.phase = "Committing"
        seconds = self._draw.choice((0.0, 0.0, 0.5, 2.5))
        is_short = seconds < 1.0 and self._stays_in_service(uid, engine, wanted)
        self._kubelets.mark(uid, is_short, "", DIGEST_LABEL)
        engine.busy_until = self._kubelets.now + timedelta(seconds=seconds)
        if not seconds:
            self._finish_commit(uid, engine)

    def _finish_commit(self, uid: str, engine: Engine) -> None:
        digest, engine.committing, engine.busy_until = engine.committing, "", None
        if self._commit_fails(uid, engine, digest):
            return
        pod: Pod = self._kubelets.api.get("pod", uid)
        engine.phase, engine.digest, engine.boots, engine.prepared = "Serving", digest, False, ""
        engine.probe = "Golden"
        if self.faults.flaw("unrecorded", uid, digest) is not None:
            engine.probe = "Ran"
            self._counts["version has no golden tokens where they are not demanded"] += 1
        engine.confirmed_at = self._kubelets.clock(pod.node)
        self.confirmations.add((uid, digest, engine.life))
        memory = self._heard(uid, engine)
        if memory is not None:
            memory.succeeded(digest)
            memory.efforts.pop(("Commit", digest), None)
        crash = self.faults.flaw("crashing", uid, digest)
        engine.dies_at = self._kubelets.now + timedelta(seconds=crash.seconds) if crash else None

    def _commit_fails(self, uid: str, engine: Engine, digest: str) -> bool:
        flaw = self.faults.flaw("dirty", uid, digest)
        if flaw is not None or (uid in self.faults.dirty_commits and not engine.boots):
            repairs = self.faults.dirty_commits.pop(uid, True)
            engine.phase, engine.prepared = "Dirty", ""
            if repairs and not engine.boots:
                engine.repaired_at = self._kubelets.now + timedelta(
                    seconds=flaw.seconds if flaw else REPAIR_SECONDS
                )
            else:
                engine.digest, engine.confirmed_at = "", None
                engine.dies_at = self._kubelets.now + timedelta(seconds=15)
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
            self._counts[
                "probe gives wrong tokens at boot" if engine.boots else "probe gives wrong tokens"
            ] += 1
            self._note_failure(uid, engine, digest, "ProbeMismatch", lasting=True)
        else:
            self._note_failure(uid, engine, digest, "CommitFailed", lasting=False)
        return True

    def _heard(self, uid: str, engine: Engine) -> Memory | None:
        """The agent's memory of the engine, if it lives to hear the answer."""
        agent = self._agents.get(self._kubelets.api.get("pod", uid).node)
        return agent.memory(uid, engine) if agent is not None else None

    def _note_failure(
        self, uid: str, engine: Engine, digest: str, reason: str, *, lasting: bool
    ) -> None:
        memory = self._heard(uid, engine)
        if memory is None or ("Commit", digest) not in memory.efforts:
            return
        effort = memory.fails(
            "Commit", digest, reason, self._kubelets.now, booting=engine.boots, lasting=lasting
        )
        if not lasting:
            how = (
                "until it is given up" if effort.given_up else "and succeeds when it is tried again"
            )
            self._counts[f"commit fails {how}"] += 1

    def mark(self, uid: str, engine: Engine, wanted: PodAssignment) -> None:
        """The gate is True when the engine serves what its pod is assigned, and stays so while that
        changes.
        """
        settled = engine.phase == "Serving" and wanted.token >= engine.token
        serves = settled and wanted.digest in ("", engine.digest)
        gate = serves or self._stays_in_service(uid, engine, wanted)
        label = digest_label(engine.digest) if engine.phase == "Serving" else ""
        self._kubelets.mark(uid, gate, label, DIGEST_LABEL)

    def _stays_in_service(self, uid: str, engine: Engine, wanted: PodAssignment) -> bool:
        """By Keep: what it served it goes on to serve, and pauses for a moment only."""
        if wanted.mode != "Keep" or engine.phase not in ("Serving", "Committing"):
            return False
        pod: Pod | None = self._kubelets.api.get("pod", uid)
        confirmed = engine.phase == "Serving" and engine.confirmed_at is not None
        return pod is not None and (pod.gate or confirmed)


def _death(engine: Engine) -> str:
    """How an engine comes to its end, for the counts."""
    if engine.phase == "Dirty":
        return "commit breaks in the middle and the engine dies"
    if engine.preparing:
        return (
            f"engine {'is killed for its memory' if engine.dies_of_memory else 'dies'} while it "
            "prepares"
        )
    return "engine dies after it served"
