"""Since when this process has seen a pod as it is, and what it saw come before: what the pod object
itself cannot prove.

Nodes' clocks differ from ours and from each other, and may be set at any time; so how long
something has been so is measured by our own clock, and what came after what is told by the order in
which it was seen. A new process has seen nothing yet: it waits once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from hotweights_crds.nodeweights import EngineStatus
from hotweights_operator.model.objects import NodeState, Pod

CONNECTED_PHASES = frozenset(
    {"Booting", "Serving", "Preparing", "Prepared", "Committing", "Refused", "Failed", "Dirty"}
)


@dataclass(frozen=True, slots=True)
class PodHistory:
    """What this process has seen of one pod. Times are of our own clock."""

    shown_since: datetime  # Ready, the gate and the digest's label all as they are
    unready_since: datetime | None = None  # not Ready; None: it is
    # when it was first Ready in this life of its container; None: not yet
    served_since: datetime | None = None
    # what stood there as confirmed when its container was first seen to live anew
    confirmed_before: str = ""
    # of its node's object at that moment: what answers a later one is of the new life
    generation: int = 0
    # it became Ready with the gate that it has, so its kubelet has seen that
    answered_gate: bool = False
    heard: bool = False  # its engine has talked to an agent: it is one of ours


def after(
    known: PodHistory | None, old: Pod | None, new: Pod, state: NodeState | None, now: datetime
) -> PodHistory:
    """What is known when a pod is seen to be ``new``; ``old`` is how it was before, ``state`` what
    is known of its node.
    """
    said = state.engine(new.uid) if state else None
    # by restarts, which the kubelet counts: a start time is in whole seconds
    same_life = known is not None and (old is None or old.restarts == new.restarts)
    mine = known if same_life else None
    same = old is not None and known is not None and _shown(old) == _shown(new)
    served_since = mine.served_since if mine else None
    unready_since = known.unready_since if known else None
    return PodHistory(
        shown_since=known.shown_since if same and known else now,
        unready_since=None if new.ready else unready_since or now,
        served_since=served_since or (now if new.ready else None),
        confirmed_before=mine.confirmed_before
        if mine
        else said.confirmed_at
        if old is not None and said
        else "",
        generation=mine.generation if mine else state.generation if state else 0,
        answered_gate=_answered_gate(known, old, new),
        heard=known.heard if known else is_connected(said),
    )


def is_connected(said: EngineStatus | None) -> bool:
    """Whether an engine talks to its agent."""
    return said is not None and said.phase in CONNECTED_PHASES


def _answered_gate(known: PodHistory | None, old: Pod | None, new: Pod) -> bool:
    """Whether a pod was seen to become Ready with the gate that it has."""
    if (
        known is None
        or old is None
        or not (old.gate and new.gate and new.ready)
        or old.gate_since != new.gate_since
    ):
        return False
    return known.answered_gate or not old.ready


def _shown(pod: Pod) -> tuple[bool, bool, str, int]:
    return (pod.ready, pod.gate, pod.digest_label, pod.restarts)
