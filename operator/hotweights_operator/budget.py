"""How many more pods may become unavailable. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterable

from hotweights_crds.weightrollout import Strategy
from hotweights_operator.targets import Target


def limit(strategy: Strategy, desired: int) -> int:
    """How many of ``desired`` pods may be unavailable at once."""
    if strategy.type == "AllAtOnce":
        return desired
    value = strategy.rolling.max_unavailable if strategy.rolling else 1
    if isinstance(value, str):
        return max(1, desired * int(value.removesuffix("%")) // 100)
    return max(1, value)


def unavailable(targets: Iterable[Target]) -> int:
    """How many are of no service now, or will not be until they have done what they were told."""
    return sum(1 for target in targets if target.unavailable)
