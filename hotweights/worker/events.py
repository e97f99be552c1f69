"""Hears what coordinators publish, so that the next heartbeat comes at once. Nobody depends on it:
an event may get lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from hotweights_coordinator.client.client import Subscriber

TOPICS = ("plan", "begin", "precommit", "commit", "abort", "leader")
LISTEN_SECONDS = 0.5  # between two looks at whether to stop: how long a cancel may take


async def listen(
    endpoint: str, token: str | None, curve: Path | None, hurry: Callable[[], None]
) -> None:
    """Call ``hurry`` on this event loop for every event, until cancelled. The socket is read in a
    thread of the loop's executor; ``token`` and ``curve`` (a folder of keys) are for the coordinator, as `Client`
    has them.
    """
    stop = False

    def hear() -> None:
        with Subscriber(endpoint, TOPICS, curve, token) as events:
            while not stop:
                if events.next(LISTEN_SECONDS) is not None:
                    loop.call_soon_threadsafe(hurry)

    loop = asyncio.get_running_loop()
    hearing = loop.run_in_executor(None, hear)
    try:
        # shielded: the thread cannot be cancelled, and has to close its socket itself
        await asyncio.shield(hearing)
    finally:
        stop = True
        await hearing
