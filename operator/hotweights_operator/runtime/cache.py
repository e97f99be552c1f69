"""The latest that is known of every object, whichever way it came: by a watch, by a list, or as the
answer to our own write.

An older state never replaces a newer one, so the operator reads its own writes at once, whatever
the watch is still to bring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from hotweights_operator.model.objects import Agent
from hotweights_operator.model.observed import KINDS, Kind, Observed

__all__ = ["KINDS", "Agent", "Cache", "Kind"]

# the oldest are dropped: an event comes late by seconds, not by ten thousand deletions
_MAX_TOMBSTONES = 10_000


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(slots=True)
class Cache:
    """Objects by kind and key: the UID for pods (names come again), namespace/name or name for the
    rest.
    """

    clock: Callable[[], datetime] = _now
    _values: dict[Kind, dict[str, tuple[int, Any]]] = field(
        default_factory=lambda: {kind: {} for kind in KINDS}
    )
    _tombstones: dict[tuple[Kind, str], int] = field(default_factory=dict)
    _observed: Observed = field(init=False)

    def __post_init__(self) -> None:
        self._observed = Observed(clock=self.clock)

    def put(self, kind: Kind, key: str, version: int, value: Any) -> bool:
        """Remember this state, unless a newer one is known; whether it was remembered. ``version``
        is the resourceVersion as a number: within a kind they only grow (KEP-5504).
        """
        # said before it was deleted, and heard afterwards
        if version <= self._tombstones.get((kind, key), -1):
            return False
        known = self._values[kind].get(key)
        # an older state, or the same by another way
        if known is not None and known[0] >= version:
            return False
        self._values[kind][key] = (version, value)
        # a newer state that says the same, such as somebody's label, is no news to decisions
        if known is None or known[1] != value:
            if known is not None and getattr(known[1], "uid", "") != getattr(value, "uid", ""):
                self._observed.drop(kind, key, known[1])
            self._observed.put(kind, key, value)
        return True

    def drop(self, kind: Kind, key: str, version: int) -> bool:
        """Forget an object that was deleted at this version, unless it has come again since."""
        known = self._values[kind].get(key)
        # it was made anew since
        if known is not None and known[0] > version:
            return False
        self._tombstones[(kind, key)] = version
        while len(self._tombstones) > _MAX_TOMBSTONES:
            del self._tombstones[next(iter(self._tombstones))]
        if known is None:
            return False
        del self._values[kind][key]
        self._observed.drop(kind, key, known[1])
        return True

    def keep_only(self, kind: Kind, keys: Iterable[str], version: int) -> list[str]:
        """Forget what a complete list of this version does not have; what was forgotten."""
        present = set(keys)
        gone = [
            key
            for key, (known, _) in self._values[kind].items()
            if key not in present and known <= version
        ]
        for key in gone:
            self.drop(kind, key, version)
        return gone

    def rewind(self, kind: Kind) -> None:
        """The resourceVersions of a kind went back: whatever comes next is newer than all that is
        known, and a list says what is left of that.
        """
        self._values[kind] = {key: (0, value) for key, (_, value) in self._values[kind].items()}
        for place in [place for place in self._tombstones if place[0] == kind]:
            del self._tombstones[place]

    def version_of(self, kind: Kind, key: str) -> int:
        """The resourceVersion that is known of an object; 0: none."""
        found = self._values[kind].get(key)
        return found[0] if found else 0

    def get(self, kind: Kind, key: str) -> Any:
        """The latest value that is known; None: there is none."""
        found = self._values[kind].get(key)
        return found[1] if found else None

    def values(self, kind: Kind) -> list[Any]:
        """The latest value of every object of a kind, in a list of its own."""
        return [value for _, value in self._values[kind].values()]

    def observed(self) -> Observed:
        """All of it, as decisions look at it."""
        return self._observed
