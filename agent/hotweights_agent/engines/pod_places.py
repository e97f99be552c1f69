"""How many connections each pod has, and by which tokens they were let in: pure bookkeeping.

A token that a pod was let in by says whose next connection is before anybody reviews it. That opens
no door (the review does); it only lets a pod that is full be refused at no cost. Tokens are kept as
hashes, and no longer than the connections that they let in.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

from hotweights_agent.engines.limits import Limits
from hotweights_agent.session.messages import Pod


@dataclass(slots=True)
class _LetIn:
    pod: Pod
    connections: int


class PodPlaces:
    """The connections that were let in, by their numbers."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._by_token: dict[bytes, _LetIn] = {}
        self._token_of: dict[int, bytes] = {}  # connection → hash of its token
        self._counts: Counter[Pod] = Counter()

    def most(self, world_size: int) -> int:
        """Connections that a pod may have which says that it has so many ranks."""
        limits = self._limits
        return min(world_size + limits.spare_pod_connections, limits.max_pod_connections)

    def count(self, pod: Pod) -> int:
        """Connections that it has."""
        return self._counts[pod]

    def pod_of(self, token: str) -> Pod | None:
        """The pod that has connections which this token let in; None: no review of it is known."""
        if not self._by_token:
            return None
        let_in = self._by_token.get(_hash(token))
        return let_in.pod if let_in is not None else None

    def enter(self, connection: int, pod: Pod, token: str) -> None:
        """It was let in."""
        key = self._token_of[connection] = _hash(token)
        let_in = self._by_token.setdefault(key, _LetIn(pod, 0))
        let_in.connections += 1
        self._counts[let_in.pod] += 1

    def leave(self, connection: int) -> None:
        """It has gone, if it was here."""
        key = self._token_of.pop(connection, None)
        if key is None:
            return
        let_in = self._by_token[key]
        let_in.connections -= 1
        if not let_in.connections:
            del self._by_token[key]
        self._counts[let_in.pod] -= 1
        if not self._counts[let_in.pod]:
            del self._counts[let_in.pod]


def _hash(token: str) -> bytes:
    # a stranger's text may hold halves of surrogate pairs, which JSON allows
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
