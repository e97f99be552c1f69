"""Why a version was not put into the model; what is served is what was served before, unless it
says `Torn`.
"""

from __future__ import annotations

from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason


class NotApplied(HotweightsError):
    """The model keeps what it had. ``reason`` is one CamelCase word, the text names the tensor."""

    reason = Reason.NOT_APPLIED

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message, reason)


class Torn(NotApplied):
    """The switch broke and the way back broke too: this model must not be used any more."""

    def __init__(self, message: str) -> None:
        super().__init__("Torn", message)
