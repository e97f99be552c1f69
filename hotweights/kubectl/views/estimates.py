"""How long things take, by what was measured here before; None where nothing was.

A guess is not an estimate: bytes are at most those of the version, since no status says how many of
its chunks a node has already, and times are of the last version that went the same way. How long an
engine takes to prepare is measured nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

from hotweights.kubectl.views.snapshot import Snapshot
from hotweights_operator.model.objects import NodeState

Basis = Literal["Own", "Fleet", "None"]
"""What an estimate rests on: the same pod's or node's last time, that of others, nothing."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number of seconds; 0 with the basis None."""

    seconds: float
    basis: Basis


@dataclass(frozen=True, slots=True)
class Estimates:
    """What was measured, ready to be asked."""

    pauses: Mapping[str, float]  # pod UID → seconds of its last commit
    kinds: Mapping[str, str]  # pod UID → its engine's kind
    rates: Mapping[str, float]  # node → bytes a second when it last fetched

    def pause(self, pod_uid: str) -> Estimate:
        """How long a pod answers nobody while it changes: as its last commit, else as those of
        engines of its kind (their median).
        """
        own = self.pauses.get(pod_uid)
        if own is not None:
            return Estimate(own, "Own")
        kind = self.kinds.get(pod_uid, "")
        alike = [seconds for uid, seconds in self.pauses.items() if self.kinds.get(uid, "") == kind]
        return Estimate(median(alike), "Fleet") if alike else Estimate(0.0, "None")

    def staging(self, node: str, nbytes: int) -> Estimate:
        """How long a node takes to fetch so many bytes."""
        if not nbytes:
            return Estimate(0.0, "Own")
        own = self.rates.get(node)
        if own is not None:
            return Estimate(nbytes / own, "Own")
        rates = list(self.rates.values())
        return Estimate(nbytes / median(rates), "Fleet") if rates else Estimate(0.0, "None")


def measured(snapshot: Snapshot) -> Estimates:
    """Out of the statuses of all nodes."""
    engines = [e for state in snapshot.states or () for e in state.status.engines]
    return Estimates(
        pauses={e.pod_uid: e.pause_seconds for e in engines if e.pause_seconds > 0},
        kinds={e.pod_uid: e.kind for e in engines},
        rates={
            state.name: rate
            for state in snapshot.states or ()
            if (rate := _rate(state)) is not None
        },
    )


def _rate(state: NodeState) -> float | None:
    """Bytes a second: of all versions that the node fetched, those of the longest fetch count."""
    fetched = [v for v in state.status.staged if v.bytes_fetched and v.seconds > 0]
    longest = max(fetched, key=lambda v: v.seconds, default=None)
    return longest.bytes_fetched / longest.seconds if longest is not None else None
