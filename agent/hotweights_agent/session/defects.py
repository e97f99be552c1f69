"""Where a defect of ours ends: the one place that catches whatever is raised.

An agent serves every tenant's pods on its node. A bug that one message, one engine or one effect
brings to light must cost that one and not the others, and least of all end the process, which would
meet it again after every restart. What may fail in ways that are known is caught by type where it
happens; everything else comes here, is named, counted and left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def contained(note: Callable[[Exception], None]) -> Iterator[None]:
    """Go on after the block whatever it raises; ``note`` hears of it. Cancellation and the end of
    the process pass.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - see above
        note(error)
