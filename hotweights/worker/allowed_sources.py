"""Which folders a plan may make this host read: its own, named at the start, and no others.

A plan comes from whoever may speak to the coordinator, so the source in it is only ever opened
below these.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hotweights_common.reasons import Reason
from hotweights_storage.errors import SourceRefused, SourceUnavailable
from hotweights_storage.sources.base import Root, Source, Sources
from hotweights_storage.sources.file import FileOpener


class _Below:
    """A `FileOpener` whose refusal names the option that would let it in."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots
        self._files = FileOpener([Root(root) for root in roots])

    def open(self, uri: str, namespace: str) -> Source:
        """The folder behind ``uri``, if it lies below one of the roots."""
        try:
            return self._files.open(uri, namespace)
        except SourceRefused as error:
            if error.reason != Reason.SOURCE_NOT_ALLOWED:
                raise  # no option would let this one in
            below = ", ".join(map(str, self._roots))
            text = (
                f"{uri}: may not be read here, only what lies below {below}; allow its folder "
                "with --root"
            )
            raise SourceRefused(text) from error


def sources(folders: Sequence[Path]) -> Sources:
    """What lies below ``folders``; none: below the current one."""
    return Sources({"file": _Below([folder.resolve() for folder in folders or [Path()]])})


def may_read(allowed: Sources, uri: str) -> bool:
    """Whether a plan's source may be read; one that is merely not there may. Touches the disk, so
    not for an event loop.
    """
    try:
        allowed.open(uri, "").close()
    except SourceRefused:
        return False
    except SourceUnavailable:
        pass
    return True
