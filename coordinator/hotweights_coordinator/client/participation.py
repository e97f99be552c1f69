"""Taking part, as far as the coordinator sees it: register, heartbeat, and register anew when it
has forgotten us. Pure; whoever calls brings a `Client` or an `AsyncClient`.

A coordinator that begins anew, or that heard nothing for its TTL, answers ``UnknownWorker``: the
next call then registers again, under the same name, and says what this worker holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hotweights_common.reasons import Reason
from hotweights_coordinator.wire.messages import CoordinatorError


@dataclass(slots=True)
class Participation:
    """One worker, by the name that it has at the coordinator."""

    worker_id: str
    host: str
    instance: str
    """Of this process: a new one has staged nothing."""
    zone: str = ""
    endpoints: Sequence[str] = ()
    """Where other workers pull from."""
    registered: bool = field(default=False, init=False)

    def next_call(
        self,
        have: Sequence[str] | None = None,
        applied: Mapping[str, Any] | None = None,
        failure: Mapping[str, Any] | None = None,
        engines: int | None = None,
    ) -> tuple[str, dict[str, Any]]:
        """The method to call now, and its arguments: digests that this worker holds (None: it does
        not say), what serves here, why it cannot take part, and how many engines are connected. A
        registration carries none of the last three; the heartbeat after it does.
        """
        if self.registered:
            return "heartbeat", {
                "worker_id": self.worker_id,
                "have": None if have is None else list(have),
                "applied": applied,
                "failure": failure,
                "engines": engines,
            }
        return "register", {
            "worker_id": self.worker_id,
            "host": self.host[:255],  # the most that a call may carry
            "endpoints": list(self.endpoints),
            "zone": self.zone,
            "have": list(have or ()),
            "instance": self.instance,
        }

    def answered(self) -> bool:
        """The call was answered; gives whether that was the registration."""
        was_new, self.registered = not self.registered, True
        return was_new

    def is_forgotten(self, error: CoordinatorError) -> bool:
        """Whether the coordinator does not know this worker: then the next call registers."""
        if error.reason == Reason.UNKNOWN_WORKER:
            self.registered = False
        return not self.registered
