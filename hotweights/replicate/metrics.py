"""What Prometheus is told of one replication, from its start until the process ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge

from hotweights_common.http_endpoints import Endpoints

log = logging.getLogger(__name__)

HOST = "127.0.0.1"  # nothing here proves who asks, so only this host may


class Metrics:
    """All metrics of one replication, in a registry of their own: the process' default one has
    figures of Python besides.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.planned = Gauge(
            "hotweights_replicate_planned_bytes", "Bytes of the version.", registry=r
        )
        self.moved = Counter(
            "hotweights_replicate_bytes", "Verified bytes that came in.", ["transport"], registry=r
        )
        self.reused = Counter(
            "hotweights_replicate_reused_bytes", "Bytes that were on this host.", registry=r
        )
        self.seconds = Gauge(
            "hotweights_replicate_seconds", "What the last transfer took.", registry=r
        )
        self.rate = Gauge(
            "hotweights_replicate_bytes_per_second", "Measured in the last transfer.", registry=r
        )
        self.runs = Counter(
            "hotweights_replicate_runs", "Transfers, by how they ended.", ["result"], registry=r
        )

    @contextmanager
    def served(self, port: int) -> Iterator[int]:
        """At /metrics of this host; a port that is taken costs the metrics, not the replication.
        Gives the port, 0: none.
        """
        try:
            web = Endpoints(port, self.registry, lambda: "", lambda: "", host=HOST)
        except OSError as error:
            log.warning(
                "no metrics: port %d: %s; name another with --metrics-port", port, error.strerror
            )
            yield 0
            return
        try:
            yield web.port
        finally:
            web.close()
