"""Metrics and health over HTTP.

What is a state is read from the cache when it is scraped, so metrics say what the status says and
nothing is left over from objects that are gone. /healthz says whether a restart would help: it
fails when the loop does not run (then nobody answers) or a decision has been waiting for too long.
/readyz says whether the operator sees: it fails until everything was listed, and while nothing is
heard of some kind. No Service leads to the operator, so nothing depends on that but ``helm --wait``
and people.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hotweights_operator.decide.revision import Outcome
from hotweights_operator.model.actions import Action
from hotweights_operator.model.objects import Rollout
from hotweights_operator.runtime.cache import Cache, Kind

_PREFIX = "hotweights_operator"
_ROLLOUT = "hotweights_rollout"
# from a decision without a write to one that waits for a slow API server
_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0)
# status has whole seconds
_ROLLOUT_BUCKETS = (2.0, 5.0, 10.0, 20.0, 60.0, 180.0, 600.0, 1800.0, 7200.0)


@dataclass(frozen=True, slots=True)
class LoopHealth:
    """How the loop is and what it hears; ages and waits are in seconds."""

    heard_seconds: float
    queue_depth: int
    queue_oldest_seconds: float
    synced: bool
    # since when nothing was heard of a kind
    ages: Mapping[Kind, float] = field(default_factory=dict)
    unlisted: Sequence[Kind] = ()  # not listed yet
    # objects that do not fit this release
    malformed: Mapping[Kind, int] = field(default_factory=dict)

    def stale(self, stale_seconds: float) -> dict[Kind, float]:
        """The kinds of which nothing was heard for so long."""
        return {kind: age for kind, age in self.ages.items() if age > stale_seconds}


class Rollouts(Collector):
    """The rollouts' states, as their status has them."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def collect(self) -> Iterable[Metric]:
        """One family for each figure, as the cache has it now. In the thread of the event loop,
        when somebody scrapes.
        """
        labels = ["namespace", "name"]
        rollouts: list[Rollout] = self._cache.values("rollout")
        info = GaugeMetricFamily(
            f"{_ROLLOUT}_info",
            "The version that a rollout wants (its pods may still serve another one), the one "
            "before it, and the phase.",
            labels=[*labels, "version", "previous", "phase"],
        )
        condition = GaugeMetricFamily(
            f"{_ROLLOUT}_condition",
            "1 where a condition is True.",
            labels=[*labels, "type", "reason"],
        )
        pods = GaugeMetricFamily(
            f"{_ROLLOUT}_pods", "Pods of a rollout by state.", labels=[*labels, "state"]
        )
        nodes = GaugeMetricFamily(
            f"{_ROLLOUT}_nodes", "Nodes of a rollout by state.", labels=[*labels, "state"]
        )
        nbytes = GaugeMetricFamily(
            f"{_ROLLOUT}_bytes", "Bytes staged over all nodes.", labels=[*labels, "state"]
        )
        for rollout in rollouts:
            where, status = [rollout.namespace, rollout.name], rollout.status
            info.add_metric(
                [*where, status.target.version, status.previous.version, status.phase], 1
            )
            for found in status.conditions:
                condition.add_metric(
                    [*where, found.type, found.reason], 1 if found.status == "True" else 0
                )
            for state, count in status.pods.model_dump().items():
                pods.add_metric([*where, state], count)
            nodes.add_metric([*where, "desired"], status.nodes.desired)
            nodes.add_metric([*where, "staged"], status.nodes.staged)
            nbytes.add_metric([*where, "total"], status.nbytes.total)
            nbytes.add_metric([*where, "done"], status.nbytes.done)
        reasons = Counts(
            (r.namespace, r.name, f.reason) for r in rollouts for f in r.status.failures
        )
        failures = GaugeMetricFamily(
            f"{_ROLLOUT}_failures",
            "Named failures (at most 20 are named) by reason.",
            labels=[*labels, "reason"],
        )
        for (namespace, name, reason), count in reasons.items():
            failures.add_metric([namespace, name, reason], count)
        return [info, condition, pods, nodes, nbytes, failures]


class Watches(Collector):
    """What is heard of each kind, and what of it cannot be understood."""

    def __init__(self, loop_health: Callable[[], LoopHealth]) -> None:
        self._loop_health = loop_health

    def collect(self) -> Iterable[Metric]:
        """One family for each figure, as the loop says it now."""
        loop_health = self._loop_health()
        ages = GaugeMetricFamily(
            f"{_PREFIX}_watch_age_seconds",
            "Since something was heard of a kind, if only a bookmark.",
            labels=["kind"],
        )
        malformed = GaugeMetricFamily(
            f"{_PREFIX}_malformed_objects",
            "Objects that do not fit this release's schema, and about which nothing is decided.",
            labels=["kind"],
        )
        for kind, age in loop_health.ages.items():
            ages.add_metric([kind], age)
        for kind, count in loop_health.malformed.items():
            malformed.add_metric([kind], count)
        return [ages, malformed]


class Metrics:
    """All figures of this process. It is the loop's meter: what it counts is told by
    `reconciled`, `ended` and `acted`, all on the event loop.
    """

    def __init__(self, cache: Cache, loop_health: Callable[[], LoopHealth]) -> None:
        self.registry = CollectorRegistry()
        self._reconciled = Counter(
            f"{_PREFIX}_reconcile",
            "Decisions by kind and result.",
            ["kind", "result"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            f"{_PREFIX}_reconcile_duration_seconds", "Time of a decision with its writes.", ["kind"],
            buckets=_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._rollouts = Histogram(
            f"{_ROLLOUT}_duration_seconds", "From the beginning of a revision to its end, by how it "
                "ended.", ["outcome"],
            buckets=_ROLLOUT_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._actions = Counter(
            f"{_PREFIX}_actions", "Writes done, by kind.", ["action"], registry=self.registry
        )
        build = Gauge(
            f"{_PREFIX}_build_info", "Version of the operator.", ["version"], registry=self.registry
        )
        build.labels(version("hotweights")).set(1)
        for name, text, read in (
            (
                "last_event_age_seconds",
                "Since something was heard from the API server.",
                lambda: loop_health().heard_seconds,
            ),
            ("workqueue_depth", "Keys that wait to be decided.", lambda: loop_health().queue_depth),
            (
                "workqueue_oldest_seconds",
                "How long the oldest of them waits.",
                lambda: loop_health().queue_oldest_seconds,
            ),
        ):
            Gauge(f"{_PREFIX}_{name}", text, registry=self.registry).set_function(read)
        self.registry.register(Rollouts(cache))
        self.registry.register(Watches(loop_health))

    def reconciled(self, kind: str, result: str, seconds: float) -> None:
        """One key was worked on, with its writes. ``result`` becomes a label."""
        self._reconciled.labels(kind, result).inc()
        self._seconds.labels(kind).observe(seconds)

    def ended(self, outcome: Outcome, seconds: float) -> None:
        """A revision of a rollout ended."""
        # not below 0: status has whole seconds, and clocks are set back
        self._rollouts.labels(outcome).observe(max(0.0, seconds))

    def acted(self, action: Action) -> None:
        """An action was written; it is counted by its kind."""
        self._actions.labels(type(action).__name__).inc()

    def text(self) -> bytes:
        """All figures in the text format that Prometheus reads."""
        return generate_latest(self.registry)


def health(loop_health: LoopHealth, stuck_seconds: float) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of /healthz: 503 when a decision has waited longer than
    ``stuck_seconds``.
    """
    body = {
        "lastEventAgeSeconds": round(loop_health.heard_seconds, 1),
        "queueDepth": loop_health.queue_depth,
        "queueOldestSeconds": round(loop_health.queue_oldest_seconds, 1),
        "synced": loop_health.synced,
        "malformedObjects": {kind: count for kind, count in loop_health.malformed.items() if count},
    }
    return 503 if loop_health.queue_oldest_seconds > stuck_seconds else 200, body


def readiness(
    loop_health: LoopHealth, stale_seconds: float, now: datetime
) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of /readyz, which names what is not heard for ``stale_seconds``, and
    since when.
    """
    stale = loop_health.stale(stale_seconds)
    ready = loop_health.synced and not stale
    body = {
        "ready": ready,
        "unlisted": list(loop_health.unlisted),
        "stale": {
            kind: (now - timedelta(seconds=age)).isoformat(timespec="seconds")
            for kind, age in stale.items()
        },
    }
    return 200 if ready else 503, body


async def serve(
    metrics: Metrics,
    loop_health: Callable[[], LoopHealth],
    *,
    metrics_port: int,
    health_port: int,
    stuck_seconds: float,
    stale_seconds: float,
) -> list[web.AppRunner]:
    """Serve /metrics, /healthz and /readyz on both ports; a port of 0 is not served. The caller
    cleans the runners up. Raises OSError for a port that is taken.
    """

    async def show(_: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), content_type="text/plain", charset="utf-8")

    async def healthz(_: web.Request) -> web.Response:
        status, body = health(loop_health(), stuck_seconds)
        return web.json_response(body, status=status)

    async def readyz(_: web.Request) -> web.Response:
        status, body = readiness(loop_health(), stale_seconds, datetime.now(UTC))
        return web.json_response(body, status=status)

    runners = []
    for port in sorted({metrics_port, health_port} - {0}):  # a set: both may be the same
        application = web.Application()
        application.add_routes(
            [web.get("/metrics", show), web.get("/healthz", healthz), web.get("/readyz", readyz)]
        )
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, None, port).start()
        runners.append(runner)
    return runners
