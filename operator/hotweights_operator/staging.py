"""What each node is to hold, and from whom it gets it.

A node holds the rollout's version, the one before, and whatever any of its pods is assigned, so that a container that restarts
can boot into its version at any time. A route that works is never changed: every change is a write, and a node that has the
version, or whose parents still live, needs none. It plans with names of nodes and knows nothing of chunks or rates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hotweights_crds.nodeweights import Peer, StageItem
from hotweights_crds.weightrollout import VersionStatus
from hotweights_operator import collectives, transports
from hotweights_operator.model import NodeState, Observed, Rollout
from hotweights_planner.routes import Route, plan_routes

MAX_PEERS = 8  # as the schema allows


def stage_items(
    rollout: Rollout, wanted: Mapping[str, Sequence[str]], observed: Observed
) -> dict[str, tuple[StageItem, ...]]:
    """Node → what it is to hold, given the digests wanted on each node. A version that nobody knows any more is left out."""
    digests = sorted({digest for node in wanted.values() for digest in node})
    items: dict[str, list[StageItem]] = {node: [] for node in wanted}
    for digest in digests:
        for node, item in _items(rollout, digest, [n for n in wanted if digest in wanted[n]], observed).items():
            items[node].append(item)
    return {node: tuple(found) for node, found in items.items()}


def _items(rollout: Rollout, digest: str, nodes: Iterable[str], observed: Observed) -> dict[str, StageItem]:
    """The items of one version, on the nodes whose agents are there to read them."""
    present = {node: _item(observed.states[node], rollout.uid, digest) for node in nodes if node in observed.states}
    plain = describe(rollout, digest, observed)
    if plain is None:
        return {node: item for node, item in present.items() if item is not None}
    serving = _serving(observed)
    followers = [node for node in present if node in serving]
    donors = frozenset(n for n in followers if observed.states[n].holds(digest))
    kept = {
        node: item
        for node, item in present.items()
        if item and (node not in serving or _still_good(item, node in donors, serving))
    }
    result = {node: _with_plain(item, plain, frozenset() if node in donors else donors) for node, item in kept.items()}
    if not set(followers) - set(kept):
        return result
    previous = {node: tuple(peer.node for peer in item.parents) for node, item in kept.items() if node in serving}
    zones = {node: observed.nodes[node].zone for node in followers if node in observed.nodes}
    routes = plan_routes(followers, donors, rollout.spec.staging.origin_readers, previous, zones)
    asked, status = rollout.spec.staging.transport, rollout.status
    bases = [version.digest for version in (status.previous, status.target) if version.digest not in ("", digest)]
    jobs = {} if donors else collectives.form(asked, digest, routes, kept, serving, bases)
    for node in followers:
        if node not in kept:
            route = _route(rollout, serving[node], routes[node], serving)
            result[node] = plain.model_copy(update={**route, "collective": jobs.get(node)})
    return result


def describe(rollout: Rollout, digest: str, observed: Observed) -> StageItem | None:
    """The item of a version without its route: from its WeightVersion, or from any node that was told of it before."""
    for version in observed.versions:
        if version.namespace == rollout.namespace and version.status.digest == digest:
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
    """The item as it stands in some node's spec, without its route."""
    found = (
        item
        for state in states
        for entry in state.spec.rollouts
        for item in entry.stage
        if item.digest == digest and item.namespace == namespace
    )
    item = next(found, None)
    return item.model_copy(update={"parents": [], "fallbacks": [], "collective": None}) if item else None


def holding(nodes: Iterable[str], digest: str, observed: Observed) -> list[str]:
    """Of these nodes, those that hold the version completely, as an agent that is alive says."""
    return [n for n in nodes if observed.follows(n) and observed.states[n].holds(digest)]


def is_local(nodes: Sequence[str], previous: VersionStatus, observed: Observed) -> bool:
    """Whether going back to the previous version needs no network."""
    return len(holding(nodes, previous.digest, observed)) == len(nodes)


def _item(state: NodeState, rollout_uid: str, digest: str) -> StageItem | None:
    entry = next((entry for entry in state.spec.rollouts if entry.uid == rollout_uid), None)
    return next((item for item in entry.stage if item.digest == digest), None) if entry else None


def _still_good(item: StageItem, has_it: bool, serving: Mapping[str, NodeState]) -> bool:
    """Whether the node can go on with this route."""
    return has_it or all(
        peer.node in serving and transports.speaks(serving[peer.node], peer.endpoint) for peer in item.parents
    )


def _with_plain(item: StageItem, plain: StageItem, having: frozenset[str]) -> StageItem:
    collective = None if collectives.is_over(item, having) else item.collective
    return plain.model_copy(update={"parents": item.parents, "fallbacks": item.fallbacks, "collective": collective})


def _serving(observed: Observed) -> dict[str, NodeState]:
    """The nodes whose agents serve peers, of those that are alive."""
    return {name: state for name, state in observed.states.items() if state.status.endpoint and observed.follows(name)}


def _route(rollout: Rollout, child: NodeState, route: Route, serving: Mapping[str, NodeState]) -> dict[str, list[Peer]]:
    """Parents over the best transport. All others over TCP, which works wherever anything does; so does a parent, as its own stand-in."""
    asked = rollout.spec.staging.transport
    parents = [Peer(node=node, endpoint=transports.choose(asked, child, serving[node])) for node in route.parents]
    again = [peer.node for peer in parents if peer.endpoint != serving[peer.node].status.endpoint]
    fallbacks = [Peer(node=node, endpoint=serving[node].status.endpoint) for node in (*again, *route.fallbacks)]
    return {"parents": parents, "fallbacks": fallbacks[:MAX_PEERS]}
