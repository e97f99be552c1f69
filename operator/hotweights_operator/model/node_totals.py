"""A rollout's pods on one node, added up: what a decision about the fleet needs of them.

A thousand nodes are a thousand totals, and one is made anew only when something on its node has
changed; so what a decision costs is a few additions for each of the others. Whoever adds them up
gets what counting all pods would give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from hotweights_crds.nodeweights import ProbeStrength
from hotweights_crds.weightrollout import Failure
from hotweights_operator.model import failures
from hotweights_operator.model.objects import NodeState, Refusal
from hotweights_operator.model.targets import Target

# before any pod was seen: how long it waits from then on is the moment at which it has settled
LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class TotalsQuery:
    """What is asked of every node."""

    digest: str  # the target; empty: there is none yet
    revision: int
    is_back: bool  # to what was complete before
    previous: str  # the digest that one could go back to
    min_ready_seconds: float
    needs_golden: bool = False  # pods may take the target only with golden tokens


@dataclass(frozen=True, slots=True, eq=False)
class NodeTotals:
    """One node's pods of one rollout, added up for one query. Compared by identity."""

    node: str
    targets: tuple[Target, ...]
    failed: Mapping[str, Failure]  # by pod UID
    missing: Mapping[str, Failure]
    unreachable: frozenset[str]  # UIDs of pods to which nothing can be told now
    prepared: int  # pods that have the target at hand, or serve it
    updated: int  # pods that serve it
    golden: int  # of those, proved by golden tokens
    ran: int  # of those, proved by a probe without NaN
    # of service with what they are told, though perhaps not for long enough
    available: tuple[Target, ...]
    unavailable: tuple[Target, ...]
    settles_at: datetime  # from then on all that are available have been so for long enough
    holds: bool  # the node has the target whole
    holds_previous: bool
    bytes_done: int
    bytes_total: int

    def ready(self, query: TotalsQuery, now: datetime) -> int:
        """Pods that serve the target and have been of service for long enough."""
        settled = now >= self.settles_at
        return sum(
            1
            for t in self.available
            if t.serves(query.digest)
            and (settled or t.wait_seconds(query.min_ready_seconds, now) <= 0)
        )


def build(
    rollout_uid: str,
    node: str,
    targets: tuple[Target, ...],
    state: NodeState | None,
    query: TotalsQuery,
    refusal: Refusal | None,
) -> NodeTotals:
    """The totals of one node. ``state`` is None while the node has no object, ``refusal`` while no
    write to it was refused. `Observed.node_totals` calls it when something on the node has changed.
    """
    digest = query.digest
    failed: dict[str, Failure] = {}
    missing: dict[str, Failure] = {}
    deaf: set[str] = set()  # to the demand for golden tokens
    without_room = failures.without_room(rollout_uid, targets)
    for target in targets:
        # whatever spoke against it before, it serves
        if target.serves(digest):
            continue
        if failure := failures.of_version(
            target, digest, rollout_uid, query.revision, is_back=query.is_back
        ):
            failed[target.pod.uid] = failure
        elif failure := failures.of_circumstance(
            target, refusal, has_room=target.pod.uid not in without_room
        ):
            missing[target.pod.uid] = failure
        elif query.needs_golden and (failure := failures.of_older_agent(target)):
            missing[target.pod.uid] = failure
            deaf.add(target.pod.uid)
    available = tuple(t for t in targets if t.available)
    # the same for all pods of a node
    follows = bool(targets) and targets[0].follows
    staged = state.staged(digest) if state and follows else None
    return NodeTotals(
        node=node,
        targets=targets,
        failed=failed,
        missing=missing,
        unreachable=frozenset(t.pod.uid for t in targets)
        if refusal and not refusal.is_due
        else frozenset(without_room) | deaf,
        prepared=sum(1 for t in targets if t.serves(digest) or t.prepared(digest)),
        updated=sum(1 for t in targets if t.serves(digest)),
        golden=_proved(targets, digest, "Golden"),
        ran=_proved(targets, digest, "Ran"),
        available=available,
        unavailable=tuple(t for t in targets if not t.available),
        settles_at=max(
            (_settles_at(t, query.min_ready_seconds) for t in available), default=LONG_AGO
        ),
        holds=staged is not None and staged.phase == "Staged",
        holds_previous=follows and state is not None and state.holds(query.previous),
        bytes_done=staged.bytes_done if staged else 0,
        bytes_total=staged.bytes_total if staged else 0,
    )


def _proved(targets: Sequence[Target], digest: str, probe: ProbeStrength) -> int:
    """How many serve it and were proved by just this, by their engines' word for it."""
    return sum(
        1 for t in targets if t.serves(digest) and t.engine is not None and t.engine.probe == probe
    )


def _settles_at(target: Target, min_ready_seconds: float) -> datetime:
    return LONG_AGO + timedelta(seconds=target.wait_seconds(min_ready_seconds, LONG_AGO))
