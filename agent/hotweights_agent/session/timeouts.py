"""How long engines may take to answer, and what becomes of one that does not, or that says no.

A leader that does not answer by its deadline loses its connection: what it says in its next hello is
the truth, and nothing is guessed. A rank that is slow to prepare keeps its connection, because what
the engine serves is not in question: the question is called off, and asked anew. Both count as a
failure of what was asked for, like an engine's own no, and after some of these the version is given
up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hotweights_agent.session.connections import PendingRequest, StepFailure
from hotweights_agent.session.effects import Close, Effect, Send
from hotweights_agent.session.engine import Engine
from hotweights_agent.session.retry import RetryPolicy
from hotweights_common.backoff import Backoff
from hotweights_common.reasons import TRANSIENT_FOR_ENGINES, Reason
from hotweights_transports.handoff import frames

# three tries, 1 s and 4 s apart: only when they are over is a version called given up, and the
# rollout waits for that
PREPARE_RETRIES = RetryPolicy(most=3, backoff=Backoff(1.0, 60.0, factor=4.0))
# as often, though each try takes the pod's label off anew
COMMIT_RETRIES = RetryPolicy(most=3, backoff=Backoff(1.0, 60.0, factor=4.0))

_REASONS = {
    "prepare": Reason.PREPARE_TIMEOUT,
    "commit": Reason.COMMIT_TIMEOUT,
    "keep": Reason.KEEP_TIMEOUT,
}


@dataclass(frozen=True, slots=True)
class EngineTimeouts:
    """How long engines may take to answer."""

    prepare_seconds: float = 600.0  # the settings say it; it builds a copy of the whole model
    # beyond what the commit itself is allowed: the engine measures that, and its answer travels
    commit_slack_seconds: float = 15.0
    keep_seconds: float = 30.0  # it loads nothing, it only opens its port


def expire(engine: Engine, now: float, next_id: Callable[[], int]) -> list[Effect]:
    """Give up questions that were not answered in time. ``now`` in seconds; ``next_id`` numbers the
    frames that this takes. A `Close` is to be followed by its `Disconnected`, which clears what the
    process had said.
    """
    effects: list[Effect] = []
    for server in engine.servers.values():
        if server.pending is not None and now >= server.pending.deadline:
            asked, failure = server.pending, _late(engine, server.pending)
            effects.append(Close(server.conn, failure.reason, failure.message))
            if asked.op != "keep":  # that is about no version
                record_failure(engine, failure, now)
    for rank in engine.ranks.values():
        if rank.pending is not None and now >= rank.pending.deadline:
            asked, rank.pending = rank.pending, None
            if rank.called_off == asked.id:  # nobody wanted it any more: no failure either
                continue
            if asked.op == "map":  # no `Release` either: it is the way back of what it serves
                rank.rejected[asked.goal.digest] = asked.goal
                continue
            # a rank does its orders one after the other, so it lets go of the version before it is
            # asked anew; a late answer repeats an id that nobody waits for any more
            effects.append(Send(rank.conn, frames.Release(next_id(), asked.goal.digest)))
            record_failure(engine, _late(engine, asked), now)
    return effects


def _late(engine: Engine, asked: PendingRequest) -> StepFailure:
    text = f"no answer to {asked.op} in time; the engine's log says what it was doing"
    return StepFailure(asked.op, asked.goal, _REASONS[asked.op], text, booting=engine.booting)


def record_failure(engine: Engine, failure: StepFailure, now: float) -> None:
    """Count a failure of what is still asked for. What may pass counts once where several ranks say
    it within one wait. Sets `Engine.failed` when that was the last try. ``now`` in seconds.
    """
    attempt = engine.attempts.get((failure.op, failure.goal.digest))
    transient = failure.reason in TRANSIENT_FOR_ENGINES and not failure.dirty
    if attempt is None or attempt.goal != failure.goal or attempt.retries.given_up:
        return
    if transient and not attempt.retries.may_start(now):  # another rank said it before
        return
    policy = PREPARE_RETRIES if failure.op == "prepare" else COMMIT_RETRIES
    attempt.retries = attempt.retries.failed(
        now, policy, failure.reason, failure.message, transient=transient
    )
    if (
        attempt.retries.given_up and failure.reason != Reason.STALE_TOKEN
    ):  # that speaks against the order, not against the version
        engine.failed = failure
