"""Hears what coordinators publish, so that the next heartbeat comes at once. Nobody depends on it:
an event may get lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from hotweights_coordinator.client.client import Subscriber

TOPICS = ("plan", "begin", "precommit", "commit", "abort", "leader")
LISTEN_SECONDS = 0.5


async def listen(endpoint: str, curve: Path | None, hurry: Callable[[], None]) -> None:
    """Until cancelled."""
    stop = False

    def hear() -> None:
        with Subscriber(endpoint, TOPICS, curve) as events:
            while not stop:
                if events.next(LISTEN_SECONDS) is not None:
                    loop.call_soon_threadsafe(hurry)

    loop = asyncio.get_running_loop()
    hearing = loop.run_in_executor(None, hear)
    try:
        await asyncio.shield(hearing)
    finally:
        stop = True
        await hearing
