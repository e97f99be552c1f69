"""How long engines may take to answer, and what becomes of one that does not, or that says no.

A question without an answer by its deadline ends the connection: what the engine then says in its
next hello is the truth, and nothing is guessed. It counts as a failure of what was asked for, like
an engine's own no, and after some of these the version is given up.
"""

from __future__ import annotations

from dataclasses import dataclass

from hotweights_agent.session.connections import Rank, Server, StepFailure
from hotweights_agent.session.effects import Close, Effect
from hotweights_agent.session.engine import Engine
from hotweights_agent.session.retry import RetryPolicy
from hotweights_common.backoff import Backoff
from hotweights_common.reasons import TRANSIENT_FOR_ENGINES, Reason

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
    """How long engines may take to answer; later the connection ends."""

    prepare_seconds: float = 600.0  # the settings say it; it builds a copy of the whole model
    # beyond what the commit itself is allowed: the engine measures that, and its answer travels
    commit_slack_seconds: float = 15.0
    keep_seconds: float = 30.0  # it loads nothing, it only opens its port


def expire(engine: Engine, now: float) -> list[Effect]:
    """End connections that owe an answer; their `Disconnected` then clears what they had said."""
    effects: list[Effect] = []
    processes: list[Server | Rank] = [*engine.servers.values(), *engine.ranks.values()]
    for process in processes:
        asked = process.pending
        if asked is None or now < asked.deadline:
            continue
        reason = _REASONS[asked.op]
        text = f"no answer to {asked.op} in time; the engine's log says what it was doing"
        effects.append(Close(process.conn, reason, text))
        if asked.op != "keep":  # that is about no version
            record_failure(
                engine,
                StepFailure(asked.op, asked.goal, reason, text, booting=engine.booting),
                now,
            )
    return effects


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
