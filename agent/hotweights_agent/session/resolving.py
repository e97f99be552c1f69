"""Sources that this agent is to read, so that a WeightVersion gets its digest.

By level: each listed item is read until it was read once; what failed is tried again, ever more
rarely, for as long as it is listed, and soon only where it may pass by itself: a source that
somebody has to repair needs nobody to say so afterwards. A few are read at a time, those that
failed least first, so that nobody's broken sources keep others' waiting. One that is not listed any
more, or takes too long, is called off.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hotweights_agent.session.effects import CancelResolve, Effect, Resolve
from hotweights_agent.session.messages import ResolveDone
from hotweights_agent.session.retry import RetryPolicy, RetryState
from hotweights_common.backoff import Backoff
from hotweights_common.reasons import Reason
from hotweights_common.sanitize import clip
from hotweights_crds.nodeweights import ResolvedVersion, ResolveItem

# what passes by itself, such as a file server that restarts, is soon over
PACE = RetryPolicy(most=None, backoff=Backoff(2.0, 60.0))
SLOW_PACE = RetryPolicy(most=None, backoff=Backoff(60.0, 600.0))
"""For what somebody must repair."""
READ_SECONDS = 1800.0
"""For one source. What cannot be read in the time that staging has by default could not be staged
either.
"""
AT_ONCE = 4
"""Sources that are read at the same time, so that one that is slow keeps no other waiting. The
stager has twice as many threads, because one that was called off may still hang in its read.
"""


@dataclass(slots=True)
class _Reading:
    item: ResolveItem
    phase: Literal["Waiting", "Reading", "Done"] = "Waiting"
    began_at: float = 0.0  # seconds; of the reading under way
    retries: RetryState = field(default_factory=RetryState)
    result: ResolvedVersion | None = None  # None: no reading has ended yet


class Resolving:
    """The sources that are listed for this agent, by UID of their WeightVersion."""

    def __init__(self) -> None:
        self._readings: dict[str, _Reading] = {}

    def wanted(self, items: dict[str, ResolveItem]) -> list[Effect]:
        """What is listed now; an item that changed is read anew."""
        kept = {
            uid: r for uid, r in self._readings.items() if uid in items and r.item == items[uid]
        }
        off = [uid for uid, r in self._readings.items() if uid not in kept and r.phase == "Reading"]
        self._readings = {uid: kept.get(uid) or _Reading(item) for uid, item in items.items()}
        return [CancelResolve(uid) for uid in off]

    def done(self, message: ResolveDone, now: float) -> None:
        """A reading ended; one that was called off meanwhile counts for nothing."""
        reading = self._readings.get(message.result.uid)
        if reading is not None and reading.phase == "Reading":
            _end(reading, message, now)

    def next_effects(self, now: float) -> list[Effect]:
        """What to read now, and what to stop."""
        effects: list[Effect] = []
        reading = [r for r in self._readings.values() if r.phase == "Reading"]
        for late in [r for r in reading if now >= r.began_at + READ_SECONDS]:
            text = (
                f"{late.item.uri} was not read within {READ_SECONDS:g} s; publish it with its "
                "manifest, or see what is slow"
            )
            _end(
                late,
                ResolveDone(
                    ResolvedVersion(uid=late.item.uid, reason=Reason.RESOLVE_TIMEOUT, message=text)
                ),
                now,
            )
            reading.remove(late)
            effects.append(CancelResolve(late.item.uid))
        due = [
            r for r in self._readings.values() if r.phase == "Waiting" and r.retries.may_start(now)
        ]
        # as many as there is room for, and never a negative number: no more are begun
        for one in sorted(due, key=lambda r: r.retries.failures)[: AT_ONCE - len(reading)]:
            one.phase, one.began_at = "Reading", now
            effects.append(Resolve(one.item))
        return effects

    def status(self) -> list[ResolvedVersion]:
        """What reading gave so far, for the node's status, sorted by UID."""
        return [r.result for _, r in sorted(self._readings.items()) if r.result is not None]


def _end(reading: _Reading, message: ResolveDone, now: float) -> None:
    result = message.result
    reason, text = clip(result.reason, 64), clip(result.message, 512)
    reading.result = result.model_copy(update={"reason": reason, "message": text})
    reading.phase = "Waiting" if reason else "Done"
    if reason:
        reading.retries = reading.retries.failed(
            now, PACE if message.transient else SLOW_PACE, reason, text
        )
