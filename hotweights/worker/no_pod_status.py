"""Where a cluster's agent marks pods: here nobody reads labels, so what an engine should show is
shown at once.

The session takes an engine's label away before it lets the engine switch, and waits until that is
through. Without an API server it is through as soon as it is asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from hotweights_agent.session.effects import PodStatus
from hotweights_agent.session.messages import Message, Pod, PodStatusSeen


class NullPodStatus:
    """`PodStatusSink` of a host without an API server."""

    def __init__(self, tell: Callable[[Message], Awaitable[None]]) -> None:
        self._tell = tell
        self._telling: set[asyncio.Task[None]] = set()

    def want(self, pod: Pod, marks: PodStatus) -> None:
        """Say that it is so. Not within the session's own turn: that would wait for itself."""
        task = asyncio.create_task(self._say(PodStatusSeen(pod.uid, marks.digest_label)))
        self._telling.add(task)  # the event loop itself holds tasks only weakly
        task.add_done_callback(self._telling.discard)

    def forget(self, uid: str) -> None:
        """Nothing to do: `want` wrote nothing down."""

    async def _say(self, message: Message) -> None:
        await self._tell(message)
