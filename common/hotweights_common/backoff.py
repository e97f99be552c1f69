"""How long to wait before a thing that failed is tried again. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_MOST_DOUBLINGS = 64  # far beyond any longest wait, and a float holds it


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits between tries: ``first_seconds``, then ``factor`` times longer each time, up to
    ``longest_seconds``.
    """

    first_seconds: float
    longest_seconds: float
    factor: float = 2.0

    def seconds(self, failures: int) -> float:
        """How long to wait after so many failures in a row; 0 after none."""
        if failures < 1:
            return 0.0
        return min(
            self.longest_seconds,
            self.first_seconds * self.factor ** min(failures - 1, _MOST_DOUBLINGS),
        )

    def spread(self, failures: int, draw: Callable[[], float]) -> float:
        """The same between half and whole by a draw from [0, 1), so that many who failed together
        do not come back together ("equal jitter" in the AWS Architecture Blog's "Exponential
        Backoff And Jitter").
        """
        return self.seconds(failures) * (0.5 + draw() / 2)
