"""Tokens: a number per pod that grows with every change of what the pod is to serve, so that agents can refuse the past.

A token must be higher than any that stands anywhere for that pod: in other rollouts' entries on the node, and in what the agent
answered last, which is all that is left if the object was lost. What does not change keeps its token, so that writing the same
thing twice is no new order.
"""

from __future__ import annotations

from hotweights_crds.nodeweights import PodAssignment
from hotweights_operator.model import NodeState


def following(state: NodeState, pod_uid: str, wanted: PodAssignment, owner_uid: str) -> PodAssignment:
    """The assignment with the token that it needs, as an entry of the rollout ``owner_uid``."""
    current = state.assigned(pod_uid)
    engine = state.engine(pod_uid)
    highest = max(current.token if current else 0, engine.token if engine else 0)
    own = next((p for e in state.spec.rollouts if e.uid == owner_uid for p in e.pods if p.uid == pod_uid), None)
    unchanged = own is not None and own.digest == wanted.digest and own.token >= highest and own.token > 0
    token = own.token if unchanged and own else highest + 1
    return wanted if token == wanted.token else wanted.model_copy(update={"token": token})
