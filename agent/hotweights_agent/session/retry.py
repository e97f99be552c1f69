"""How often a thing is tried, when again, and how fast it may go on. Pure arithmetic on the
caller's clock.

After ``most`` failures, or past a deadline, a thing has failed until what was asked for changes.
Without ``most`` it is tried for as long as somebody wants it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hotweights_common.backoff import Backoff


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a thing is tried (None: for as long as somebody wants it), and how long to wait in
    between.
    """

    most: int | None  # failures, not retries: the one that reaches it is the last
    backoff: Backoff


@dataclass(frozen=True, slots=True)
class RetryState:
    """What became of the tries so far. Immutable; `failed` gives the next state."""

    failures: int = 0
    again_at: float = 0.0  # seconds of the caller's clock
    given_up: bool = False
    reason: str = ""  # of the last failure; empty iff there was none
    message: str = ""

    def may_start(self, now: float) -> bool:
        """Whether another try may begin now."""
        return not self.given_up and now >= self.again_at

    def failed(
        self, now: float, policy: RetryPolicy, reason: str, message: str, *, transient: bool = True
    ) -> RetryState:
        """One more failure; final if it is not transient or was the last that is allowed."""
        failures = self.failures + 1
        # the next try would end the same, or there is none
        if not transient or (policy.most is not None and failures >= policy.most):
            return RetryState(failures, now, True, reason, message)
        return RetryState(failures, now + policy.backoff.seconds(failures), False, reason, message)

    def until(self, deadline: float) -> RetryState:
        """The same, given up if the next try would begin after the deadline."""
        return replace(self, given_up=self.given_up or self.again_at > deadline)


class TokenBucket:
    """A token bucket (https://en.wikipedia.org/wiki/Token_bucket) on the caller's clock: ``burst``
    at once, then ``per_second``.
    """

    def __init__(self, per_second: float, burst: int, now: float) -> None:
        self._per_second, self._burst = per_second, burst
        self._level, self._at = float(burst), now

    def wait_seconds(self, now: float) -> float:
        """Seconds until the next token; 0 if there is one."""
        self._level = min(self._burst, self._level + (now - self._at) * self._per_second)
        self._at = now
        return max(0.0, (1.0 - self._level) / self._per_second)

    def is_full(self, now: float) -> bool:
        """Whether nothing was taken for so long that a new bucket would be the same."""
        self.wait_seconds(now)
        return self._level >= self._burst

    def take(self) -> None:
        """One token less. Below zero is allowed: then the next one has to wait for both."""
        self._level -= 1.0
