"""Which nodes get a version by one MPI broadcast instead of pulling it one from another.

A collective is a chain of the routes: its head reads the source, the ranks stand in the chain's
order, and whoever is not reached by it pulls along that same chain. It is formed once, for nodes
that are told of the version now, and only where nobody has the version yet: from those who have it,
pulling is as quick and asks nobody to wait. A node that was to be told with the others and was not
(the operator ended between two writes) is let in; for whoever comes when some have the version
already, it is over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

from hotweights_crds.nodeweights import Collective, StageItem
from hotweights_crds.weightrollout import Transport
from hotweights_operator.decide import transports
from hotweights_operator.model.objects import NodeState
from hotweights_planner.routes import Route

MAX_MEMBERS = 64  # as the schema allows (`Collective.members`); the rest of a chain pulls


def form(
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
        if node not in kept
        and node not in told
        and node in serving
        and transports.joins(asked, serving[node])
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


def _collective(digest: str, members: Sequence[NodeState], bases: Sequence[str]) -> Collective:
    # An agent that starts anew is another rank of another job: the name must not be that of the one
    # that it has left. 128 bits of it are enough to tell jobs apart.
    names = [state.name for state in members]
    lives = " ".join(state.status.boot_id for state in members)
    base = next((known for known in bases if all(state.holds(known) for state in members)), "")
    name = hashlib.sha256(f"{digest} {' '.join(names)} {lives}".encode()).hexdigest()[:32]
    return Collective(
        name=name,
        head=transports.offer(members[0], transports.BROADCAST).endpoint,
        members=names,
        base=base,
    )
