"""Tokens: a number per pod that grows with every change of what the pod is to serve, so that agents
can refuse the past.

A token must be higher than any that stands anywhere for that pod: in other rollouts' entries on the
node, and in what the agent answered last, which is all that is left if the object was lost. What
does not change keeps its token, so that writing the same thing twice is no new order. Beside it
stands how often the pod's container had restarted: restarts after an order speak against it.
"""

from __future__ import annotations

from hotweights_crds.nodeweights import MAX_TOKEN, PodAssignment
from hotweights_operator.model.objects import NodeState


def next_token(
    state: NodeState,
    restarts: int,
    wanted: PodAssignment,
    owner_uid: str,
    *,
    counts_anew: bool = False,
    asks_anew: bool = False,
) -> PodAssignment:
    """The assignment with the token that it needs, as an entry of the rollout ``owner_uid``.
    ``restarts`` are the pod's now, from which it counts if it is another order, or ``counts_anew``;
    ``asks_anew``: the same is said once more, for the sake of the answer. At `MAX_TOKEN` it grows
    no more: a higher number would be refused by the API server.
    """
    uid = wanted.uid
    current, engine, entry = state.assigned(uid), state.engine(uid), state.entry(owner_uid)
    highest = max(current.token if current else 0, engine.token if engine else 0)
    own = next((pod for pod in entry.pods if pod.uid == uid), None) if entry else None
    same = (
        own is not None and own.digest == wanted.digest and own.token >= highest and own.token > 0
    )
    token = own.token if same and own and not asks_anew else min(highest + 1, MAX_TOKEN)
    # Withdrawing what was to be prepared is no order that a pod could fail; but what ended
    # meanwhile has been counted.
    goes_on = same and own is not None and (own.prepare == wanted.prepare or not wanted.prepare)
    goes_on = goes_on and own is not None and own.ended_preparing >= wanted.ended_preparing
    counted = own.restarts if goes_on and own and not counts_anew else restarts
    return wanted.model_copy(update={"token": token, "restarts": counted})
