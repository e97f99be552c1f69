"""The latest that is known of every object, whichever way it came: by a watch, by a list, or as the answer to our own write.

An older state never replaces a newer one, so the operator reads its own writes at once, whatever the watch is still to bring.
The cache holds frozen values and hands out `Observed`, which stays as it was when the cache goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from hotweights_operator.model import Observed

Kind = Literal["rollout", "version", "node", "agent", "state", "pod"]
KINDS: tuple[Kind, ...] = ("rollout", "version", "node", "agent", "state", "pod")

_MAX_TOMBSTONES = 10_000


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent's pod."""

    uid: str
    node: str
    ready: bool


@dataclass(slots=True)
class Cache:
    """Objects by kind and key: the UID for pods (names come again), namespace/name or name for the rest."""

    _values: dict[Kind, dict[str, tuple[int, Any]]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    _tombstones: dict[tuple[Kind, str], int] = field(default_factory=dict)
    _observed: Observed | None = None

    def put(self, kind: Kind, key: str, version: int, value: Any) -> bool:
        """Remember this state, unless a newer one is known. Whether anything changed."""
        if version <= self._tombstones.get((kind, key), -1):
            return False
        known = self._values[kind].get(key)
        if known is not None and known[0] >= version:
            return False
        self._values[kind][key] = (version, value)
        if known is None or known[1] != value:
            self._observed = None
        return True

    def drop(self, kind: Kind, key: str, version: int) -> bool:
        """Forget an object that was deleted at this version, unless it has come again since."""
        known = self._values[kind].get(key)
        if known is not None and known[0] > version:
            return False
        self._tombstones[(kind, key)] = version
        while len(self._tombstones) > _MAX_TOMBSTONES:
            del self._tombstones[next(iter(self._tombstones))]
        self._observed = None
        return self._values[kind].pop(key, None) is not None

    def keep_only(self, kind: Kind, keys: Iterable[str], version: int) -> list[str]:
        """Forget what a complete list of this version does not have; what was forgotten."""
        present = set(keys)
        gone = [key for key, (known, _) in self._values[kind].items() if key not in present and known <= version]
        for key in gone:
            self.drop(kind, key, version)
        return gone

    def version_of(self, kind: Kind, key: str) -> int:
        """The resourceVersion that is known of an object; 0: none."""
        found = self._values[kind].get(key)
        return found[0] if found else 0

    def get(self, kind: Kind, key: str) -> Any:
        """The value, or None."""
        found = self._values[kind].get(key)
        return found[1] if found else None

    def values(self, kind: Kind) -> list[Any]:
        """All values of a kind."""
        return [value for _, value in self._values[kind].values()]

    def observed(self) -> Observed:
        """All of it, as decisions look at it."""
        if self._observed is None:
            agents: dict[str, bool] = {}
            for agent in self.values("agent"):
                agents[agent.node] = agents.get(agent.node, False) or agent.ready
            self._observed = Observed(
                rollouts=tuple(self.values("rollout")),
                versions=tuple(self.values("version")),
                nodes={node.name: node for node in self.values("node")},
                agents=agents,
                states={state.name: state for state in self.values("state")},
                pods=tuple(self.values("pod")),
            )
        return self._observed
