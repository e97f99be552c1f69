"""Reads of sources that may never return.

A read on a hard mount whose file server is gone cannot be called off: no event, no close and no
signal of ours ends it. So a source is opened, read and closed in threads that nobody joins. Whoever
wants something of it waits for as long as each call returns, and leaves them behind when one does
not; they end by themselves should it ever return. Until then they are counted, and a source that
holds some of them is refused at once, so that they do not pile up.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from hotweights_common.reasons import Reason
from hotweights_storage.errors import Cancelled, SourceRefused, SourceUnavailable
from hotweights_storage.reader import Limits
from hotweights_storage.sources.base import Source

STALL_SECONDS: Final = 120.0
"""Without an answer to one call of a source for so long it hangs. An archive that brings a file back
from tape takes as long without harm.
"""
CALL_OFF_SECONDS: Final = 3.0  # how long a reading that is called off may take to end
MAX_STUCK: Final = 2  # readings of one source; the second tells whether it answers again
TICK_SECONDS: Final = 0.1  # how late a hanging call, or that nobody wants it any more, is noticed

REMEDY: Final = "see whether its file server answers, and the node's kernel log"

T = TypeVar("T")


class SourceReads:
    """All readings of one process. Any thread may ask for one, and waits for it."""

    def __init__(self, stall_seconds: float = STALL_SECONDS, remedy: str = REMEDY) -> None:
        """``stall_seconds``: how long one call of a source may take. ``remedy``: what somebody can
        do about one that hangs.
        """
        self._stall_seconds = stall_seconds
        self._remedy = remedy
        self._lock = threading.Lock()
        self._stuck: defaultdict[str, set[Future[Any]]] = defaultdict(set)

    @property
    def stuck(self) -> int:
        """How many readings were left behind and have not returned."""
        with self._lock:
            return sum(map(len, self._stuck.values()))

    def read(
        self,
        uri: str,
        opened: Callable[[], Source],
        use: Callable[[Source, Limits], T],
        stop: threading.Event | None = None,
    ) -> T:
        """What ``use`` makes of the source, which is opened before and closed after it. Raises what
        these do; `Cancelled` when ``stop`` is set; and `SourceUnavailable` (SourceStalled) when a
        call hangs, or others of this source do. A call that returns after that raises
        `Cancelled` to whoever made it, so that nothing comes of it.
        """

        def work(calls: _Calls) -> T:
            with calls.made(f"opening {uri}"):
                source = opened()
            with _Watched(source, calls) as watched:
                return use(watched, Limits(calls.over))

        return self._watched(uri, work, stop)

    def call(self, uri: str, what: str, function: Callable[[], T]) -> T:
        """What one call gives that is no source's; ``what`` it does, in words. Raises as `read`
        does.
        """

        def work(calls: _Calls) -> T:
            with calls.made(what):
                return function()

        return self._watched(uri, work)

    def _watched(
        self, uri: str, work: Callable[[_Calls], T], stop: threading.Event | None = None
    ) -> T:
        self._check(uri)
        calls = _Calls(stop or threading.Event())
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work(calls))
            except BaseException as error:  # noqa: BLE001  # belongs to whoever waits
                future.set_exception(error)

        try:
            threading.Thread(target=run, name=f"source {uri}", daemon=True).start()
            self._wait(uri, calls, future)
        except KeyboardInterrupt:  # what it has begun, buffers and processes, is ended with it
            calls.over.set()
            wait_for([future], CALL_OFF_SECONDS)
            raise
        return future.result()

    def _wait(self, uri: str, calls: _Calls, future: Future[T]) -> None:
        while not wait_for([future], TICK_SECONDS).done:
            if calls.stop.is_set():
                calls.over.set()
                if not wait_for([future], CALL_OFF_SECONDS).done:
                    self._leave(uri, future)
                    raise Cancelled(f"{uri}: cancelled while a call of it hung")
                break
            what, seconds = calls.longest()
            if seconds > self._stall_seconds:
                calls.over.set()
                self._leave(uri, future)
                raise SourceUnavailable(
                    f"{uri}: {what} has not returned for {seconds:.0f} s; {self._remedy}",
                    Reason.SOURCE_STALLED,
                )

    def _check(self, uri: str) -> None:
        with self._lock:
            stuck = len(self._stuck.get(uri, ()))
        if stuck >= MAX_STUCK:
            raise SourceUnavailable(
                f"{uri}: {stuck} readings of it hang in the kernel; see whether its file server "
                "answers: it is read again when one of them has returned",
                Reason.SOURCE_STALLED,
            )

    def _leave(self, uri: str, future: Future[T]) -> None:
        with self._lock:
            self._stuck[uri].add(future)

        def returned(_: Future[T]) -> None:
            with self._lock:
                self._stuck[uri].discard(future)
                if not self._stuck[uri]:
                    del self._stuck[uri]

        future.add_done_callback(returned)  # at once, if it has just returned


class _Calls:
    """Calls of one source that have not returned, by thread."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop  # nobody wants them any more
        self.over = threading.Event()  # nor waits for them
        self._lock = threading.Lock()
        self._begun: dict[int, tuple[float, str]] = {}

    @contextlib.contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """A call that is made whatever was called off."""
        thread = threading.get_ident()
        with self._lock:
            self._begun[thread] = time.monotonic(), what
        try:
            yield
        finally:
            with self._lock:
                del self._begun[thread]

    @contextlib.contextmanager
    def made(self, what: str) -> Iterator[None]:
        if self.stop.is_set():  # at once, and not when the one who waits looks the next time
            raise Cancelled(f"cancelled before {what}")
        with self.noted(what):
            yield
        if self.over.is_set():
            raise Cancelled(f"{what} returned when nobody waited for it any more")

    def longest(self) -> tuple[str, float]:
        """The one that has taken longest by now, and for how many seconds."""
        with self._lock:
            began, what = min(self._begun.values(), default=(time.monotonic(), ""))
        return what, time.monotonic() - began


class _Watched:
    """A source whose calls are noted."""

    def __init__(self, source: Source, calls: _Calls) -> None:
        self.uri = source.uri
        self._source = source
        self._calls = calls

    def entries(self) -> Mapping[str, int | SourceRefused | SourceUnavailable]:
        with self._calls.made("listing its files"):
            return self._source.entries()

    def files(self) -> Mapping[str, int]:
        with self._calls.made("listing its files"):
            return self._source.files()

    def read_into(self, file: str, offset: int, into: memoryview) -> int:
        with self._calls.made(f"reading {file}"):
            return self._source.read_into(file, offset, into)

    def check_unchanged(self) -> None:
        with self._calls.made("looking whether it changed"):
            self._source.check_unchanged()

    def close(self) -> None:
        with self._calls.noted("closing it"):
            self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
