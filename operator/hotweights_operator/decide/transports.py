"""Over which transport nodes get versions from each other, and why: what the rollout asks for where
both sides have it, else TCP.

TCP is always there, so whatever the answer, there is a road. An agent measures its transports over
loopback when it starts: that says what its processors can do, not its network, and it is all that
anybody knows before bytes move.
"""

from __future__ import annotations

from collections.abc import Sequence

from hotweights_crds.nodeweights import Endpoint
from hotweights_crds.weightrollout import Transport
from hotweights_operator.model.objects import NodeState

ALWAYS = "tcp"
"""Every agent serves it, so there is nothing to fall back to from it."""
BROADCAST = "mpi"
"""Not one node pulling from another: nodes join, see `joins` and `collectives`."""


def choose(asked: Transport, child: NodeState, parent: NodeState) -> str:
    """The endpoint where ``child`` is to pull from ``parent``: over UCX where both take it, else
    over TCP; empty: the parent serves nobody.
    """
    for one in parent.status.endpoints:
        if one.scheme not in (ALWAYS, BROADCAST) and (
            _takes(asked, child, one.scheme) and _takes(asked, parent, one.scheme)
        ):
            return one.endpoint
    return parent.status.endpoint


def joins(asked: Transport, state: NodeState) -> bool:
    """Whether the node is to take part in broadcasts."""
    return _takes(asked, state, BROADCAST)


def describe(asked: Transport, nodes: Sequence[NodeState]) -> str:
    """What came of it, wherever there was something to choose; else empty. It goes into the
    condition Staged.
    """
    scheme = asked.lower()
    if scheme not in ("auto", ALWAYS):
        have = [state for state in nodes if offer(state, scheme).endpoint]
        if len(have) == len(nodes):
            return ""
        first = next(state for state in nodes if state not in have)
        reason = offer(first, scheme).message or "its agent does not serve it"
        return (
            f"over {asked} between {len(have)} of {len(nodes)} nodes, else over TCP; "
            f"{first.name}: {reason}"
        )
    if scheme == ALWAYS:
        return ""
    # one transport alone was never measured against another
    measured = next(
        (state for state in nodes if len(state.status.endpoints) > 1 and len(_rates(state)) > 1),
        None,
    )
    if measured is None:
        return ""
    offered = dict.fromkeys(one.scheme for state in nodes for one in state.status.endpoints)
    takers = [
        (scheme, sum(_takes(asked, state, scheme) for state in nodes))
        for scheme in offered
        if scheme != ALWAYS
    ]
    roads = ", ".join(
        f"over {scheme.upper()} between {n} of {len(nodes)} nodes" for scheme, n in takers if n
    )
    rates = ", ".join(f"{rate} MB/s by {scheme}" for scheme, rate in _rates(measured).items())
    return (
        f"Auto: {roads or 'nobody measured anything faster'}, else over TCP; {measured.name} "
        f"measured {rates}"
    )


def speaks(state: NodeState, endpoint: str) -> bool:
    """Whether that is where the node's agent serves now."""
    return bool(endpoint) and endpoint in {
        state.status.endpoint,
        *(one.endpoint for one in state.status.endpoints),
    }


def offer(state: NodeState, scheme: str) -> Endpoint:
    """What the node's agent says of one transport; without an endpoint where it says nothing."""
    return next(
        (one for one in state.status.endpoints if one.scheme == scheme), Endpoint(scheme=scheme)
    )


def _takes(asked: Transport, state: NodeState, scheme: str) -> bool:
    if asked != "Auto":
        return asked == scheme.upper() and bool(offer(state, scheme).endpoint)
    rates = _rates(state)
    # strictly faster than all others: where nothing is gained, TCP asks less of the network
    return scheme in rates and all(
        rates[scheme] > rate for other, rate in rates.items() if other != scheme
    )


def _rates(state: NodeState) -> dict[str, int]:
    """MB/s (10^6 bytes) by transport, of those that the node serves; 0: not measured."""
    return {one.scheme: one.megabytes_per_second for one in state.status.endpoints if one.endpoint}
