"""Over which transport nodes get versions from each other, and why: what the rollout asks for where
both sides have it, else TCP.

TCP is always there, so whatever the answer, there is a road. An agent measures its transports over
loopback when it starts: that says what its processors can do, not its network, and it is all that
anybody knows before bytes move.

A broadcast is no road from one node to another: nodes join it together. Its group, a collective, is
a chain of the routes: its head reads the source, the ranks stand in the chain's order, and whoever
is not reached by it pulls along that same chain. It is formed once, for nodes that are told of the
version now, and only where nobody has the version yet: from those who have it, pulling is as quick
and asks nobody to wait. A node that was to be told with the others and was not (the operator ended
between two writes) is let in; for whoever comes when some have the version already, it is over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

from hotweights_crds.nodeweights import Collective, Endpoint, StageItem
from hotweights_crds.weightrollout import Transport
from hotweights_operator.model.objects import NodeState
from hotweights_planner.pull_routes import Route

ALWAYS = "tcp"
"""Every agent serves it, so there is nothing to fall back to from it."""
BROADCAST = "mpi"
"""Not one node pulling from another: nodes join, see `joins` and `form_collectives`."""
MAX_MEMBERS = 64  # as the schema allows (`Collective.members`); the rest of a chain pulls


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


def form_collectives(
    asked: Transport,
    digest: str,
    routes: Mapping[str, Route],
    kept: Mapping[str, StageItem],
    serving: Mapping[str, NodeState],
    bases: Sequence[str] = (),
) -> dict[str, Collective]:
    """Node → its collective, for those of ``routes`` that are not ``kept`` and have one. ``bases``
    are versions that may be built upon, the best one first.
    """
    told: dict[str, Collective] = {}
    for item in kept.values():
        if item.collective is not None:
            told.update(dict.fromkeys(item.collective.members, item.collective))
    # a node that was to be told with the others and was not: the write to it was lost
    found = {node: told[node] for node in routes if node not in kept and node in told}
    able = {
        node
        for node in routes
        if node not in kept and node not in told and node in serving and joins(asked, serving[node])
    }
    # the first parent alone: the others are for when it fails
    child = {route.parents[0]: node for node, route in routes.items() if route.parents}
    for head in sorted(able):
        if not routes[head].reads_origin:
            continue
        chain = [head]
        while (following := child.get(chain[-1])) is not None:
            chain.append(following)
        # one that does not take part is skipped: it pulls from its parent as it would have anyway
        members = [node for node in chain if node in able][:MAX_MEMBERS]
        if len(members) > 1:
            found.update(
                dict.fromkeys(
                    members, _collective(digest, [serving[node] for node in members], bases)
                )
            )
    return found


def is_over(item: StageItem, having: Collection[str]) -> bool:
    """Whether a node that lacks the version would wait in vain for the others: some of them have it
    already.
    """
    return item.collective is not None and any(node in having for node in item.collective.members)


def with_key(job: Collective, head: NodeState | None) -> Collective | None:
    """The same job with the key that its head has now; None where the head is not there any more
    and has no key by which that would be found out.
    """
    if head is None or offer(head, BROADCAST).endpoint != job.head:
        return job if job.head_key else None
    key = head.status.peer_key
    return job if key == job.head_key else job.model_copy(update={"head_key": key})


def _collective(digest: str, members: Sequence[NodeState], bases: Sequence[str]) -> Collective:
    # An agent that starts anew is another rank of another job: the name must not be that of the one
    # that it has left. 128 bits of it are enough to tell jobs apart.
    names = [state.name for state in members]
    lives = " ".join(state.status.boot_id for state in members)
    base = next((known for known in bases if all(state.holds(known) for state in members)), "")
    name = hashlib.sha256(f"{digest} {' '.join(names)} {lives}".encode()).hexdigest()[:32]
    return Collective(
        name=name,
        head=offer(members[0], BROADCAST).endpoint,
        head_key=members[0].status.peer_key,
        members=names,
        base=base,
    )
