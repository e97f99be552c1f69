"""How hard a fetch tries: how long it waits for a peer that does not know the version yet, how often
a chunk goes through all sources, when it gives up.
"""

from __future__ import annotations

import dataclasses

from hotweights_common.backoff import Backoff


@dataclasses.dataclass(frozen=True, slots=True)
class FetchPolicy:
    """How hard to try, before a fetch fails and the session decides whether to try again."""

    deadline_seconds: float = 1800.0
    """For the whole fetch."""
    rounds: int = 3
    """How often a chunk goes through all sources before the fetch fails."""
    backoff: Backoff = Backoff(1.0, 60.0)
    """Before a source that failed is asked again."""
    patience_seconds: float = 20.0
    """From the start: how long a peer that does not know the version is asked again instead of
    being passed over.
    """
    again_seconds: float = 0.5
    """Between two such questions."""
    progress_seconds: float = 0.5
    """Between two reports."""
    rate_seconds: float = 30.0
    """Over so long the rate of a source is measured."""

    probe_nbytes: int = 32 << 20
    """Of what a slow source has not been asked for, so much (an eighth, if that is less) shows how
    quick another one would be.
    """
    far_quicker: float = 2.0
    """By so much another one has to be quicker, before it takes a part of what a slow one owes."""

    def is_slow(self, nbytes: int, seconds: float, left_nbytes: int) -> bool:
        """Whether a source that brought ``nbytes`` in ``seconds`` takes longer for what is left than
        it takes to find out who would be quicker.
        """
        return nbytes > 0 and left_nbytes * seconds > self.rate_seconds * nbytes

    def is_hopeless(
        self, nbytes: int, seconds: float, left_nbytes: int, left_seconds: float
    ) -> bool:
        """Whether a source that brought ``nbytes`` in ``seconds`` cannot bring what is left in time.
        One that brought nothing is silent or waits itself, which others judge.
        """
        return nbytes > 0 and left_nbytes * seconds > left_seconds * nbytes
