"""The node's status as a whole, within the bounds of its lists.

The API server refuses a status with a list that is too long, all of it, and goes on showing the one
before. So whoever writes a bounded list cuts it, what others need most stays, and what is not in it
is said. Pure, like `report`, which tells of one engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from hotweights_agent.session.assignments import Assignments
from hotweights_agent.session.defects import contained
from hotweights_agent.session.engine import Engine
from hotweights_agent.session.next_effects import satisfied
from hotweights_agent.session.report import engine_status
from hotweights_agent.session.resolving import Resolving
from hotweights_agent.session.versions import NodeVersions
from hotweights_crds.nodeweights import (
    MAX_ENGINES,
    MAX_RESOLVE,
    MAX_STAGED,
    Capacity,
    EngineStatus,
    NodeWeightsStatus,
    PodAssignment,
)

T = TypeVar("T")
Listed = tuple[Engine, PodAssignment | None]


def node_status(
    head: NodeWeightsStatus,
    listed: Sequence[Listed],
    assignments: Assignments,
    versions: NodeVersions,
    resolving: Resolving,
    defect: Callable[[Exception], None],
) -> NodeWeightsStatus:
    """``head`` with everything in it, but for the conditions, which carry times (the writer adds
    them). An engine that cannot be told of is a ``defect``. The bounds are those of the schema.
    """
    cut, names = _Cut(), assignments.version_names()
    right = sum(1 for engine, wanted in listed if wanted is not None and satisfied(engine, wanted))
    # what pods are to serve or serve stays first: new pods boot from a node that holds it
    first = {wanted.digest for _, wanted in listed if wanted} | {
        engine.confirmed for engine, _ in listed
    }
    then = {wanted.prepare for _, wanted in listed if wanted}
    staged = cut(
        versions.status(),
        MAX_STAGED,
        "versions",
        lambda s: 0 if s.digest in first else 1 if s.digest in then else 2,
    )
    engines: list[EngineStatus] = []
    for engine, wanted in cut(listed, MAX_ENGINES, "engines", lambda one: not one[0].connected):
        with contained(defect):
            engines.append(
                engine_status(
                    engine, wanted, versions, names, assignments.stale.get(engine.pod.uid, 0)
                )
            )
    resolved = cut(resolving.status(), MAX_RESOLVE, "sources", lambda _: 0)
    return head.model_copy(
        update={
            "staged": staged,
            "engines": engines,
            "resolved": resolved,
            "summary": f"{right}/{len(listed)}",
            "left_out": cut.left_out,
        }
    )


def without_progress(status: NodeWeightsStatus) -> NodeWeightsStatus:
    """What must be written at once: all but how far a fetch is, and the texts that say it."""
    staged = [
        s if s.phase != "Fetching" else s.model_copy(update=_NO_PROGRESS) for s in status.staged
    ]
    engines = [
        e if e.reason != "Staging" else e.model_copy(update={"message": ""}) for e in status.engines
    ]
    # free memory moves with every chunk
    return status.model_copy(update={"staged": staged, "engines": engines, "capacity": Capacity()})


# as a version looks that has only just been begun
_NO_PROGRESS = {"bytes_done": 0, "bytes_total": 0, "bytes_fetched": 0, "seconds": 0.0}


class _Cut:
    """Cuts the lists of one status and remembers what went."""

    def __init__(self) -> None:
        self._left: list[str] = []

    @property
    def left_out(self) -> str:
        """``12 of 268 versions, 3 of 515 engines``; empty: nothing."""
        return ", ".join(self._left)

    def __call__(
        self, items: Sequence[T], most: int, what: str, rank: Callable[[T], int]
    ) -> list[T]:
        """At most ``most`` of them, in their order; those with the lowest rank stay."""
        if len(items) <= most:
            return list(items)
        self._left.append(f"{len(items) - most} of {len(items)} {what}")
        # stable: the first of a rank stay
        by_rank = sorted(range(len(items)), key=lambda i: rank(items[i]))
        return [items[i] for i in sorted(by_rank[:most])]
