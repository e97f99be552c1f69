"""Between the thread that drives a synchronous engine and the one that changes its weights: never
both, and neither starves.

vLLM's synchronous client is not made for two threads (it has one socket, and in one process the
steps themselves run in the caller's thread). So every call of the caller passes the gate, and a
switch holds it from its first question to the resume: it happens between two of the caller's calls,
and while the caller does nothing at all, too. Whoever waits for a switch goes before the caller's
next call.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any


class Gate:
    """Callers go in and out all the time; a switch closes it. Calls inside calls pass."""

    def __init__(self) -> None:
        # held by a switch while it waits and while it lasts: callers queue behind it
        self._next = threading.Lock()
        self._inside = threading.Lock()
        self._own = threading.local()
        self._dead: Exception | None = None

    def fail(self, error: Exception) -> None:
        """From now on every call of the caller's gets this error. From any thread."""
        self._dead = error

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Within it no switch happens. A call inside a call passes at once: it would wait for
        itself. Raises what `fail` was given.
        """
        if getattr(self._own, "depth", 0):
            yield
            return
        with self._next:  # behind a switch that waits, else a busy caller would starve it
            self._inside.acquire()
        self._own.depth = 1
        try:
            if self._dead is not None:
                raise self._dead
            yield
        finally:
            self._own.depth = 0
            self._inside.release()

    def close(self, seconds: float) -> bool:
        """Wait until no call is inside, and let none in until `open`, which any thread may call.
        False: that took too long. Each of its two locks is waited for at most ``seconds``.
        """
        if not self._next.acquire(timeout=seconds):
            return False
        if self._inside.acquire(timeout=seconds):
            return True
        self._next.release()
        return False

    def open(self) -> None:
        """Let calls in again: the switch is over. Only after a `close` that gave True."""
        self._inside.release()
        self._next.release()


class Guarded:
    """An engine's client whose every method passes the gate; to everybody else it looks like the
    client.
    """

    def __init__(self, client: Any, gate: Gate) -> None:
        object.__setattr__(self, "hotweights_client", client)
        object.__setattr__(self, "_gate", gate)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.hotweights_client, name)
        return (
            _passing(value, self._gate)
            if callable(value) and not isinstance(value, type)
            else value
        )

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.hotweights_client, name, value)


def _passing(method: Callable[..., Any], gate: Gate) -> Callable[..., Any]:
    @wraps(method)
    def passing(*args: Any, **kwargs: Any) -> Any:
        with gate.call():
            return method(*args, **kwargs)

    return passing
