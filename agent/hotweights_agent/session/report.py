"""What is said about an engine: its entry in the node's status, and what its pod shows.

Pure: facts in, texts out. Reasons are for programs, messages say what happened and what to do.
Labels name only what the engine confirmed. The gate says whether requests may come: it opens when
the engine serves, by its own word, what this pod is assigned, and stays open while that changes, as
long as the port answers (`_stays_in_service`).
"""

from __future__ import annotations

from hotweights_agent.session.connections import Goal, StepFailure
from hotweights_agent.session.effects import PodStatus
from hotweights_agent.session.engine import Engine
from hotweights_agent.session.next_effects import (
    UNMARK_SECONDS,
    given_up,
    goal_for,
    goal_of,
    satisfied,
)
from hotweights_agent.session.phases import Phase
from hotweights_agent.session.versions import NodeVersions
from hotweights_common.reasons import Reason
from hotweights_common.sanitize import clip, short
from hotweights_crds.nodeweights import EngineStatus, GivenUp, PodAssignment

Said = tuple[str, str]  # reason, message

NOT_CONNECTED: Said = (
    Reason.ENGINE_NOT_CONNECTED,
    "the plugin in this pod has not connected to the node's agent: it may be starting; else see "
    "whether the pod was created with the label hotweights.dev/inject and what its log says",
)
SHORT_PAUSES = frozenset({"Beside", "Host"})  # ways in which nothing is loaded in the pause
# from when the label is taken off: waiting for that, a copy, a probe; then a pause is no moment
LONGEST_SWITCH_SECONDS = UNMARK_SECONDS + 2.0
NO_MORE = "not tried again until the assignment, the engine or the version changes"


def engine_status(
    engine: Engine,
    wanted: PodAssignment | None,
    versions: NodeVersions,
    names: dict[str, str],
    stale_token: int,
) -> EngineStatus:
    """Its entry in the node's status."""
    reason, message = explain(engine, wanted, versions, stale_token)
    leader = engine.leader
    return EngineStatus(
        pod_uid=engine.pod.uid,
        pod=f"{engine.pod.namespace}/{engine.pod.name}",
        phase=_told_phase(engine).value,
        digest=engine.confirmed,
        version=names.get(engine.confirmed, ""),
        prepared=engine.prepared,
        way=engine.way if engine.prepared else "",
        # the higher one, so that an operator that lost its numbers finds the next one here
        token=max(wanted.token if wanted else 0, leader.token if leader else 0),
        confirmed_at=leader.confirmed_at if leader and engine.confirmed else "",
        probe=engine.probe,
        kind=leader.kind if leader else "",
        pause_seconds=round(engine.pause_seconds, 6),
        failed=_given_up(engine.failed) if engine.failed else None,
        # 64 and 512: the schema's bounds; a longer text would have the whole status refused
        reason=clip(reason, 64),
        message=clip(message or _caveat(engine), 512),
    )


def _caveat(engine: Engine) -> str:
    """What it still has from before, of one that serves a version that it was given."""
    return engine.leader.caveat if engine.leader is not None and engine.confirmed else ""


def _given_up(failure: StepFailure) -> GivenUp:
    return GivenUp(
        digest=failure.goal.digest,
        rollout=failure.goal.rollout,
        revision=failure.goal.revision,
        token=failure.goal.token,
        step="Prepare" if failure.op == "prepare" else "Commit",
        booting=failure.booting,
        reason=clip(failure.reason, 64),
        message=clip(failure.message, 512),
    )


def _told_phase(engine: Engine) -> Phase:
    """The phase as others mean it: an engine on its way to its first version boots, because it
    answers no request yet.
    """
    leader = engine.leader
    on_its_way = engine.phase in (Phase.PREPARING, Phase.PREPARED, Phase.COMMITTING)
    return (
        Phase.BOOTING
        if on_its_way and leader is not None and leader.state == "Booting"
        else engine.phase
    )


def pod_status(
    engine: Engine,
    wanted: PodAssignment | None,
    versions: NodeVersions,
    names: dict[str, str],
    stale_token: int,
    now_seconds: float,
) -> PodStatus:
    """What its pod is to show. No label while a commit waits for the label to go. ``now_seconds``
    of `Now`.
    """
    confirmed = "" if engine.label_gone_since is not None else engine.confirmed
    version = names.get(confirmed, "")
    if wanted is not None and satisfied(engine, wanted) and not stale_token:
        text = (
            f"serves {version or short(confirmed)} as assigned"
            if confirmed
            else "serves what it booted, as assigned"
        )
        if confirmed and _caveat(engine):
            text += f"; {_caveat(engine)}"
        return PodStatus(True, "Assigned", text, version, short(confirmed))
    reason, message = explain(engine, wanted, versions, stale_token)
    return PodStatus(
        wanted is not None and _stays_in_service(engine, wanted, now_seconds),
        reason or engine.phase.value,
        message,
        version,
        short(confirmed),
    )


def _stays_in_service(engine: Engine, wanted: PodAssignment, now_seconds: float) -> bool:
    """Whether requests may come to one that serves something else than it is assigned: it served
    what it was assigned before, serves that still, and will pause for a moment only. A pod that
    leaves its Service for a pause of 0.1 s is away for a second, and with one replica nobody is
    left.
    """
    leader = engine.leader
    if wanted.mode != "Keep" or leader is None or leader.state != "Serving" or not engine.complete:
        return False
    # what it confirmed in this life it was assigned: an agent that has just begun knows no more
    if not (engine.in_service or engine.confirmed):
        return False
    if engine.label_gone_since is None:
        return True
    is_short = engine.way in SHORT_PAUSES and engine.prepared == wanted.digest
    return is_short and now_seconds < engine.label_gone_since + LONGEST_SWITCH_SECONDS


def explain(
    engine: Engine, wanted: PodAssignment | None, versions: NodeVersions, stale_token: int
) -> Said:
    """Why it does not serve what it should, or why the next version is not ready; empty when all is
    well.
    """
    leader = engine.leader
    # from what is missing most: each reason makes the ones below it meaningless
    if not engine.connected:
        return NOT_CONNECTED
    if engine.unsupported:
        return Reason.ENGINE_UNSUPPORTED, engine.unsupported
    if leader is None:
        return (
            Reason.ENGINE_STARTING,
            f"{len(engine.ranks)} of {engine.world_size} ranks are connected, its API server "
            "is not",
        )
    if engine.phase is Phase.DIRTY:
        text = leader.message or "a switch broke in the middle"
        return (
            leader.reason or "EngineDirty",
            f"paused until it has repaired itself or restarts: {text}",
        )
    if not engine.complete:
        size = engine.world_size or "an unknown number of"
        return (
            Reason.ENGINE_INCOMPLETE,
            f"{len(engine.ranks)} of {size} ranks are connected; the others have not said hello",
        )
    if wanted is None:
        return Reason.NOT_ASSIGNED, "the operator has not said which version this pod is to serve"
    if stale_token:
        return _stale(stale_token, wanted.token)
    if leader.token > wanted.token and not satisfied(engine, wanted):
        return _stale(wanted.token, leader.token)
    unserved = wanted.digest if wanted.digest != engine.confirmed else ""
    digest = unserved or goal_of(engine, wanted, versions)
    return (
        _explain_goal(engine, goal_for(wanted, digest, versions), versions) if digest else ("", "")
    )


def _stale(offered: int, known: int) -> Said:
    return (
        Reason.STALE_TOKEN,
        f"an assignment with token {offered} was refused: {known} is known; the operator "
        "writes a higher one",
    )


def _explain_goal(engine: Engine, goal: Goal, versions: NodeVersions) -> Said:
    """Where an engine is on its way to a version."""
    digest = goal.digest
    over, held = given_up(engine, goal), versions.get(digest)
    if over is not None:
        return over.reason, f"{over.message} ({NO_MORE})"
    if held is None:
        return (
            Reason.NOT_STAGED,
            f"{short(digest)} is in no stage list of this node, so it cannot be handed over",
        )
    if held.phase == "Failed":
        return (
            held.retries.reason,
            f"{held.item.version or short(digest)} is not on this node: {held.retries.message}",
        )
    if held.phase != "Staged":
        # the total is 0 until its manifest was read
        done = 100 * held.bytes_done // max(1, held.bytes_total)
        return (
            "Staging",
            f"{held.item.version or short(digest)} is on its way to this node: {done} %",
        )
    attempt = engine.attempts.get(
        ("commit" if engine.prepared_everywhere(digest) else "prepare", digest)
    )
    if attempt is not None and attempt.retries.reason:
        return attempt.retries.reason, f"{attempt.retries.message} (tried again)"
    if engine.phase is Phase.PREPARED:  # all is well: it waits for its turn
        return "", ""
    return engine.phase.value, f"{held.version or short(digest)}: {engine.phase.value.lower()}"
