"""Clients that never stop asking: they find out whether anybody notices a change of weights.

Every address gets clients that send one completion after the other, and clients that read theirs as
a stream and notice how long they wait between two tokens. A request counts as failed when it does
not end with status 200 and a reason that a client would accept; what failed is kept, word for word.
Whoever looks at failures has to look at `Traffic.answered` too: an address that was never reached
has none. A client that hangs is an error of the traffic.
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
REQUEST_SECONDS = 60.0
END_SECONDS = 90.0  # longer than any request may take


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
        self._answered = dict.fromkeys(addresses, 0)
        self._failures: list[str] = []
        self._slowest_seconds = 0.0
        # when, and the seconds between two tokens of one stream
        self._gaps: list[tuple[float, float]] = []
        self._threads = [
            threading.Thread(
                target=self._ask,
                args=(address, number, number < streams),
                name=address,
                daemon=True,
            )
            for address in addresses
            for number in range(streams + plain)
        ]
        if not self._threads:
            raise ValueError("nobody asks anything")

    @property
    def requests(self) -> int:
        """How many requests ended so far."""
        with self._lock:
            return self._requests

    @property
    def answered(self) -> dict[str, int]:
        """How many requests ended well so far, by address; 0 for one that was never reached."""
        with self._lock:
            return dict(self._answered)

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

    @property
    def streamed(self) -> int:
        """How many pieces of streams came so far."""
        with self._lock:
            return len(self._gaps)

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
        deadline = time.monotonic() + END_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        hung = [thread.name for thread in self._threads if thread.is_alive()]
        for address in hung:
            self._note(address, f"{address}: no end within {END_SECONDS:g} s")
        if error is not None:
            return  # it says more
        if hung:
            raise TimeoutError(f"requests without an end within {END_SECONDS:g} s: {hung}")

    def _ask(self, address: str, number: int, stream: bool) -> None:
        turn = 0
        while not turn or not self._stop.is_set():  # everybody asks once
            turn += 1
            prompt = f"client {number} asks {turn} times"
            began = time.monotonic()
            failure = ""
            try:
                with _post(
                    address, prompt, self._max_tokens, REQUEST_SECONDS, stream=stream
                ) as answer:
                    reason = (
                        self._read(answer)
                        if stream
                        else json.loads(answer.read())["choices"][0]["finish_reason"]
                    )
                if reason not in ACCEPTED:
                    failure = f"{address}: ended with {reason}"
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                failure = f"{address}: {type(error).__name__}: {error}"
            self._note(address, failure, time.monotonic() - began)
            if failure:
                self._stop.wait(0.2)  # a dead address must not turn into a busy loop

    def _note(self, address: str, failure: str, seconds: float = 0.0) -> None:
        with self._lock:
            self._requests += 1
            self._slowest_seconds = max(self._slowest_seconds, seconds)
            if failure:
                self._failures.append(failure)
            else:
                self._answered[address] += 1

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
