"""Which folders a plan may make this host read: its own, named at the start, and no others.

A plan comes from whoever may speak to the coordinator, so the source in it is only ever opened
below these.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from hotweights_common.reasons import Reason
from hotweights_storage.errors import SourceRefused, SourceUnavailable
from hotweights_storage.sources.base import Root, Source, Sources
from hotweights_storage.sources.file import FileOpener

FIRST_SECONDS = 1.0  # for the first answer; a heartbeat waits for it
AGAIN_SECONDS = 10.0  # how long an answer is believed


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


class Readable:
    """Which sources may be read here, found out beside whoever asks: a mount whose server is away
    answers never. All of it on one event loop.
    """

    def __init__(self, allowed: Sources, wait_seconds: float = FIRST_SECONDS) -> None:
        """``wait_seconds``: how long the first answer about a source is waited for."""
        self._allowed = allowed
        self._wait_seconds = wait_seconds
        self._found: dict[str, tuple[bool, float]] = {}  # URI → whether, and when that was so
        self._asked: dict[str, asyncio.Future[None]] = {}

    async def may(self, uri: str) -> bool:
        """As `may_read` found it lately; one that does not answer may be read, like one that is
        merely not there.
        """
        asked = self._asked.get(uri)
        found, at = self._found.get(uri, (True, float("-inf")))
        if (asked is None or asked.done()) and time.monotonic() - at >= AGAIN_SECONDS:
            asked = self._ask(uri)
            if uri not in self._found:
                await asyncio.wait([asked], timeout=self._wait_seconds)
                found, _ = self._found.get(uri, (True, at))
        return found

    def _ask(self, uri: str) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        answered = self._asked[uri] = loop.create_future()

        def note(found: bool) -> None:
            self._found[uri] = found, time.monotonic()
            answered.set_result(None)

        def run() -> None:
            found = may_read(self._allowed, uri)
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(note, found)

        # a daemon: nobody waits for it when this process ends
        threading.Thread(target=run, name=f"may read {uri}", daemon=True).start()
        return answered


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
