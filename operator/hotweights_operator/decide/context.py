"""What one pass over a rollout has found out, for those that say something about it: its status,
its conditions, its events.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_operator.decide.blocked import Blocked
from hotweights_operator.model.failures import Failures
from hotweights_operator.model.node_totals import NodeTotals, TotalsQuery
from hotweights_operator.model.objects import Rollout, Version
from hotweights_operator.model.observed import Observed


@dataclass(frozen=True, slots=True)
class PassContext:
    """All that a pass has found out. `rollouts` makes one in each pass and hands it on."""

    rollout: Rollout
    base: WeightRolloutStatus  # the old status at the right revision
    query: TotalsQuery
    all_totals: tuple[NodeTotals, ...]
    failures: Failures
    blocked: Blocked
    version: Version | None  # None: the spec names one that does not exist
    observed: Observed
    # pods that are not asked to prepare yet, because their containers ended soon after they started
    restarted: int = 0
    started_at: datetime | None = None  # since when this process decides; None: for ever
