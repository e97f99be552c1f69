"""Routes: who reads the origin, and from whom every other node pulls.

The graph is a handful of chains. A link is full duplex, so a node that passes on what it receives
costs its parent nothing: one chain delivers to N nodes in the time of one, and every node uploads
once. A chain hangs from a node that has the version already (a donor) or from one that reads the
origin; at first there are ``readers`` chains, or one per donor where those are more.

Every node is ranked by its distance from its chain's start, and pulls, in the worst case too, only
from donors, who pull from nobody, and from lower ranks (of those that begin a chain, from earlier
chains): so there is never a circle of nodes that wait for each other. Its first fallback is its
parent's parent, which loses its own child when the parent dies and therefore still uploads once;
then come donors, spread evenly, then nodes of other chains. The origin is not listed: who reads it
asks it before its fallbacks, everybody else after all peers. The route of a donor is empty: it
needs nobody.

Given the ``previous`` parents, what still holds stays: a node that left is bridged over, a node
that came goes to an end, and no chain is ever split: stability goes before balance, so more readers
or donors than before begin chains for new nodes only. So plans may be made anew at every step of a
rollout. It knows names and zones of nodes, no addresses, no rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FALLBACKS = 3  # the grandparent and two donors; nodes of other chains where there are fewer

_NOTHING: Mapping[str, tuple[str, ...]] = {}
_NO_ZONES: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Route:
    """Whom one node asks, by name, in order. With ``reads_origin`` the origin comes before the
    fallbacks, else after them. ``parents`` has one name at most.
    """

    parents: tuple[str, ...]
    reads_origin: bool
    fallbacks: tuple[str, ...]


def plan_routes(
    nodes: Sequence[str],
    donors: frozenset[str],
    readers: int,
    previous: Mapping[str, tuple[str, ...]] = _NOTHING,
    zones: Mapping[str, str] = _NO_ZONES,
) -> dict[str, Route]:
    """The route of every node of ``nodes``; donors count only where they are among them.
    ``previous`` has the ``parents`` of every node of the plan before, () of those that had none: a
    node that it does not name is new. Equal input, equal plan, in whatever order the nodes are
    given. Raises `ValueError` when ``readers`` is less than 1.
    """
    if readers < 1:
        raise ValueError(f"readers is {readers}; at least one node must be able to read the origin")
    # by zone first, so that a chain crosses from zone to zone as seldom as it can
    order = sorted(set(nodes), key=lambda name: (zones.get(name, ""), name))
    starts = [node for node in order if node in donors]
    chains = _kept(order, previous) if previous else []
    chains = _joined(chains, donors, readers)
    placed = {node for chain in chains for node in chain}
    new = [node for node in order if node not in placed]
    if not placed:
        chains = _dealt(starts, [node for node in new if node not in donors], readers)
    else:
        _append(chains, new, donors, readers, zones)
    return _routes(chains, donors)


def _dealt(donors: list[str], others: list[str], readers: int) -> list[list[str]]:
    """Chains from nothing: neighbours (by zone and name) stand together."""
    count = max(len(donors), min(readers, len(donors) + len(others)))
    chains = [[donor] for donor in donors] + [[] for _ in range(count - len(donors))]
    if not chains:
        return []
    size, larger = divmod(len(others), count)
    begin = 0
    for index in reversed(range(count)):  # those without a donor first: none of them may stay empty
        end = begin + size + (1 if count - 1 - index < larger else 0)
        chains[index] += others[begin:end]
        begin = end
    return chains


def _kept(order: list[str], previous: Mapping[str, tuple[str, ...]]) -> list[list[str]]:
    """The chains that ``previous`` describes, without the nodes that are gone. Whatever it
    describes, no node comes twice.
    """
    alive = set(order)
    child: dict[str, str] = {}
    parent: dict[str, str] = {}
    for node in order:
        if (
            node in previous
            and (above := _ancestor(node, previous, alive)) is not None
            and above not in child  # two who claim one parent: the first in order keeps it
        ):
            child[above], parent[node] = node, above
    chains: list[list[str]] = []
    placed: set[str] = set()
    known = [node for node in order if node in previous]
    # then whoever stands in a circle
    for start in [node for node in known if node not in parent] + known:
        chain: list[str] = []
        at: str | None = start
        while at is not None and at not in placed:
            placed.add(at)
            chain.append(at)
            at = child.get(at)
        if chain:
            chains.append(chain)
    return chains


def _ancestor(node: str, previous: Mapping[str, tuple[str, ...]], alive: set[str]) -> str | None:
    """The nearest node above that is still there."""
    seen = {node}
    at = node
    while parents := previous.get(at, ()):
        at = parents[0]
        if at in seen:  # whoever wrote ``previous`` made a circle: do not go round in it
            return None
        if at in alive:
            return at if at in previous else None
        seen.add(at)
    return None


def _joined(chains: list[list[str]], donors: frozenset[str], readers: int) -> list[list[str]]:
    """At most as many chains that begin with a reader as there may be; the others go to the ends of
    the shortest ones.
    """
    begun = [chain for chain in chains if chain[0] in donors]
    # the longest go on: what is appended to them is short, and so is the way to their ends
    reading = sorted(
        (chain for chain in chains if chain[0] not in donors),
        key=lambda chain: (-len(chain), chain[0]),
    )
    # without a donor, somebody must read
    allowed = max(readers - len(begun), 0 if begun else 1)
    result = begun + reading[:allowed]
    for chain in reading[allowed:]:
        min(result, key=lambda other: (_distance(other, donors), other[0])).extend(chain)
    return result


def _append(
    chains: list[list[str]],
    new: list[str],
    donors: frozenset[str],
    readers: int,
    zones: Mapping[str, str],
) -> None:
    """New nodes begin a chain where one is lacking, else go to the end that is nearest to a whole
    copy; same zone first.
    """
    # donors first: the others may then be appended to them
    for node in sorted(new, key=lambda name: name not in donors):
        if node in donors or len(chains) < readers:
            chains.append([node])
            continue
        zone = zones.get(node, "")
        best = min(
            chains,
            key=lambda chain: (
                zones.get(chain[-1], "") != zone,
                _distance(chain, donors),
                chain[0],
            ),
        )
        best.append(node)


def _distance(chain: list[str], donors: frozenset[str]) -> int:
    """Hops between a chain's end and the copy that it pulls from."""
    return next((hops for hops, node in enumerate(reversed(chain)) if node in donors), len(chain))


def _routes(chains: list[list[str]], donors: frozenset[str]) -> dict[str, Route]:
    copies = [node for chain in chains for node in chain if node in donors]
    routes: dict[str, Route] = {}
    for number, chain in enumerate(chains):
        for rank, node in enumerate(chain):
            if node in donors:
                routes[node] = Route((), False, ())
                continue
            parents = (chain[rank - 1],) if rank else ()
            fallbacks = _fallbacks(chains, number, rank, _spread(copies, len(routes)))
            routes[node] = Route(
                parents,
                not rank,
                tuple(name for name in fallbacks if name not in parents)[:FALLBACKS],
            )
    return routes


def _spread(copies: list[str], turn: int) -> list[str]:
    """At most two donors, others at every turn. One of the two may be the node's own parent, which
    `_routes` leaves out.
    """
    return [copies[(turn + step) % len(copies)] for step in range(min(2, len(copies)))]


def _fallbacks(
    chains: list[list[str]], number: int, rank: int, copies: list[str]
) -> dict[str, None]:
    """The grandparent, donors, then other chains' nodes one rank lower (their children are this
    node's peers); for one that begins a chain, those that begin the chains before it.
    """
    chosen = dict.fromkeys([chains[number][rank - 2]] if rank >= 2 else [])
    chosen.update(dict.fromkeys(copies))
    if not rank:
        for step in range(1, min(number, FALLBACKS) + 1):
            chosen[chains[number - step][0]] = None
        return chosen
    # one more than is wanted, for one may be among the donors already
    for step in range(1, min(len(chains), FALLBACKS + 2)):
        index = (number + step) % len(chains)
        chosen[chains[index][min(rank, len(chains[index])) - 1]] = None
    return chosen
