"""Clients that never stop asking: they find out whether anybody notices a change of weights.

Every address gets clients that send one completion after the other, and clients that read theirs as
a stream and notice how long they wait between two tokens. A request counts as failed when it does
not end with status 200 and a reason that a client would accept; what failed is kept, word for word.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from types import TracebackType
from typing import Self

ACCEPTED = ("length", "stop")


def complete_ids(
    address: str, prompt: Sequence[int], max_tokens: int = 24, timeout_seconds: float = 60
) -> list[int]:
    """The greedy continuation of a prompt by the engine at ``host:port``, in token ids: what two
    engines are compared by.
    """
    with _post(address, list(prompt), max_tokens, timeout_seconds) as answer:
        return list(json.loads(answer.read())["choices"][0]["token_ids"])


@contextmanager
def _post(
    address: str,
    prompt: str | list[int],
    max_tokens: int,
    timeout_seconds: float,
    *,
    stream: bool = False,
) -> Iterator[HTTPResponse]:
    body = {
        "return_token_ids": True,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"http://{address}/v1/completions",
        json.dumps({**body, "stream": stream}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=timeout_seconds) as answer:
        yield answer


class Traffic:
    """A context manager: requests run from entry to exit, and all of them end before it returns."""

    def __init__(
        self, addresses: Sequence[str], plain: int = 1, streams: int = 0, max_tokens: int = 16
    ) -> None:
        """So many clients of either kind for each address."""
        self._max_tokens = max_tokens
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._requests = 0
        self._failures: list[str] = []
        self._slowest_seconds = 0.0
        # when, and the seconds between two tokens of one stream
        self._gaps: list[tuple[float, float]] = []
        self._threads = [
            threading.Thread(
                target=self._ask, args=(address, number, number < streams), daemon=True
            )
            for address in addresses
            for number in range(streams + plain)
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

    def worst_gap(self, since: float = 0.0, until: float = float("inf")) -> float:
        """The longest that a stream stood still, between two moments of the monotonic clock."""
        with self._lock:
            return max((gap for when, gap in self._gaps if since <= when <= until), default=0.0)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=90)

    def _ask(self, address: str, number: int, stream: bool) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            prompt = f"client {number} asks {turn} times"
            began = time.monotonic()
            failure = ""
            try:
                with _post(address, prompt, self._max_tokens, 60, stream=stream) as answer:
                    reason = (
                        self._read(answer)
                        if stream
                        else json.loads(answer.read())["choices"][0]["finish_reason"]
                    )
                if reason not in ACCEPTED:
                    failure = f"{address}: ended with {reason}"
            except (OSError, HTTPException, ValueError, KeyError) as error:
                failure = f"{address}: {type(error).__name__}: {error}"
            with self._lock:
                self._requests += 1
                self._slowest_seconds = max(self._slowest_seconds, time.monotonic() - began)
                if failure:
                    self._failures.append(failure)
            if failure:
                self._stop.wait(0.2)  # a dead address must not turn into a busy loop

    def _read(self, answer: HTTPResponse) -> str:
        """The reason by which a stream ended, if it did."""
        reason, last = "nothing: the stream broke off", time.monotonic()
        for line in answer:
            if line.startswith(b"data: {"):
                now = time.monotonic()
                with self._lock:
                    self._gaps.append((now, now - last))
                last = now
                reason = json.loads(line[6:])["choices"][0].get("finish_reason") or reason
        return reason
