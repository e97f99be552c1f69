"""The root of every error that is foreseen: a sentence for people, and a word for programs.

Whoever stands above all of it (a command, a status, a metric) catches this one; whoever can do
something about a cause catches the class that names it. Errors of the code itself are no
`HotweightsError`: nobody mends those by doing something else.
"""

from __future__ import annotations

from hotweights_common.reasons import Reason


class HotweightsError(Exception):
    """The text names the thing and what to do about it.

    ``reason`` is one CamelCase word, as conditions, frames and metrics carry it; a class has its
    own, and an instance may have a narrower one.
    """

    reason: str = Reason.FAILED

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason
