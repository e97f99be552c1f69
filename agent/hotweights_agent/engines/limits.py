"""What engines may cost the node: connections, words, and how long anybody waits for them.

Pods of all tenants share one socket, so whatever one of them can use up is counted by pod.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

from hotweights_agent.session.messages import Pod
from hotweights_agent.session.retry import TokenBucket

TOGETHER_SECONDS = 0.1
"""Words of who talks too much are heard at whole multiples of it. The session looks at all engines
once for what came together, and not once for each word.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What engines may cost, in seconds and in numbers; whoever exceeds it is let go or waits."""

    hello_seconds: float = 10.0
    """From connecting to the hello, and again for the token's review."""
    send_seconds: float = 30.0
    """For the other side to take one frame; then the connection ends."""
    max_connections: int = 1024
    """Of all processes of all engines."""
    max_pod_connections: int = 64
    """Of one pod, whatever it says of itself: four times the accelerators that a node has."""
    spare_pod_connections: int = 16
    """Of one pod beyond its ``world_size``: its API servers, and processes whose end has not been
    noticed yet.
    """
    max_strangers: int = 256
    """Connections that have not proved who they are. One more, and the one that has owed its hello
    for longest goes, of the user who has the most of them.
    """
    max_user_strangers: int = 128
    """Of them, those of one user (``SO_PEERCRED``, unix(7)). It is all that the kernel tells of
    another pod's process; many pods run as root.
    """
    max_refused: int = 1024
    """That were refused at the door and are held, unread, so that they do not come again at once;
    one more, and the one that was refused first is closed.
    """
    refused_seconds: float = 10.0
    """For so long each of them is held. An engine's plugin closes its end as soon as it is refused,
    and waits by itself before it comes again.
    """
    max_queued_frames: int = 64
    """To one process; each may pin a version's memory until it is taken."""
    frames_per_second: int = 200
    """From all processes of one pod; beyond that they wait, in their socket's buffer."""


class FrameRate:
    """How fast each pod is listened to. What it used up is not forgotten when it connects anew."""

    def __init__(self, limits: Limits) -> None:
        self._rate = limits.frames_per_second
        self._rates: dict[str, TokenBucket] = {}

    async def turn(self, pod: Pod) -> None:
        """Wait until one more word of this pod may be heard; first come, first served."""
        now = asyncio.get_running_loop().time()
        if pod.uid not in self._rates:
            # a new pod is the occasion: full buckets are forgotten, so the table stays small
            self._rates = {uid: rate for uid, rate in self._rates.items() if not rate.is_full(now)}
            self._rates[pod.uid] = TokenBucket(self._rate, self._rate, now)
        rate = self._rates[pod.uid]
        wait = rate.wait_seconds(now)
        rate.take()
        if wait > 0.0:
            wait = math.ceil((now + wait) / TOGETHER_SECONDS) * TOGETHER_SECONDS - now
        await asyncio.sleep(wait)
