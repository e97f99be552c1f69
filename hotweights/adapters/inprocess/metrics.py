"""What the binder did, for Prometheus: on port 9098 of this host, or another that
``HOTWEIGHTS_BINDER_METRICS_PORT`` names (0: none).
"""

from __future__ import annotations

import logging
import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, start_http_server

from hotweights_transports.handoff import frames

logger = logging.getLogger("vllm.hotweights.binder")
PORT_VARIABLE = "HOTWEIGHTS_BINDER_METRICS_PORT"
PORT = 9098  # between replicate's 9097 and worker's 9099, which may run on the same host


class BinderMetrics:
    """Counted when an engine has confirmed, never before."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._updates = Counter(
            "hotweights_binder_updates",
            "Switches of engines, by how they ended",
            ["result"],
            registry=self.registry,
        )
        self._pause = Gauge(
            "hotweights_binder_last_pause_seconds",
            "How long the last switch paused its engine",
            registry=self.registry,
        )
        self._version = Info(
            "hotweights_binder_current_version", "What was switched to last", registry=self.registry
        )
        # both are there from the start: a rate over a series that appears late misses its first
        for result in ("committed", "failed"):
            self._updates.labels(result)

    def note(self, answer: frames.Frame) -> None:
        """Count how a commit ended, by the answer to it."""
        if isinstance(answer, frames.Committed):
            self._updates.labels("committed").inc()
            self._pause.set(answer.pause_seconds)
            self._version.info({"digest": answer.digest, "token": str(answer.commit_token)})
        else:
            self._updates.labels("failed").inc()

    def serve(self) -> None:
        """A second process of this host goes without a port of its own, and says so."""
        text = os.environ.get(PORT_VARIABLE, "")
        port = int(text) if text.isdigit() else PORT
        if not port:
            return
        try:
            # this host only: nothing proves who asks
            start_http_server(port, addr="127.0.0.1", registry=self.registry)
        except OSError as error:
            logger.warning(
                "No metrics on port %d (%s); name another with %s",
                port,
                error.strerror,
                PORT_VARIABLE,
            )
