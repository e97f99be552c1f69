"""Over which transport one node pulls from another, and why: UCX where the rollout allows it and both sides want it, else TCP.

TCP is always there, so whatever the answer, there is a road. An agent measures its transports over loopback when it starts: that says what
its processors can do, not its network, and it is all that anybody knows before bytes move.
"""

from __future__ import annotations

from collections.abc import Sequence

from hotweights_crds.nodeweights import Endpoint
from hotweights_crds.weightrollout import Transport
from hotweights_operator.model import NodeState


def choose(asked: Transport, child: NodeState, parent: NodeState) -> str:
    """Where ``child`` is to reach ``parent``."""
    if _takes_ucx(asked, child) and _takes_ucx(asked, parent):
        return _offer(parent, "ucx").endpoint
    return parent.status.endpoint


def describe(asked: Transport, nodes: Sequence[NodeState]) -> str:
    """What came of it, wherever there was something to choose; else empty."""
    have = [state for state in nodes if _offer(state, "ucx").endpoint]
    if asked == "UCX" and len(have) < len(nodes):
        first = next(state for state in nodes if state not in have)
        reason = _offer(first, "ucx").message or "its agent does not serve it"
        return f"over UCX between {len(have)} of {len(nodes)} nodes, else over TCP; {first.name}: {reason}"
    if asked == "Auto" and have:
        takers = [state for state in nodes if _takes_ucx(asked, state)]
        rates = " and ".join(
            f"{_offer(have[0], scheme).megabytes_per_second} MB/s by {scheme}" for scheme in ("tcp", "ucx")
        )
        return f"Auto: over UCX between {len(takers)} of {len(nodes)} nodes, else over TCP; {have[0].name} measured {rates}"
    return ""


def speaks(state: NodeState, endpoint: str) -> bool:
    """Whether that is where the node's agent serves now."""
    return bool(endpoint) and endpoint in {state.status.endpoint, *(one.endpoint for one in state.status.endpoints)}


def _takes_ucx(asked: Transport, state: NodeState) -> bool:
    ucx, tcp = _offer(state, "ucx"), _offer(state, "tcp")
    if asked == "TCP" or not ucx.endpoint:
        return False
    return asked == "UCX" or ucx.megabytes_per_second > tcp.megabytes_per_second


def _offer(state: NodeState, scheme: str) -> Endpoint:
    return next((one for one in state.status.endpoints if one.scheme == scheme), Endpoint(scheme=scheme))
