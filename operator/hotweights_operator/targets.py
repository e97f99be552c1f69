"""Which pods a rollout selects, to whom a pod belongs, and all that is known about each.

A pod belongs to the oldest rollout that selects it, whatever comes later. A younger rollout that selects it too is in conflict
and holds still: it would be wrong half of the time to guess what was meant. This knows selectors and evidence, no strategy.
"""

from __future__ import annotations

from dataclasses import dataclass

from hotweights_crds.nodeweights import EngineStatus, PodAssignment
from hotweights_operator import times
from hotweights_operator.model import STILL_SERVING_PHASES, Node, NodeState, Observed, Pod, Rollout, confirmed
from hotweights_operator.selectors import selects

CONNECTED_PHASES = frozenset(
    {"Booting", "Serving", "Preparing", "Prepared", "Committing", "Refused", "Failed", "Dirty"}
)


@dataclass(frozen=True, slots=True)
class Target:
    """A selected pod, and what its node's agent says of it. ``engine`` is None unless that word counts now."""

    pod: Pod
    node: Node | None
    state: NodeState | None
    engine: EngineStatus | None
    assigned: PodAssignment | None
    follows: bool  # its node's agent is there and speaks
    answered: bool  # the agent has seen the spec as it stands

    @property
    def connected(self) -> bool:
        """Whether its engine talks to the agent."""
        return self.engine is not None and self.engine.phase in CONNECTED_PHASES

    def serves(self, digest: str) -> bool:
        """Whether its engine has proved that it serves this digest."""
        confirmed_at = times.parse(self.engine.confirmed_at) if self.engine else None
        return confirmed(self.pod, self.engine, digest, confirmed_at)

    @property
    def outstanding(self) -> bool:
        """Whether it was told to serve something and has not proved that it does; what it refuses beside is no matter.

        What an agent said last still counts here when it is gone: without one, an engine changes only by restarting.
        """
        if self.assigned is None or not self.assigned.digest:
            return False
        said = self.state.engine(self.pod.uid) if self.state else None
        confirmed_at = times.parse(said.confirmed_at) if said else None
        return not confirmed(self.pod, said, self.assigned.digest, confirmed_at, STILL_SERVING_PHASES)

    @property
    def unavailable(self) -> bool:
        """Whether it is of no service now, for whatever reason. One that never was takes nothing from anybody."""
        return self.pod.was_ready and (not self.pod.ready or self.outstanding)

    def prepared(self, digest: str) -> bool:
        """Whether a commit of this digest would be only a pause."""
        return self.engine is not None and self.engine.prepared == digest


def conflicts(rollout: Rollout, observed: Observed) -> list[tuple[Pod, Rollout]]:
    """Pods that the rollout selects and an older one owns."""
    return [
        (pod, owner)
        for pod in observed.pods
        if pod.namespace == rollout.namespace
        and pod.live
        and selects(rollout.spec.target.selector, pod.labels)
        and (owner := observed.claims[pod.uid]).uid != rollout.uid
    ]


def gather(rollout: Rollout, observed: Observed) -> list[Target]:
    """The rollout's own live pods, by node and name."""
    own = [pod for pod in observed.pods if pod.live and _owner(pod, observed) == rollout.uid]
    return [gather_one(pod, observed) for pod in sorted(own, key=lambda pod: (pod.node, pod.name, pod.uid))]


def gather_one(pod: Pod, observed: Observed) -> Target:
    """A pod with what is known about it."""
    state = observed.states.get(pod.node)
    follows = observed.follows(pod.node)
    return Target(
        pod=pod,
        node=observed.nodes.get(pod.node),
        state=state,
        engine=state.engine(pod.uid) if state and follows else None,
        assigned=state.assigned(pod.uid) if state else None,
        follows=follows,
        answered=state is not None and follows and state.current,
    )


def _owner(pod: Pod, observed: Observed) -> str:
    owner = observed.claims.get(pod.uid)
    return owner.uid if owner else ""
