"""A stand-in for the node's agent: it speaks the wire, believes every token, and does what the test
says.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e.engine.images import Image
from hotweights_transports.handoff import frames, sockets


class Gone(Exception):
    """The engine's process closed its connection."""


@dataclass
class Peer:
    """One process of an engine."""

    sock: socket.socket
    hello: frames.Hello
    answers: dict[int, frames.Frame] = field(default_factory=dict)
    states: list[frames.State] = field(default_factory=list)
    gone: bool = False


class Agent:
    """Listens at ``path``. ``boot`` says what a booting engine is told: an image to commit, "keep",
    or nothing at all.
    """

    def __init__(self, path: Path, boot: Image | str | None = "keep") -> None:
        self.path = path
        self.boot = boot
        self.token = 1
        self._id = 0
        self._changed = threading.Condition()
        self.peers: dict[str | int, Peer] = {}
        self.hellos: list[frames.Hello] = []
        self.boots: list[frames.Frame] = []
        self.up()

    def up(self) -> None:
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self.path))
        self._listener.listen(16)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def down(self) -> None:
        """As when the agent's process dies: the socket and every connection go."""
        with self._changed:
            _shut(self._listener)
            self.path.unlink(missing_ok=True)
            for peer in self.peers.values():
                _shut(peer.sock)
        self.until(lambda: not self.peers)

    def until(
        self,
        condition: Callable[[], Any],
        seconds: float = 600.0,
        alive: Callable[[], bool] = lambda: True,
    ) -> Any:
        deadline = time.monotonic() + seconds
        with self._changed:
            while not (result := condition()):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not within {seconds} s; connected: {list(self.peers)}")
                if not alive():
                    raise Gone("the process has ended")
                self._changed.wait(0.1)
            return result

    def whole(self, ranks: int = 1) -> bool:
        return all(key in self.peers for key in ("server", *range(ranks)))

    def ranks(self) -> list[int]:
        return [key for key in self.peers if isinstance(key, int)]

    def prepare(self, image: Image, seconds: float = 120.0, **wish: Any) -> list[frames.Frame]:
        """Prepare on every rank; their answers, by rank."""
        sent = self.start_prepare(image, len(image.fds) - 1, **wish)
        return [self._answer(rank, frame.id, seconds) for rank, frame in sent]

    def start_prepare(
        self, image: Image, slabs: int, **wish: Any
    ) -> list[tuple[int, frames.Prepare]]:
        """Hand over a version, and announce so many slabs of it."""
        sent = [
            (rank, frames.Prepare(self._next(), image.digest, slabs, **wish))
            for rank in sorted(self.ranks())
        ]
        for rank, frame in sent:
            sockets.send(self.peers[rank].sock, frame, tuple(image.fds))
        return sent

    def release(self, digest: str) -> list[frames.Frame]:
        return [
            self._ask(rank, frames.Release(self._next(), digest)) for rank in sorted(self.ranks())
        ]

    def start_commit(self, digest: str, token: int | None = None, **values: Any) -> frames.Commit:
        if token is None:
            self.token += 1
            token = self.token
        frame = frames.Commit(id=self._next(), digest=digest, commit_token=token, **values)
        sockets.send(self.peers["server"].sock, frame)
        return frame

    def commit(self, digest: str, token: int | None = None, **values: Any) -> frames.Frame:
        return self._answer("server", self.start_commit(digest, token, **values).id, 120.0)

    def swap(self, image: Image, way: str = "", **values: Any) -> frames.Committed:
        """Prepare and commit; anything but success is an error, and so is another ``way`` of
        getting ready.
        """
        wish: dict[str, Any] = {"memory": way, "max_pause_seconds": 60.0} if way else {}
        for prepared in self.prepare(image, **wish):
            assert isinstance(prepared, frames.Prepared), prepared
            assert way in ("", prepared.way), prepared
        answer = self.commit(image.digest, **values)
        assert isinstance(answer, frames.Committed), answer
        return answer

    def keep(self, token: int) -> frames.Frame:
        return self._ask("server", frames.Keep(self._next(), token))

    def answer_of(self, frame: frames.Commit, seconds: float = 120.0) -> frames.Frame:
        return self._answer("server", frame.id, seconds)

    def _ask(self, key: str | int, frame: Any) -> frames.Frame:
        sockets.send(self.peers[key].sock, frame)
        return self._answer(key, frame.id, 60.0)

    def _answer(self, key: str | int, request: int, seconds: float) -> frames.Frame:
        peer = self.peers[key]
        self.until(lambda: request in peer.answers or peer.gone, seconds)
        if request not in peer.answers:
            raise Gone(f"{key} closed its connection")
        return peer.answers.pop(request)

    def _next(self) -> int:
        self._id += 1
        return self._id

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        hello, _ = sockets.recv(sock)
        if not isinstance(hello, frames.Hello):
            raise TypeError(hello)
        sockets.send(sock, frames.Welcome(agent="test"))
        peer, key = Peer(sock, hello), ("server" if hello.role == "server" else hello.rank)
        with self._changed:
            self.peers[key] = peer
            self.hellos.append(hello)
            self._changed.notify_all()
        if key == "server" and hello.state == "Booting" and self.boot is not None:
            threading.Thread(
                target=self._answer_boot, args=(hello.world_size,), daemon=True
            ).start()
        try:
            while True:
                frame, _ = sockets.recv(sock)
                with self._changed:
                    if isinstance(frame, frames.State):
                        peer.states.append(frame)
                    else:
                        peer.answers[frame.id] = frame  # type: ignore[attr-defined]
                    self._changed.notify_all()
        except (OSError, frames.WireError):
            with self._changed:
                peer.gone = True
                if self.peers.get(key) is peer:
                    del self.peers[key]
                self._changed.notify_all()
            sock.close()

    def _answer_boot(self, ranks: int) -> None:
        self.until(lambda: self.whole(ranks))
        if isinstance(self.boot, Image):
            self.boots += self.prepare(self.boot)
            self.boots.append(self.commit(self.boot.digest))
        else:
            self.boots.append(self.keep(self.token))


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it had gone already
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
