"""What agents write into their node's object: staged versions, engines, and what reading sources
gave.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Mapping, Sequence

from hotweights_crds.nodeweights import (
    EngineStatus,
    NodeWeightsSpec,
    NodeWeightsStatus,
    PodAssignment,
    ResolvedVersion,
    StagedVersion,
)
from hotweights_operator.sim.cluster.agents import NBYTES, AgentProcess
from hotweights_operator.sim.cluster.engine import Engine, Memory


def engine_status(
    uid: str, engine: Engine | None, wanted: PodAssignment, agent: AgentProcess
) -> EngineStatus:
    """An engine's entry; as nobody is there who would validate it, it must be right."""
    if engine is None or engine.phase == "Starting":
        return EngineStatus(
            pod_uid=uid, phase="Disconnected", token=wanted.token, reason="EngineNotConnected"
        )
    memory = agent.memory(uid, engine)
    phase, reason = _phase(engine, wanted, agent, memory)
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
        probe=engine.probe if confirmed else "",
        kind="simulated",
        pause_seconds=0.0,
        failed=memory.failed,
        reason=reason,
        message="simulated" if reason else "",
    )


def node_status(
    node: str,
    agent: AgentProcess,
    generation: int,
    engines: Sequence[EngineStatus],
    spec: NodeWeightsSpec,
    contents: Mapping[str, str],
    unreadable: Collection[str],
) -> NodeWeightsStatus:
    """The whole status of a node's object, as its agent writes it."""
    staged = [
        StagedVersion(
            digest=digest,
            phase="Staged" if done >= NBYTES else "Fetching",
            bytes_done=done,
            bytes_total=NBYTES,
        )
        for digest, done in agent.staged.items()
        if digest not in agent.failed
    ]
    staged += [
        StagedVersion(
            digest=digest, phase="Failed", reason=why, message="model.safetensors: chunk 3"
        )
        for digest, why in agent.failed.items()
    ]
    resolved = [
        ResolvedVersion(
            uid=item.uid, reason="SourceNotAllowed", message="not under an allowed root"
        )
        if item.uri in unreadable
        else ResolvedVersion(
            uid=item.uid, digest=contents[item.uri], nbytes=NBYTES, tensors=1, chunks=1
        )
        for item in spec.resolve
    ]
    return NodeWeightsStatus(
        observed_generation=generation,
        boot_id=f"boot-{agent.boot}",
        endpoint=f"tcp://{node}:1",
        peer_key=peer_key(node, agent.boot),
        staged=staged,
        engines=list(engines),
        resolved=resolved,
    )


def peer_key(node: str, boot: int) -> str:
    """Of one start of an agent, as a real one looks; nobody has the other half."""
    public = hashlib.sha256(f"{node} {boot}".encode()).digest()
    return f"ed25519:{base64.b64encode(public).decode()}"


def _phase(
    engine: Engine, wanted: PodAssignment, agent: AgentProcess, memory: Memory
) -> tuple[str, str]:
    """The engine's phase as an agent calls it, and the reason where something failed."""
    if engine.phase in ("Dirty", "Committing"):
        return engine.phase, "EngineDirty" if engine.phase == "Dirty" else ""
    digest = agent.aim(engine, wanted, memory)
    if digest and digest != engine.digest:
        gone = memory.gave_up(digest, agent.goal(digest, wanted))
        if gone is not None:
            return "Refused" if gone.reason == "ShapeMismatch" else "Failed", gone.reason
        if not engine.boots and (engine.preparing or engine.prepared == digest):
            return "Preparing" if engine.preparing else "Prepared", ""
    return engine.phase, ""
