"""What Prometheus is told. Labels are bounded: methods and reasons that there are, no worker, no
version, no digest.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from hotweights_common.http_endpoints import Endpoints
from hotweights_common.reasons import COUNTED_BY_COORDINATORS, Reason
from hotweights_coordinator.state.membership import Membership
from hotweights_coordinator.state.state import CoordinatorState
from hotweights_coordinator.wire.messages import METHODS, CoordinatorError

PORT_VARIABLE = "HOTWEIGHTS_COORD_METRICS_PORT"
DEFAULT_PORT = 9100  # a worker has 9099, so that both may run on one host
PHASES = ("idle", "begun", "precommitted", "committed", "aborted")
# buckets: from an answer that needs no write to that of a plan, which is checked first
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0)

# what a call ends with; another reason must not become a time series of its own
_RESULTS = COUNTED_BY_COORDINATORS | {"ok"}


class Metrics:
    """All metrics of one coordinator, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.workers = Gauge("hotweights_coord_workers", "Live workers.", registry=r)
        self.precommits = Gauge(
            "hotweights_coord_precommit_acks", "Workers that have prepared the attempt.", registry=r
        )
        self.have = Gauge(
            "hotweights_coord_have",
            "Whole versions at workers, each counted at each worker.",
            registry=r,
        )
        self.applied = Gauge(
            "hotweights_coord_applied", "Workers that serve what is current.", registry=r
        )
        self.token = Gauge(
            "hotweights_coord_token", "Token of the newest begin or abort.", registry=r
        )
        self.leader = Gauge(
            "hotweights_coord_leader", "1 while this coordinator decides.", registry=r
        )
        self.plan_bytes = Gauge(
            "hotweights_coord_plan_bytes", "Size of the submitted plan.", registry=r
        )
        self.state = Gauge(
            "hotweights_coord_state", "1 for the state that holds.", ["state"], registry=r
        )
        self.stores = Counter("hotweights_coord_stores", "Writes of state.", ["result"], registry=r)
        self.events = Counter(
            "hotweights_coord_events", "Events that were published.", ["topic"], registry=r
        )
        self._calls = Counter(
            "hotweights_coord_calls",
            "Calls by method and result.",
            ["method", "result"],
            registry=r,
        )
        self._seconds = Histogram(
            "hotweights_coord_call_seconds",
            "From a call's arrival to its answer.",
            ["method"],
            buckets=SECONDS,
            registry=r,
        )
        self._children: dict[tuple[str, str], tuple[Counter, Histogram]] = {}

    def show(self, durable: CoordinatorState | None, membership: Membership) -> None:
        """What is a state rather than an event. ``durable`` None: this coordinator decides
        nothing.
        """
        self.leader.set(1 if durable is not None else 0)
        durable = durable or CoordinatorState()
        self.workers.set(len(durable.workers))
        self.precommits.set(len(durable.attempt.precommits) if durable.attempt else 0)
        self.have.set(sum(len(membership.have_of(name)) for name in durable.workers))
        self.applied.set(len(membership.have_applied(durable)))
        self.token.set(durable.token)
        self.plan_bytes.set(durable.plan.nbytes if durable.plan else 0)
        for phase in PHASES:
            self.state.labels(phase).set(1 if phase == durable.phase else 0)

    def answered(self, method: str, result: str, seconds: float) -> None:
        """Count one call, its result (``ok`` or a reason) and the seconds from its arrival."""
        key = (method if method in METHODS else "other", result if result in _RESULTS else "Other")
        if key not in self._children:
            self._children[key] = (self._calls.labels(*key), self._seconds.labels(key[0]))
        counter, histogram = self._children[key]
        counter.inc()
        histogram.observe(seconds)


def serve(metrics: Metrics, host: str, port: int, healthy: str = "") -> Endpoints:
    """An HTTP server with /metrics. Raises `CoordinatorError` where the port is taken."""
    try:
        return Endpoints(port, metrics.registry, lambda: healthy, lambda: healthy, host=host)
    except OSError as error:
        text = f"cannot serve metrics at port {port} of {host or 'any address'}: {error.strerror}"
        raise CoordinatorError(
            f"{text}; name another with ${PORT_VARIABLE} (0: any)", Reason.PORT_TAKEN
        ) from error
