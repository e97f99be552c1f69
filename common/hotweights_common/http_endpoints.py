"""The small HTTP server of every process but the operator: /metrics for Prometheus, and the
kubelet's two probes.

It runs in a thread of its own, so that a busy process still answers. Anybody may connect, so
connections are few, and the oldest gives way: the kubelet's probe must never find them taken. It needs prometheus_client,
which only some installations have: nothing else of this package imports it.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

log = logging.getLogger(__name__)

CLOSE_SECONDS = 0.1  # how long an idle server may take to notice that it is to end


MAX_CONNECTIONS = 32  # Prometheus and the kubelet need two; each has a thread


class _BoundedServer(ThreadingHTTPServer):
    """At most `MAX_CONNECTIONS` at a time: one more, and the oldest ends."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: Any, *, both: bool) -> None:
        """``both``: over IPv6 and IPv4 alike."""
        self._open: dict[Any, None] = {}  # oldest first
        self._lock = threading.Lock()
        self._both = both
        self.address_family = socket.AF_INET6 if both or ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self) -> None:
        if self._both:  # `::` alone may leave IPv4 out
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread wakes, and closes it
            self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # what others do to their connection is no news, a defect of ours is
        is_theirs = isinstance(sys.exception(), OSError)
        level = logging.DEBUG if is_theirs else logging.ERROR
        log.log(level, "a request of %s failed", client_address, exc_info=True)


class Endpoints:
    """Serves /metrics, /healthz and /readyz from construction until `close`."""

    def __init__(
        self,
        port: int,
        registry: CollectorRegistry,
        healthy: Callable[[], str],
        ready: Callable[[], str],
        host: str = "",
    ) -> None:
        """``healthy`` and ``ready`` say what is wrong; empty: nothing. They are called in a
        request's thread. No ``host``: every address, of IPv6 too where there is any. Port 0 takes a free one. Raises `OSError`.
        """

        class Handler(BaseHTTPRequestHandler):
            timeout = 5  # seconds; a connection that asks nothing must not hold its thread

            def do_GET(self) -> None:
                if self.path.partition("?")[0] == "/metrics":
                    self._answer(200, generate_latest(registry), CONTENT_TYPE_LATEST)
                elif self.path in ("/healthz", "/readyz"):
                    wrong = healthy() if self.path == "/healthz" else ready()
                    self._answer(
                        503 if wrong else 200,
                        f"{wrong or 'ok'}\n".encode(),
                        "text/plain; charset=utf-8",
                    )
                else:
                    self._answer(
                        404,
                        b"there are /metrics, /healthz and /readyz\n",
                        "text/plain; charset=utf-8",
                    )

            def _answer(self, code: int, body: bytes, kind: str) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                log.debug(format, *args)

        # not where the kernel was started without IPv6
        both = not host and socket.has_dualstack_ipv6()
        self._server = _BoundedServer((host, port), Handler, both=both)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(CLOSE_SECONDS,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving, and wait for the server's thread. Not to be called from a request."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
