"""Progress lines: what is being waited for, and for how long already.

Everything that may last longer than two seconds runs inside `step`, which says so at the start and
every few seconds after, from a thread of its own, so that the code that waits stays plain. Lines go
to stderr, because the commands' answers go to stdout.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_FIRST_LINE_AFTER_SECONDS = 1.0
_LINE_EVERY_SECONDS = 10.0


def say(line: str) -> None:
    """Print one line of progress."""
    print(f"localcluster: {line}", file=sys.stderr, flush=True)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say `what` once it takes noticeable time, repeat it with the seconds gone, and say when it is
    done.
    """
    began = time.monotonic()
    over = threading.Event()
    spoke = threading.Event()

    def report() -> None:
        if over.wait(_FIRST_LINE_AFTER_SECONDS):
            return
        spoke.set()
        say(f"{what} ...")
        while not over.wait(_LINE_EVERY_SECONDS):
            say(f"{what} ... {time.monotonic() - began:.0f} s")

    reporter = threading.Thread(target=report, name="localcluster-progress", daemon=True)
    reporter.start()
    try:
        yield
    finally:
        over.set()
        reporter.join()
    if spoke.is_set():
        say(f"{what}: done in {time.monotonic() - began:.1f} s")
