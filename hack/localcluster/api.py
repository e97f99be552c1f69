"""The few questions that starting a cluster asks its API server, over the standard library's HTTP
client.

Tests and the product use the real Kubernetes client with the kubeconfig; this package must not need
it.
"""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path
from typing import Any

from localcluster.errors import ClusterError

_TIMEOUT_SECONDS = 10.0


class Unreachable(ClusterError):
    """Nobody answered at the API server's address."""


class Refused(ClusterError):
    """The API server answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """One API server, as one identity."""

    def __init__(self, url: str, authority: Path, token: str) -> None:
        self._url = url
        self._token = token
        self._tls = ssl.create_default_context(cafile=str(authority))

    def get(self, path: str) -> Any:
        """The object at this path."""
        return json.loads(self._call("GET", path, None))

    def post(self, path: str, body: object) -> Any:
        """Create, and give back what was created."""
        return json.loads(self._call("POST", path, body))

    def ready(self) -> bool:
        """Whether the API server says that it is ready."""
        try:
            return self._call("GET", "/readyz", None) == b"ok"
        except (Unreachable, Refused):
            return False

    def exists(self, path: str) -> bool:
        """Whether there is an object at this path; not, either, while the API server cannot say."""
        try:
            self.get(path)
        except Unreachable:
            return False
        except Refused as refusal:
            if refusal.status in (HTTPStatus.NOT_FOUND, HTTPStatus.FORBIDDEN):
                return False
            raise
        return True

    def _call(self, method: str, path: str, body: object) -> bytes:
        request = urllib.request.Request(
            self._url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
        )
        # Not through a proxy that the environment may name: the address is on this machine.
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self._tls)
        )
        try:
            with opener.open(request, timeout=_TIMEOUT_SECONDS) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode(errors="replace")
            raise Refused(error.code, f"{method} {path}: {error.code} {said}") from error
        except OSError as error:
            raise Unreachable(f"The API server at {self._url} does not answer: {error}") from error
