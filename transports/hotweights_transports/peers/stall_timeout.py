"""How long a puller bears with a peer, as arithmetic over times that are passed in: no clock, no
socket.

Three ways in which a peer fails without closing the connection: it falls *silent* (not a byte), it
*stalls* (it says that it lives, but no chunk completes), or it drips bytes below the *floor*. Time
in which the peer itself waits for a chunk is not held against its rate, only against the stall.
"""

from __future__ import annotations

from hotweights_transports.peers.base import ClientLimits, PeerTimeout


class StallTimeout:
    """Of one stream. Tell it what happens; `check` raises `PeerTimeout` when it ran out. Times are
    seconds of one monotonic clock; the stream's own thread calls it, and nobody else.
    """

    def __init__(self, address: str, limits: ClientLimits, now: float) -> None:
        self._address = address
        self._limits = limits
        self._heard = now
        self._verified = now
        self._window_began = now
        self._window_nbytes = 0

    def began(self, now: float) -> None:
        """The first request after a pause of our own: nothing before it counts."""
        self._heard = self._verified = self._window_began = now
        self._window_nbytes = 0

    def received(self, nbytes: int, now: float) -> None:
        self._heard = now
        self._window_nbytes += nbytes

    def waiting(self, now: float) -> None:
        """It says that it lives and waits: its rate is measured anew from here."""
        self._heard = self._window_began = now
        self._window_nbytes = 0

    def kept_waiting(self, seconds: float) -> None:
        """We took so long ourselves with what it sent: that is not its rate."""
        self._window_began += seconds

    def answered(self, now: float) -> None:
        """A chunk was verified, or said to be missing."""
        self._heard = self._verified = now

    def check(self, now: float) -> None:
        # silence first: who is silent stalls too
        limits = self._limits
        if now - self._heard > limits.silence_seconds:
            raise PeerTimeout(self._address, f"not a byte for {limits.silence_seconds:g} s")
        if now - self._verified > limits.stall_seconds:
            raise PeerTimeout(
                self._address, f"it lives, but completed no chunk for {limits.stall_seconds:g} s"
            )
        elapsed = now - self._window_began
        # nothing at all is silence, judged above
        if elapsed < limits.floor_window_seconds or not self._window_nbytes:
            return
        rate = self._window_nbytes / elapsed
        if rate < limits.floor_bytes_per_second:
            raise PeerTimeout(
                self._address,
                f"{rate:.0f} bytes/s; the floor is {limits.floor_bytes_per_second} per stream",
            )
        self._window_began, self._window_nbytes = now, 0
