"""Which connections that have not proved who they are may stay: pure bookkeeping, no socket, no clock.

Anybody who reaches a socket may connect, and who is sound says hello at once. So whoever has not
said it gives way to whoever comes later, the oldest first; and an owner (an address, a user) takes
its own places before it takes others'. Tokens that were refused are counted by owner too, because
each costs a review at the API server. Not safe for threads: the caller's lock guards it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

REFUSAL_SECONDS: Final = 1.0  # for so long each refused token is held against its owner
REFUSALS_AT_ONCE: Final = 8  # an agent whose token has just expired tries it with every stream
MAX_OWNERS: Final = 4096  # that are remembered, of refused tokens and of accepted ones

Connection = TypeVar("Connection", bound=Hashable)


@dataclass(slots=True)
class _Stranger:
    owner: str
    in_review: bool = False  # its hello is whole, and somebody is being asked about its token


class Strangers(Generic[Connection]):
    """Those who have connected, oldest first."""

    def __init__(self, most: int, most_of_owner: int) -> None:
        self._most, self._most_of_owner = most, most_of_owner
        self._known: dict[Connection, _Stranger] = {}
        self._owners: Counter[str] = Counter()  # of those that are known
        self._trusted: dict[str, None] = {}  # owners, the longest unused first
        self._refused_until: dict[str, float] = {}  # owner → seconds of the caller's clock

    def __len__(self) -> int:
        return len(self._known)

    def admit(
        self, connection: Connection, owner: str, now: float
    ) -> tuple[bool, Connection | None]:
        """Whether it may stay, and who has to go for it; ``now`` is seconds of one monotonic
        clock.
        """
        # nothing that it could say would be looked at; where somebody was let in it might be they
        if self._is_loud(owner, now) and owner not in self._trusted:
            return False, None
        leaves: Connection | None = None
        if self._owners[owner] >= self._most_of_owner:
            leaves = self._oldest(owner)
        elif len(self._known) >= self._most:
            crowded = (self._oldest(other) for other, _ in self._owners.most_common())
            leaves = next((found for found in crowded if found is not None), None)
        else:
            self._note(connection, owner)
            return True, None
        if leaves is None:  # all of them wait for the review of their tokens
            return False, None
        self.leave(leaves)
        self._note(connection, owner)
        return True, leaves

    def _note(self, connection: Connection, owner: str) -> None:
        self._known[connection] = _Stranger(owner)
        self._owners[owner] += 1

    def _oldest(self, owner: str) -> Connection | None:
        """The oldest that may go: whose token is being reviewed waits for us, not we for it."""
        return next(
            (c for c, s in self._known.items() if not s.in_review and s.owner == owner), None
        )

    def said_hello(self, connection: Connection) -> None:
        """It keeps its place until its token was reviewed."""
        if connection in self._known:
            self._known[connection].in_review = True

    def may_be_reviewed(self, connection: Connection, now: float) -> bool:
        """Whether a token that nobody knows is worth a review: not where too many of its owner's
        were refused.
        """
        stranger = self._known.get(connection)  # None: it had to go meanwhile
        return stranger is not None and not self._is_loud(stranger.owner, now)

    def _is_loud(self, owner: str, now: float) -> bool:
        until = self._refused_until.get(owner, now)
        return until > now + REFUSAL_SECONDS * (REFUSALS_AT_ONCE - 1)

    def refused(self, connection: Connection, now: float) -> None:
        """Its token proves nothing."""
        stranger = self._known.get(connection)
        if stranger is None:
            return
        stranger.in_review = False
        until = max(now, self._refused_until.pop(stranger.owner, now)) + REFUSAL_SECONDS
        if len(self._refused_until) >= MAX_OWNERS:
            del self._refused_until[next(iter(self._refused_until))]
        self._refused_until[stranger.owner] = until

    def accepted(self, connection: Connection) -> None:
        """Its token proves who it is: whoever comes from there is heard from now on."""
        stranger = self._known.get(connection)
        if stranger is not None:
            self._trusted.pop(stranger.owner, None)
            self._trusted[stranger.owner] = None
            if len(self._trusted) > MAX_OWNERS:
                del self._trusted[next(iter(self._trusted))]

    def leave(self, connection: Connection) -> None:
        """It is a stranger no more, or gone."""
        stranger = self._known.pop(connection, None)
        if stranger is None:
            return
        self._owners[stranger.owner] -= 1
        if not self._owners[stranger.owner]:
            del self._owners[stranger.owner]
