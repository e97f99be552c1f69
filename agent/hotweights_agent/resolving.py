"""Sources that this agent is to read, so that a WeightVersion gets its digest.

By level: each listed item is read once; a failure that may pass is tried again, ever more rarely, for as long as the item is
listed and at most `PACE.most` times. The operator lists the item elsewhere, or anew, when it wants more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hotweights_agent.effects import Effect, Resolve
from hotweights_agent.messages import ResolveDone
from hotweights_agent.retry import Pace, Tries
from hotweights_agent.text import clip
from hotweights_crds.nodeweights import ResolvedVersion, ResolveItem

PACE = Pace(most=100, first_seconds=2.0, factor=2.0, longest_seconds=60.0)


@dataclass(slots=True)
class _Reading:
    item: ResolveItem
    phase: Literal["Waiting", "Reading", "Done"] = "Waiting"
    tries: Tries = field(default_factory=Tries)
    result: ResolvedVersion | None = None


class Resolving:
    """All sources to read."""

    def __init__(self) -> None:
        self._readings: dict[str, _Reading] = {}

    def wanted(self, items: dict[str, ResolveItem]) -> None:
        """What is listed now; an item that changed is read anew."""
        kept = {uid: r for uid, r in self._readings.items() if uid in items and r.item == items[uid]}
        self._readings = {uid: kept.get(uid) or _Reading(item) for uid, item in items.items()}

    def done(self, message: ResolveDone, now: float) -> None:
        """A reading ended."""
        reading = self._readings.get(message.result.uid)
        if reading is None or reading.phase != "Reading":
            return
        text = clip(message.result.message, 512)
        reading.result = message.result.model_copy(update={"message": text, "reason": clip(message.result.reason, 64)})
        reading.phase = "Done"
        if message.result.reason:
            reading.tries = reading.tries.failed(now, PACE, message.result.reason, text, transient=message.transient)

    def steer(self, now: float) -> list[Effect]:
        """What to read now."""
        effects: list[Effect] = []
        for reading in self._readings.values():
            failed = (
                reading.phase == "Done"
                and bool(reading.tries.reason)
                and not (reading.result and reading.result.digest)
            )
            if reading.phase == "Waiting" or (failed and reading.tries.may_start(now)):
                reading.phase = "Reading"
                effects.append(Resolve(reading.item))
        return effects

    def status(self) -> list[ResolvedVersion]:
        """What reading gave so far."""
        return [r.result for _, r in sorted(self._readings.items()) if r.result is not None]
