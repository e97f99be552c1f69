"""A real redis-server of one's own: a free port, a folder of its own, and an append-only file that
is synced before every answer.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.ports import free_ports

_START_SECONDS = 50.0


class RedisServer:
    """A process that can be ended, killed, frozen and started again with what it wrote."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise FileNotFoundError(
                "redis-server is not installed; `apt-get install redis-server`, or `make "
                "test` as root"
            )
        self._program = program
        self._folder = folder
        (self.port,) = free_ports()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What a client is given."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, with what the last one left, and wait until it answers."""
        settings = {
            "--bind": "127.0.0.1",
            "--port": str(self.port),
            "--dir": str(self._folder),
            "--appendonly": "yes",
            "--appendfsync": "always",
            "--save": "",
            # the ledger is read from all that was ever written
            "--auto-aof-rewrite-percentage": "0",
            "--daemonize": "no",
        }
        words = [word for pair in settings.items() for word in pair]
        with (self._folder / "redis.log").open("ab") as output:
            self._process = subprocess.Popen([self._program, *words], stdout=output, stderr=output)
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    "redis-server does not "
                    f"start:\n{(self._folder / 'redis.log').read_text()[-2000:]}"
                )
            time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")  # -LOADING while it reads its file
        except OSError:
            return False

    def freeze(self) -> None:
        """Let it hang: it accepts connections and answers nothing."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on where it hung."""
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def configure(self, name: str, value: str) -> None:
        """Change a setting of the running server."""
        with socket.create_connection(
            ("127.0.0.1", self.port), timeout=_START_SECONDS
        ) as connection:
            connection.sendall(f"CONFIG SET {name} {value}\r\n".encode())
            if not connection.recv(64).startswith(b"+OK"):
                raise RuntimeError(f"redis-server does not take {name} {value}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it and wait for its end."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(number)
            try:
                self._process.wait(timeout=_START_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(timeout=_START_SECONDS)
                raise

    def forget(self) -> None:
        """Delete what a stopped one left on its disk."""
        shutil.rmtree(self._folder / "appendonlydir")
