"""Metrics and health over HTTP.

What is a state is read from the cache when it is scraped, so metrics say what the status says and nothing is left over from
objects that are gone. Health is the truth about the loop: it fails when a decision has been waiting for too long.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hotweights_operator.actions import Action
from hotweights_operator.cache import Cache
from hotweights_operator.model import Rollout
from hotweights_operator.revision import Outcome

_PREFIX = "hotweights_operator"
_ROLLOUT = "hotweights_rollout"
_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0)
_ROLLOUT_BUCKETS = (2.0, 5.0, 10.0, 20.0, 60.0, 180.0, 600.0, 1800.0, 7200.0)  # status has whole seconds


@dataclass(frozen=True, slots=True)
class Pulse:
    """How the loop is, as `Health` asks for it."""

    heard_seconds: float
    queue_depth: int
    queue_oldest_seconds: float
    synced: bool


class Rollouts(Collector):
    """The rollouts' states, as their status has them."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def collect(self) -> Iterable[Metric]:
        """One family per figure."""
        labels = ["namespace", "name"]
        rollouts: list[Rollout] = self._cache.values("rollout")
        info = GaugeMetricFamily(
            f"{_ROLLOUT}_info", "Version and phase of a rollout.", labels=[*labels, "version", "previous", "phase"]
        )
        condition = GaugeMetricFamily(
            f"{_ROLLOUT}_condition", "1 where a condition is True.", labels=[*labels, "type", "reason"]
        )
        pods = GaugeMetricFamily(f"{_ROLLOUT}_pods", "Pods of a rollout by state.", labels=[*labels, "state"])
        nodes = GaugeMetricFamily(f"{_ROLLOUT}_nodes", "Nodes of a rollout by state.", labels=[*labels, "state"])
        nbytes = GaugeMetricFamily(f"{_ROLLOUT}_bytes", "Bytes staged over all nodes.", labels=[*labels, "state"])
        for rollout in rollouts:
            where, status = [rollout.namespace, rollout.name], rollout.status
            info.add_metric([*where, status.target.version, status.previous.version, status.phase], 1)
            for found in status.conditions:
                condition.add_metric([*where, found.type, found.reason], 1 if found.status == "True" else 0)
            for state, count in status.pods.model_dump().items():
                pods.add_metric([*where, state], count)
            nodes.add_metric([*where, "desired"], status.nodes.desired)
            nodes.add_metric([*where, "staged"], status.nodes.staged)
            nbytes.add_metric([*where, "total"], status.nbytes.total)
            nbytes.add_metric([*where, "done"], status.nbytes.done)
        reasons = Tally((r.namespace, r.name, f.reason) for r in rollouts for f in r.status.failures)
        failures = GaugeMetricFamily(
            f"{_ROLLOUT}_failures", "Named failures (at most 20 are named) by reason.", labels=[*labels, "reason"]
        )
        for (namespace, name, reason), count in reasons.items():
            failures.add_metric([namespace, name, reason], count)
        return [info, condition, pods, nodes, nbytes, failures]


class Metrics:
    """All figures of this process."""

    def __init__(self, cache: Cache, pulse: Callable[[], Pulse]) -> None:
        self.registry = CollectorRegistry()
        self._reconciled = Counter(
            f"{_PREFIX}_reconcile", "Decisions by kind and result.", ["kind", "result"], registry=self.registry
        )
        self._seconds = Histogram(
            f"{_PREFIX}_reconcile_duration_seconds", "Time of a decision with its writes.", ["kind"],
            buckets=_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._rollouts = Histogram(
            f"{_ROLLOUT}_duration_seconds", "From the beginning of a revision to its end, by how it ended.", ["outcome"],
            buckets=_ROLLOUT_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._actions = Counter(f"{_PREFIX}_actions", "Writes done, by kind.", ["action"], registry=self.registry)
        build = Gauge(f"{_PREFIX}_build_info", "Version of the operator.", ["version"], registry=self.registry)
        build.labels(version("hotweights")).set(1)
        for name, text, read in (
            ("last_event_age_seconds", "Since something was heard from the API server.", lambda: pulse().heard_seconds),
            ("workqueue_depth", "Keys that wait to be decided.", lambda: pulse().queue_depth),
            ("workqueue_oldest_seconds", "How long the oldest of them waits.", lambda: pulse().queue_oldest_seconds),
        ):
            Gauge(f"{_PREFIX}_{name}", text, registry=self.registry).set_function(read)
        self.registry.register(Rollouts(cache))

    def reconciled(self, kind: str, result: str, seconds: float) -> None:
        """One key was worked on."""
        self._reconciled.labels(kind, result).inc()
        self._seconds.labels(kind).observe(seconds)

    def ended(self, outcome: Outcome, seconds: float) -> None:
        """A revision of a rollout ended."""
        self._rollouts.labels(outcome).observe(max(0.0, seconds))

    def acted(self, action: Action) -> None:
        """This was written."""
        self._actions.labels(type(action).__name__).inc()

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)


async def serve(
    metrics: Metrics, pulse: Callable[[], Pulse], *, metrics_port: int, health_port: int, stuck_seconds: float
) -> list[web.AppRunner]:
    """Serve /metrics and /healthz, each on its port, both on either; a port of 0 is not served."""

    async def show(_: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), content_type="text/plain", charset="utf-8")

    async def health(_: web.Request) -> web.Response:
        found = pulse()
        body = {
            "lastEventAgeSeconds": round(found.heard_seconds, 1),
            "queueDepth": found.queue_depth,
            "queueOldestSeconds": round(found.queue_oldest_seconds, 1),
            "synced": found.synced,
        }
        return web.json_response(body, status=503 if found.queue_oldest_seconds > stuck_seconds else 200)

    runners = []
    for port in sorted({metrics_port, health_port} - {0}):
        application = web.Application()
        application.add_routes([web.get("/metrics", show), web.get("/healthz", health)])
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, None, port).start()
        runners.append(runner)
    return runners
