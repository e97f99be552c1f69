"""Coordinators as processes of their own, that can be killed, frozen and started again at the same
address.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.ports import free_ports

_END_SECONDS = 30.0
_PROGRAM = Path(sys.executable).parent / "hotweights"


def bearable_lease_seconds() -> float:
    """One second, or longer on a machine that is too busy to renew that: by how long a program
    takes to start.
    """
    began = time.monotonic()
    subprocess.run([_PROGRAM, "coord-serve", "--help"], check=True, stdout=subprocess.DEVNULL)
    return min(4.0, max(1.0, (time.monotonic() - began) / 2))


class Coordinator:
    """``hotweights coord-serve`` on Redis."""

    def __init__(
        self, name: str, redis_url: str, cluster: str, lease_seconds: float, folder: Path
    ) -> None:
        self.name = name
        calls, events = free_ports(2)
        self.endpoint = f"tcp://127.0.0.1:{calls}"
        self._events = f"tcp://127.0.0.1:{events}"
        self._log = folder / f"{name}.log"
        self._environment = os.environ | {
            "HOTWEIGHTS_COORD_BACKEND": "redis",
            "HOTWEIGHTS_REDIS_URL": redis_url,
            "HOTWEIGHTS_COORD_CLUSTER": cluster,
            "HOTWEIGHTS_COORD_LEASE_SECONDS": str(lease_seconds),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it is not waited for."""
        options = {
            "--endpoint": self.endpoint,
            "--pub-endpoint": self._events,
            "--instance-id": self.name,
            "--metrics-port": "0",
            # no worker dies here, and one that the machine keeps waiting must not count as dead
            "--worker-ttl": "120",
        }
        words = [word for pair in options.items() for word in pair]
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [_PROGRAM, "coord-serve", *words],
                stdout=output,
                stderr=output,
                env=self._environment,
            )

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def refused_to_start(self) -> bool:
        """It ended with the one line that says that Redis is not there."""
        ended = self._process is not None and self._process.poll() == 1
        return ended and self.log().rpartition("\nerror: ")[2].startswith("Redis at ")

    def freeze(self) -> None:
        """Let it sleep, as a virtual machine does that is moved."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on; it does not know that it slept."""
        self._send(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and wait for its end."""
        self._end(signal.SIGTERM)

    def log(self) -> str:
        """What it wrote."""
        return self._log.read_text() if self._log.exists() else ""

    def _end(self, number: signal.Signals) -> None:
        if self._process is None or not self.runs:
            return
        self._send(number)
        self._send(signal.SIGCONT)
        try:
            self._process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=_END_SECONDS)
            raise

    def _send(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
