"""What is decided and not written yet: one desired entry for each node and decider, the newest
only.

Decisions put a whole set of writes in, workers take them out one by one; so a decision never waits
for a thousand writes, and what is no longer wanted is dropped before it goes out. A node is written
to by one worker at a time, because each write is fenced by the object that it was decided on.
Sans-IO: it knows neither tasks nor time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from hotweights_operator.model.actions import Action
from hotweights_operator.runtime.triggers import Key


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """An action, by whom it was decided, and on which generation of that object's spec."""

    key: Key
    action: Action
    epoch: tuple[str, int] = (
        "",
        0,
    )  # UID and generation of the object that was decided about: another intent has others


class Outbox:
    """Writes that wait, and those that are under way."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[tuple[Key, str], Write] = OrderedDict()
        self._by_key: dict[Key, set[str]] = {}
        self._under_way: dict[str, Write] = {}  # by node
        self._count: dict[Key, int] = {}  # under way, by decider

    def __len__(self) -> int:
        """How many wait; those under way are not among them."""
        return len(self._waiting)

    def under_way(self, key: Key) -> int:
        """How many of this decider's writes are neither done nor refused yet."""
        return self._count.get(key, 0)

    def replace(self, key: Key, writes: Iterable[Write]) -> None:
        """From now on this decider wants these, and nothing else of what it wanted before."""
        for node in self._by_key.pop(key, ()):
            self._waiting.pop((key, node), None)
        for write in writes:
            node = write.action.node
            self._waiting[key, node] = write
            self._by_key.setdefault(key, set()).add(node)

    def take(self) -> Write | None:
        """The one that has waited longest and whose node is not being written to; None: there is
        none. Say `landed` afterwards, whatever came of it.
        """
        place = next((place for place in self._waiting if place[1] not in self._under_way), None)
        if place is None:
            return None
        key, node = place
        write = self._waiting.pop(place)
        self._by_key[key].discard(node)
        self._under_way[node] = write
        self._count[key] = self._count.get(key, 0) + 1
        return write

    def landed(self, write: Write) -> None:
        """It was written, refused, or dropped."""
        del self._under_way[write.action.node]
        self._count[write.key] -= 1
        if not self._count[write.key]:
            del self._count[write.key]
