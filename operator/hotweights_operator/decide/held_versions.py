"""What each node is to hold, and from whom it gets it.

A node holds the rollout's version, the one before, and whatever any of its pods is assigned, so
that a container that restarts can boot into its version at any time. A route that works is never
changed: every change is a write, and a node that has the version, or whose parents still live,
needs none. It plans with names of nodes and knows nothing of chunks or rates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hotweights_crds.nodeweights import Collective, Peer, StageItem
from hotweights_crds.weightrollout import WeightRolloutStatus
from hotweights_operator.decide import revision, transports
from hotweights_operator.model.objects import NodeState, Rollout
from hotweights_operator.model.observed import Observed
from hotweights_planner.pull_routes import Route, plan_routes

MAX_PEERS = 8  # as the schema allows (`StageItem.fallbacks`)


def stage_items(
    rollout: Rollout,
    base: WeightRolloutStatus,
    wanted: Mapping[str, Sequence[str]],
    observed: Observed,
) -> dict[str, tuple[StageItem, ...]]:
    """Node → what it is to hold, given the digests wanted on each of these nodes; the rollout's
    other nodes hold what they are told to. A version that nobody knows any more is left out.
    `assignments` calls it once in a pass, so that routes are planned over all nodes at once.
    """
    digests = sorted({digest for node in wanted.values() for digest in node})
    items: dict[str, list[StageItem]] = {node: [] for node in wanted}
    for digest in digests:
        for node, item in _items(
            rollout, base, digest, [n for n in wanted if digest in wanted[n]], observed
        ).items():
            items[node].append(item)
    return {node: tuple(found) for node, found in items.items()}


def _items(
    rollout: Rollout,
    base: WeightRolloutStatus,
    digest: str,
    nodes: Sequence[str],
    observed: Observed,
) -> dict[str, StageItem]:
    """The items of one version, on the nodes whose agents are there to read them."""
    present = {node: _item(observed.states[node], rollout.uid, digest) for node in nodes}
    plain = describe(rollout, digest, observed)
    # its source is unknown, so there is nothing to route; what nodes are told of it they keep
    if plain is None:
        return {node: item for node, item in present.items() if item is not None}
    peers = observed.peers()
    kept = {
        node: item
        for node, item in present.items()
        if item is not None and (node not in peers or _still_good(item, node, digest, observed))
    }
    result = {node: _with_plain(item, plain, node, observed) for node, item in kept.items()}
    # nearly always: nobody lacks a route, and no plan is made
    if all(node in kept or node not in peers for node in nodes):
        return result
    routed = {
        n: item
        for n in observed.entered(rollout.uid)
        if (item := _item(observed.states[n], rollout.uid, digest))
    }
    routed = {**routed, **kept}
    for node in nodes:
        if node not in kept:
            routed.pop(node, None)
    # also those that are not written to in this pass: they may be parents, and have children
    followers = [node for node in dict.fromkeys([*nodes, *routed]) if node in peers]
    donors = frozenset(node for node in followers if observed.states[node].holds(digest))
    previous = {
        node: tuple(peer.node for peer in routed[node].parents)
        for node in followers
        if node in routed
    }
    zones = {node: observed.nodes[node].zone for node in followers if node in observed.nodes}
    routes = plan_routes(followers, donors, rollout.spec.staging.origin_readers, previous, zones)
    serving = {node: observed.states[node] for node in peers}
    asked = rollout.spec.staging.transport
    bases = [
        v.digest
        for v in (revision.stable(base), base.target, base.previous)
        if v.digest not in ("", digest)
    ]
    # from those who have it, pulling is as quick as a broadcast and asks nobody to wait
    jobs = (
        {} if donors else transports.form_collectives(asked, digest, routes, routed, serving, bases)
    )
    for node in nodes:
        if node in peers and node not in kept:
            route = _route(rollout, serving[node], routes[node], serving)
            result[node] = plain.model_copy(update={**route, "collective": jobs.get(node)})
    return result


def describe(rollout: Rollout, digest: str, observed: Observed) -> StageItem | None:
    """The item of a version without its route: from its WeightVersion, or from any node that was
    told of it before. None: nobody knows its source any more.
    """
    version = observed.version_index.of_digest(rollout.namespace, digest)
    if version is not None:
        return StageItem(
            digest=digest,
            namespace=version.namespace,
            model=version.spec.model,
            version=version.spec.version,
            uri=version.spec.source.uri,
            timeout_seconds=rollout.spec.staging.timeout_seconds,
        )
    return remembered(rollout.namespace, digest, observed.states.values())


def remembered(namespace: str, digest: str, states: Iterable[NodeState]) -> StageItem | None:
    """The item as it stands in some node's spec, without its route, which is that node's own; None:
    it stands in none.
    """
    item = next(
        (item for state in states if (item := told(state, namespace, digest)) is not None), None
    )
    return (
        item.model_copy(update={"parents": [], "fallbacks": [], "collective": None})
        if item
        else None
    )


def told(state: NodeState, namespace: str, digest: str) -> StageItem | None:
    """The item as any entry of the node has it, with its route; None: none has. Only of the same
    namespace: a digest must not open another tenant's source.
    """
    # a look-up: most nodes of a large cluster end here
    if digest not in state.listed:
        return None
    items = (item for entry in state.spec.rollouts for item in entry.stage)
    return next(
        (item for item in items if item.digest == digest and item.namespace == namespace), None
    )


def _item(state: NodeState, rollout_uid: str, digest: str) -> StageItem | None:
    entry = state.entry(rollout_uid)
    return next((item for item in entry.stage if item.digest == digest), None) if entry else None


def _still_good(item: StageItem, node: str, digest: str, observed: Observed) -> bool:
    """Whether the node can go on with this route."""
    # what it has it need not pull
    if observed.states[node].holds(digest):
        return True
    peers = observed.peers()
    return all(
        p.node in peers and transports.speaks(observed.states[p.node], p.endpoint)
        for p in item.parents
    )


def _having(item: StageItem, node: str, digest: str, observed: Observed) -> frozenset[str]:
    """Members of the item's broadcast that have the version already, for a node that has not."""
    if item.collective is None or observed.states[node].holds(digest):
        return frozenset()
    peers = observed.peers()
    return frozenset(
        n for n in item.collective.members if n in peers and observed.states[n].holds(digest)
    )


def _with_plain(item: StageItem, plain: StageItem, node: str, observed: Observed) -> StageItem:
    """The route that it has, with the rest as it is now; the very same item where nothing
    differs.
    """
    having = _having(item, node, plain.digest, observed)
    collective = None if transports.is_over(item, having) else item.collective
    route: dict[str, object] = {
        "parents": item.parents,
        "fallbacks": item.fallbacks,
        "collective": collective,
    }
    if not observed.states[node].holds(item.digest):  # what it has it need not pull
        route = _with_keys(item, collective, observed.states)
    new = plain.model_copy(update=route)
    return item if new == item else new


def _with_keys(
    item: StageItem, collective: Collective | None, states: Mapping[str, NodeState]
) -> dict[str, object]:
    """The same route with the keys that agents have now: one that starts anew has another.

    Who is now where none of ours is any more cannot prove that it is one. Where a route names no
    key, as those for agents of an older release, it would be sent the token all the same: there it goes
    out of the route. (A parent that is not there ends the whole route, see `_still_good`.)
    """
    parents = [_keyed(peer, states) for peer in item.parents]
    fallbacks = [
        _keyed(peer, states) for peer in item.fallbacks if peer.key or _is_there(peer, states)
    ]
    if collective is not None:
        collective = transports.with_key(collective, states.get(collective.members[0]))
    return {"parents": parents, "fallbacks": fallbacks, "collective": collective}


def _keyed(peer: Peer, states: Mapping[str, NodeState]) -> Peer:
    key = states[peer.node].status.peer_key if _is_there(peer, states) else peer.key
    return peer if key == peer.key else peer.model_copy(update={"key": key})


def _is_there(peer: Peer, states: Mapping[str, NodeState]) -> bool:
    return peer.node in states and transports.speaks(states[peer.node], peer.endpoint)


def _route(
    rollout: Rollout, child: NodeState, route: Route, serving: Mapping[str, NodeState]
) -> dict[str, list[Peer]]:
    """Parents over the best transport. All others over TCP, which works wherever anything does; so
    does a parent, as its own stand-in.
    """
    asked = rollout.spec.staging.transport
    parents = [
        _peer(serving[node], transports.choose(asked, child, serving[node]))
        for node in route.parents
    ]
    # parents over another transport than TCP, whose endpoint is the node's own
    again = [peer.node for peer in parents if peer.endpoint != serving[peer.node].status.endpoint]
    fallbacks = [
        _peer(serving[node], serving[node].status.endpoint) for node in (*again, *route.fallbacks)
    ]
    # the same parent over TCP goes before other nodes
    return {"parents": parents, "fallbacks": fallbacks[:MAX_PEERS]}


def _peer(state: NodeState, endpoint: str) -> Peer:
    """A node as others are told of it: with the key that its agent shows beside the endpoint."""
    return Peer(node=state.name, endpoint=endpoint, key=state.status.peer_key)
