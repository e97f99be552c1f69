"""What is only known while it is being said: who is alive, who has what, who applied what, and who
pulls from whom.

A coordinator that takes over knows none of it and learns all of it from the next heartbeats;
nothing here is ever stored, and nothing here decides alone: `state` hears who fell silent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from hotweights_coordinator.state.state import EVENTS_PER_TOPIC, CoordinatorState, Event, Worker
from hotweights_coordinator.wire import address
from hotweights_coordinator.wire.messages import Applied, Failure
from hotweights_planner.pull_routes import Route, plan_routes

# routes of a thousand are not made anew for every worker that joins or becomes a donor
ROUTES_SECONDS = 0.25

_ALONE = Route((), True, ())


@dataclass
class Membership:
    """One coordinator's view, since it leads."""

    ttl_seconds: float
    origin_readers: int = 1
    """How many workers read the source at the same time where nobody has the version yet."""
    applied: dict[str, Applied] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    engines: dict[str, int] = field(default_factory=dict)
    """How many are connected to a worker, where it says so."""
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=EVENTS_PER_TOPIC))
    _seen: dict[str, float] = field(default_factory=dict)
    _have: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _looked_at: float | None = None
    _routes: dict[str, Route] = field(default_factory=dict)
    _routes_of: str = ""
    _routes_at: float = float("-inf")
    _routes_stale: bool = True

    def led(self, workers: Iterable[str], now: float) -> None:
        """Whoever is registered gets a whole TTL to be heard."""
        self._seen = dict.fromkeys(workers, now)

    def heard(self, worker_id: str, have: tuple[str, ...] | None, now: float) -> None:
        """It lives; ``have`` None says nothing about what it has."""
        self._seen[worker_id] = now
        if have is not None and self._have.get(worker_id, ()) != have:
            self._have[worker_id] = have
            self._routes_stale = True

    def started_anew(self, worker_id: str) -> None:
        """Another process under this name: what the former one said is void."""
        for said in (self.applied, self.failures, self.engines, self._have):
            said.pop(worker_id, None)
        self._routes_stale = True

    def silent(self, workers: Collection[str], now: float, look_seconds: float) -> list[str]:
        """Those not heard for a TTL. Called every ``look_seconds``; if that was long ago it is we
        who slept, not they.
        """
        # twice: one look may come late without anybody having slept
        late = (
            0.0 if self._looked_at is None else max(0.0, now - self._looked_at - 2 * look_seconds)
        )
        self._looked_at = now
        if late:
            self._seen = {name: min(now, seen + late) for name, seen in self._seen.items()}
        for worker_id in self._seen.keys() - set(workers):
            del self._seen[worker_id]
            self.started_anew(worker_id)
        return [
            name for name in workers if now - self._seen.setdefault(name, now) > self.ttl_seconds
        ]

    def silence_seconds(self, worker_id: str, now: float) -> float:
        return max(0.0, now - self._seen.get(worker_id, now))

    def have_of(self, worker_id: str) -> tuple[str, ...]:
        return self._have.get(worker_id, ())

    def donors(self, digest: str, workers: Mapping[str, Worker]) -> list[Worker]:
        """Workers that have the whole version, by their own word, in the order of registration."""
        return [worker for name, worker in workers.items() if digest in self._have.get(name, ())]

    def have_applied(self, durable: CoordinatorState) -> list[str]:
        """Who serves what is current, by the decision that made it so."""
        current = durable.current
        if current is None:
            return []
        said = Applied.model_construct(digest=current.digest, token=current.token)
        return sorted(name for name in durable.workers if self.applied.get(name) == said)

    def route(
        self, worker_id: str, digest: str, workers: Mapping[str, Worker], now: float
    ) -> Route:
        """Whom this worker asks for that version."""
        if self._must_route(worker_id, digest, len(workers), now):
            ids = list(workers)
            donors = frozenset(worker.worker_id for worker in self.donors(digest, workers))
            previous = (
                {}
                if self._routes_of != digest
                else {name: r.parents for name, r in self._routes.items()}
            )
            zones = {name: worker.zone or _zone(worker) for name, worker in workers.items()}
            self._routes = plan_routes(ids, donors, self.origin_readers, previous, zones)
            self._routes_of, self._routes_at, self._routes_stale = digest, now, False
        if worker_id not in self._routes:  # for a moment: behind whoever is last
            return Route((next(reversed(self._routes)),), False, ()) if self._routes else _ALONE
        return self._routes[worker_id]

    def _must_route(self, worker_id: str, digest: str, count: int, now: float) -> bool:
        if self._routes_of != digest:
            return True
        # the more workers, the more a plan costs, and the longer it stands
        return (self._routes_stale or worker_id not in self._routes) and (
            now - self._routes_at >= ROUTES_SECONDS * min(1.0, count / 1000)
        )


def _zone(worker: Worker) -> str:
    """Of the address that peers reach it at, whatever the transport."""
    try:
        return (
            address.zone_of(urlsplit(worker.endpoints[0]).hostname or "")
            if worker.endpoints
            else ""
        )
    except ValueError:
        return ""
