"""What demo, tour and tests tell while they work: one line a step, with the seconds it took."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_FIRST_REPEAT_SECONDS = 15.0


def say(line: str = "") -> None:
    """A line of the story."""
    print(line, file=sys.stdout, flush=True)


@contextmanager
def step(
    what: str,
    detail: Callable[[], str] | None = None,
    repeat_seconds: float = _FIRST_REPEAT_SECONDS,
) -> Iterator[None]:
    """``==> what … done in N s``, and a sign of life while it lasts, with how far it is where
    ``detail`` knows. It is called on another thread.
    """
    began = time.monotonic()
    over = threading.Event()

    def breathe() -> None:
        while not over.wait(repeat_seconds):
            say(f"    {detail() if detail else what} … {time.monotonic() - began:.0f} s")

    say(f"==> {what}")
    reporter = threading.Thread(target=breathe, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        over.set()
        reporter.join()
    say(f"    done in {time.monotonic() - began:.1f} s")


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns as kubectl prints them."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    )
