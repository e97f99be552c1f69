"""Writes that were sent and not answered yet when their process came to a standstill: they arrive
whenever they arrive, if only after another process has taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from types import coroutine
from typing import Any

from hotweights_operator.model.actions import Action

Answer = Exception | None
"""What the API server said to a write; None: it is done."""


@coroutine
def answered() -> Generator[None, Answer, Answer]:
    """Wait for the API server."""
    return (yield)


@dataclass(slots=True, eq=False)
class OnItsWay:
    """One such write, and the loop's coroutine that waits for the answer."""

    action: Action
    waits: Coroutine[Any, Answer, Any] | None  # None: nobody waits any more
    has_arrived: bool = False
    answer: Answer = None

    def arrive(self, send: Callable[[Action], Answer]) -> None:
        """The API server gets it."""
        self.has_arrived, self.answer = True, send(self.action)

    def is_heard(self) -> None:
        """Whoever waits gets the answer."""
        waits, self.waits = self.waits, None
        if waits is not None:
            try:
                waits.send(self.answer)
            except StopIteration:
                return
            raise RuntimeError("a write asks the API server once")

    def is_forgotten(self) -> None:
        """Whoever waited does so no more; it may arrive all the same."""
        if self.waits is not None:
            self.waits.close()
            self.waits = None
