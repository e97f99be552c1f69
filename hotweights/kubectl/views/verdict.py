"""Whether a rollout has come to an end, and to which: what `status` waits for.

The order matters. A status that does not answer the spec as it stands says nothing of it; a way back
is no success, though all pods serve something; and what is Stalled is so until somebody does
something. Whatever only waits, for pods, a time or a person, goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hotweights_crds.conditions import find, is_true
from hotweights_operator.model.objects import Rollout

Outcome = Literal["Waiting", "Complete", "RolledBack", "Aborted", "Degraded"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where a rollout is. ``line`` is the same as long as nothing of it has changed."""

    outcome: Outcome
    reason: str  # one CamelCase word
    line: str

    def to_dict(self, rollout: Rollout) -> dict[str, Any]:
        """For programs."""
        status = rollout.status
        return {
            "namespace": rollout.namespace,
            "name": rollout.name,
            "outcome": self.outcome,
            "reason": self.reason,
            "phase": status.phase,
            "message": status.message,
            "revision": status.revision,
            "version": status.target.version,
            "pods": status.pods.to_dict(),
            "nodes": status.nodes.to_dict(),
            "bytes": status.nbytes.to_dict(),
        }


def verdict(rollout: Rollout) -> Verdict:
    """Where the rollout is."""
    status = rollout.status
    if status.observed_generation < rollout.generation:
        return Verdict("Waiting", "NotObserved", "the operator has not looked at it yet")
    line = f"{status.phase}: {status.message}"
    ready, stalled = find(status.conditions, "Ready"), find(status.conditions, "Stalled")
    reason = ready.reason if ready else ""
    if status.rolled_back.by:
        back = status.rolled_back
        # on the way too: nobody is to take the end of it for a success
        return Verdict("RolledBack", back.reason or "RolledBack", line)
    if status.revision and status.aborted_revision == status.revision:
        return Verdict("Aborted", reason or "Aborted", line)
    if stalled is not None and stalled.status == "True":
        return Verdict("Degraded", stalled.reason, line)
    if is_true(status.conditions, "Ready"):
        return Verdict("Complete", reason, line)
    return Verdict("Waiting", reason or status.phase, line)
