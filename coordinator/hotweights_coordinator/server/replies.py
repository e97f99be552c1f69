"""What goes out: answers to calls, and events; each is counted."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from hotweights_common.reasons import Reason
from hotweights_coordinator.backends.base import BackendError
from hotweights_coordinator.backends.blobs import Blobs
from hotweights_coordinator.server.metrics import Metrics
from hotweights_coordinator.state.handlers import CallResult
from hotweights_coordinator.state.state import CoordinatorState, Event
from hotweights_coordinator.wire.messages import (
    CallRefused,
    GetPlan,
    answer_frame,
    error_frame,
    json_bytes,
)
from hotweights_coordinator.wire.sockets import Sender, Sockets

Decide = Callable[[CoordinatorState], CallResult]


@dataclass(slots=True)
class PendingCall:
    """A call, from its arrival to its answer. ``to`` None: the server's own, which nobody waits
    for.
    """

    to: Sender | None
    call_id: int | None
    method: str
    arrived: float
    decide: Decide


def unavailable(error: BackendError) -> CallRefused:
    """What a caller hears when the store failed."""
    return CallRefused(error.reason, f"{error}; ask again")


class Replies:
    """One coordinator's voice. Calls come on the loop's thread and return at once."""

    def __init__(
        self,
        sockets: Sockets,
        metrics: Metrics,
        blobs: Blobs,
        spawn: Callable[[Awaitable[None]], None],
    ) -> None:
        """``spawn`` runs what has to wait, and ends it with the server."""
        self._sockets, self._metrics, self._blobs, self._spawn = sockets, metrics, blobs, spawn

    def answer(self, waiting: PendingCall, outcome: CallResult) -> None:
        """Its result, with the blob that goes with it: from the backend where that is not at
        hand.
        """
        if waiting.to is None:
            return
        frames = [answer_frame(waiting.call_id, outcome.result)]
        if outcome.blob:
            blob = self._blobs.at_hand(outcome.blob)
            if blob is None:
                self._spawn(self._answer_later(waiting, outcome))
                return
            frames.append(blob)
        self._sockets.answer(waiting.to, frames)
        self._metrics.answered(waiting.method, "ok", time.monotonic() - waiting.arrived)

    async def _answer_later(self, waiting: PendingCall, outcome: CallResult) -> None:
        try:
            blob = await self._blobs.get(outcome.blob)
        except BackendError as error:
            self.refuse(waiting, unavailable(error))
            return
        if blob is None:
            what = "plan" if waiting.method == GetPlan.method else "manifest"
            reason = Reason.NO_PLAN if what == "plan" else Reason.NO_MANIFEST
            self.refuse(waiting, CallRefused(reason, f"the {what} {outcome.blob} is gone"))
        else:
            self.answer(waiting, outcome)

    def refuse(self, waiting: PendingCall, error: CallRefused) -> None:
        """Answer a call with an error; the server's own calls have nobody to hear of it."""
        if waiting.to is not None:
            self._sockets.answer(waiting.to, [error_frame(waiting.call_id, error)])
            self._metrics.answered(waiting.method, error.reason, time.monotonic() - waiting.arrived)

    def publish(self, events: Iterable[Event]) -> None:
        """Tell of what happened, in that order; only after it was written."""
        for event in events:
            self._sockets.publish(event.topic.encode(), json_bytes(event))
            self._metrics.events.labels(event.topic).inc()
