"""A client that never stops asking: it finds out whether anybody notices a change of weights.

Every address gets its own threads, each sending one completion after the other. A request counts as failed when it does not end
with status 200 and a reason that a client would accept; what failed is kept, word for word.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

ACCEPTED = ("length", "stop")


def complete_ids(address: str, prompt: Sequence[int], max_tokens: int = 24, timeout_seconds: float = 60) -> list[int]:
    """The greedy continuation of a prompt by the engine at ``host:port``, in token ids: what two engines are compared by."""
    return list(_post(address, list(prompt), max_tokens, timeout_seconds)["choices"][0]["token_ids"])


def _post(address: str, prompt: str | list[int], max_tokens: int, timeout_seconds: float) -> dict[str, Any]:
    body = {"return_token_ids": True, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout_seconds) as answer:
        parsed: dict[str, Any] = json.loads(answer.read())
        return parsed


class Traffic:
    """A context manager: requests run from entry to exit, and all of them end before it returns."""

    def __init__(self, addresses: Sequence[str], threads_per_address: int = 1, max_tokens: int = 16) -> None:
        self._max_tokens = max_tokens
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._requests = 0
        self._failures: list[str] = []
        self._slowest_seconds = 0.0
        self._threads = [
            threading.Thread(target=self._ask, args=(address, number), daemon=True)
            for address in addresses
            for number in range(threads_per_address)
        ]

    @property
    def requests(self) -> int:
        """How many requests ended so far."""
        with self._lock:
            return self._requests

    @property
    def failures(self) -> list[str]:
        """What failed, and why."""
        with self._lock:
            return list(self._failures)

    @property
    def slowest_seconds(self) -> float:
        """The longest that a request took."""
        with self._lock:
            return self._slowest_seconds

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=90)

    def _ask(self, address: str, number: int) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            began = time.monotonic()
            failure = ""
            try:
                choice = _post(address, f"client {number} asks {turn} times", self._max_tokens, 60)["choices"][0]
                if choice["finish_reason"] not in ACCEPTED:
                    failure = f"{address}: ended with {choice['finish_reason']}"
            except (OSError, ValueError, KeyError, urllib.error.HTTPError) as error:
                failure = f"{address}: {type(error).__name__}: {error}"
            with self._lock:
                self._requests += 1
                self._slowest_seconds = max(self._slowest_seconds, time.monotonic() - began)
                if failure:
                    self._failures.append(failure)
            if failure:
                self._stop.wait(0.2)  # a dead address must not turn into a busy loop
