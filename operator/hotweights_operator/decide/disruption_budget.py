"""How many pods may be of no service at once, as a Service and a Deployment count them. Arithmetic
only.

Every live pod counts: one that is new, one that starts again, one that was told to change and does
not show yet that it did. Only a pod that has been of no service for so long, or ends as often as it
starts, or is never heard of, that waiting for it would stop everybody is left out; it is named
among the failures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from hotweights_crds.weightrollout import Strategy
from hotweights_operator.model import failures
from hotweights_operator.model.node_totals import NodeTotals
from hotweights_operator.model.targets import Target

GIVEN_UP_SECONDS = 300.0
"""Of no service for so long, by our own clock: nobody waits for it any more, or one dead pod would
stop every rollout.
"""

STRANGER_SECONDS = 60.0
"""The same for one that was never Ready and whose engine is not heard of: it runs without the
plugin, or does not run vLLM.
"""


@dataclass(frozen=True, slots=True)
class Availability:
    """Pods by whether they are of service."""

    available: int  # for as long as the spec asks
    unavailable: int  # these cost the budget
    left_out: int  # of no service, and waited for no more
    # when this may come out differently though nothing happened; None: never
    again_in_seconds: float | None


def limit(strategy: Strategy, desired: int) -> int:
    """How many of ``desired`` pods may be unavailable at once. A percentage rounds down and never
    to nobody, as a Deployment's maxUnavailable does without a surge
    (https://kubernetes.io/docs/concepts/workloads/controllers/deployment/#max-unavailable).
    """
    if strategy.type == "AllAtOnce":
        return desired
    # one, where the spec says nothing: the least that gets anywhere
    value = strategy.rolling.max_unavailable if strategy.rolling else 1
    if isinstance(value, str):
        return max(1, desired * int(value.removesuffix("%")) // 100)
    return max(1, value)


def waited_for_seconds(target: Target, now: datetime) -> float:
    """How long a pod that is of no service is waited for from now on; 0: no longer."""
    since = target.seen.unready_since
    # it will not stay of service on this version, however long anybody waits
    if target.crashes >= failures.CRASHES:
        return 0.0
    # one that was heard of once may only be away; and without its agent none can be heard of
    is_stranger = target.follows and not target.seen.heard and not target.pod.was_ready
    patience = STRANGER_SECONDS if is_stranger else GIVEN_UP_SECONDS
    return max(0.0, patience - (now - since).total_seconds()) if since is not None else patience


def count_availability(
    all_totals: Iterable[NodeTotals], min_ready_seconds: float, now: datetime
) -> Availability:
    """How many pods are of service, of no service, and waited for no more. A pod that became
    available less than ``min_ready_seconds`` ago counts as unavailable, as with a Deployment's
    minReadySeconds.
    """
    available = unavailable = left_out = 0
    waits: list[float] = []
    for totals in all_totals:
        available += len(totals.available)
        # after that moment none of the node's pods needs to be looked at
        if now < totals.settles_at:
            early = [
                wait
                for t in totals.available
                if (wait := t.wait_seconds(min_ready_seconds, now)) > 0
            ]
            available -= len(early)
            unavailable += len(early)
            waits += early
        for target in totals.unavailable:
            wait = waited_for_seconds(target, now)
            if not wait:
                left_out += 1
                continue
            unavailable += 1
            waits.append(wait)
    return Availability(available, unavailable, left_out, min(waits, default=None))


def choose(
    candidates: Sequence[Target],
    counts: Availability,
    strategy: Strategy,
    desired: int,
    min_ready_seconds: float,
    now: datetime,
) -> list[Target]:
    """The candidates that may change now. One that is of no service costs nothing; the last one
    that is never goes, unless it is the only pod that is waited for or the strategy lets all go at
    once. Keeps the order of the candidates. Both budgets go down within the pass: what is chosen
    here is not seen as unavailable before the next one.
    """
    most = limit(strategy, desired)
    room = most - counts.unavailable
    spare = (
        counts.available
        if most >= desired or counts.available + counts.unavailable == 1
        else counts.available - 1
    )
    chosen: list[Target] = []
    for target in candidates:
        if target.available_for(min_ready_seconds, now):
            # (on to the next one: it may be of no service, and then it costs nothing)
            if room < 1 or spare < 1:
                continue
            room, spare = room - 1, spare - 1
        elif target.is_shown and room < 0:
            # it is counted already, though requests reach it: it costs nothing more, but only
            # within the budget
            continue
        chosen.append(target)
    return chosen
