"""Holds the descriptors of staged versions while the agent's own process, or its pod, is gone.

    python -m hotweights_agent.local.keeper SOCKET

The memory of a version lives as long as somebody has a descriptor of it. An agent that is killed
would find its engines on memory that nobody else can reach, and would stage everything a second
time beside it. So a pod of its own holds the same descriptors, which no upgrade replaces: it does
nothing else, knows no version and reads no byte, so there is nothing in it that could fail; and it
asks for next to no memory, because pages are charged to whoever wrote them. An agent may be of a
later release than its keeper: what they say to each other only grows.

One agent speaks to it at a time, the newest. Images are named by the agent, slabs too; a slab goes
with the last image that has it. All is sealed before it comes here. The standard library alone, and
what of ours needs no more, so that it starts at once and stays small.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotweights_storage import linux
from hotweights_transports.handoff.sockets import peer_user

MAX_MESSAGE_BYTES = 192 << 10  # within a socket's buffer (208 KiB), where a datagram must fit
SEND_SECONDS = 5.0  # to an agent that does not read
ACCEPT_AGAIN_SECONDS = 0.1
FDS_AT_ONCE = 250  # the kernel's SCM_MAX_FD is 253 (unix(7))


@dataclass(frozen=True, slots=True)
class KeptImage:
    """A version: descriptors of its manifest and its table, and the names of its slabs."""

    manifest_fd: int
    table_fd: int
    slabs: tuple[str, ...]


class Keeper:
    """What is kept. `handle` answers one message of the agent."""

    def __init__(self) -> None:
        self._slabs: dict[str, int] = {}
        self._images: dict[str, KeptImage] = {}

    def handle(
        self, message: dict[str, Any], fds: list[int]
    ) -> Iterator[tuple[dict[str, Any], Sequence[int]]]:
        """The answers, each with its descriptors. Those that came are kept or closed. Raises
        KeyError, TypeError or ValueError for a message that is none.
        """
        op = message["op"]
        if op == "slabs":
            names = [str(name) for name in message["names"]]
            if len(names) != len(fds):
                raise ValueError(f"{len(names)} names and {len(fds)} descriptors")
            for name, fd in zip(names, fds, strict=True):
                self._replace(name, fd)
        elif op == "keep":
            (manifest_fd, table_fd), slabs = fds, tuple(map(str, message["slabs"]))
            if missing := set(slabs) - self._slabs.keys():
                raise KeyError(f"slabs {sorted(missing)} did not come before")
            self._forget(str(message["image"]))
            self._images[str(message["image"])] = KeptImage(manifest_fd, table_fd, slabs)
            self._let_go()  # the same version may have moved out of some
            yield {"op": "kept"}, ()
        elif op == "drop":
            close_all(fds)
            self._forget(str(message["image"]))
            self._let_go()
            yield {"op": "dropped"}, ()
        elif op == "only":
            close_all(fds)
            for image in self._images.keys() - set(map(str, message["images"])):
                self._forget(image)
            self._let_go()
            yield {"op": "dropped"}, ()
        elif op == "list":
            close_all(fds)
            self._let_go()  # what an agent that is gone did not finish
            names = sorted(self._slabs)
            for start in range(0, len(names), FDS_AT_ONCE):
                part = names[start : start + FDS_AT_ONCE]
                yield {"op": "slabs", "names": part}, [self._slabs[name] for name in part]
            for image, kept in self._images.items():
                answer = {"op": "image", "image": image, "slabs": list(kept.slabs)}
                yield answer, [kept.manifest_fd, kept.table_fd]
            yield {"op": "end"}, ()
        else:
            raise ValueError(f"unknown op {op!r}")

    def _replace(self, name: str, fd: int) -> None:
        if name in self._slabs:
            os.close(self._slabs[name])
        self._slabs[name] = fd

    def _forget(self, image: str) -> None:
        kept = self._images.pop(image, None)
        if kept is not None:
            os.close(kept.manifest_fd)
            os.close(kept.table_fd)

    def _let_go(self) -> None:
        used = {name for kept in self._images.values() for name in kept.slabs}
        for name in self._slabs.keys() - used:
            os.close(self._slabs.pop(name))


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """One message. Raises OSError, and ValueError for one that is too long."""
    data = json.dumps(message).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} fit")
    socket.send_fds(sock, [data], list(fds))


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next message, and descriptors that are the caller's; None: the other side is gone.
    Raises OSError, and ValueError for what is no message (its descriptors are closed).
    """
    data, fds, flags, _ = socket.recv_fds(
        sock, MAX_MESSAGE_BYTES, FDS_AT_ONCE, socket.MSG_CMSG_CLOEXEC
    )
    if not data:
        return None
    try:
        message = json.loads(data)
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or not isinstance(message, dict):
            raise ValueError("a message that is cut off, or none")
    except ValueError:
        close_all(fds)
        raise
    return message, list(fds)


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def listen(path: Path) -> socket.socket:
    """The keeper's socket, for processes of this user alone. Raises OSError."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(4)
    return listener


def serve(listener: socket.socket, keeper: Keeper) -> None:
    """For ever. Whoever comes last is the agent: one that is gone may not have closed its end yet.
    What an agent breaks off, or says wrong, costs its connection.
    """
    agent: socket.socket | None = None
    while True:
        ready, _, _ = select.select([listener, *([agent] if agent else [])], [], [])
        if agent in ready and agent is not None and not _answers(agent, keeper):
            agent.close()
            agent = None
        if listener in ready:
            try:
                new, _ = listener.accept()
            except OSError as error:  # no descriptor left: the old agent's end is one
                print(f"accept failed: {error.strerror}", file=sys.stderr, flush=True)
                if agent is not None:
                    agent.close()
                    agent = None
                time.sleep(ACCEPT_AGAIN_SECONDS)
                continue
            if agent is not None:
                agent.close()
            agent = new
            agent.settimeout(SEND_SECONDS)
            if peer_user(agent) != os.getuid():
                agent.close()
                agent = None


def _answers(sock: socket.socket, keeper: Keeper) -> bool:
    """One message and its answers; False when the connection is to end."""
    try:
        received = receive(sock)
    except (OSError, ValueError) as error:
        print(f"the agent's connection ends: {error}", file=sys.stderr, flush=True)
        return False
    if received is None:
        return False
    message, fds = received
    try:
        for answer, more in keeper.handle(message, fds):
            send(sock, answer, more)
    except OSError:
        return False
    except (KeyError, TypeError, ValueError) as error:
        close_all(fds)  # `handle` raises before it keeps any
        print(f"refused {message.get('op')}: {error!r}", file=sys.stderr, flush=True)
        return False
    return True


def main() -> int:
    path = Path(sys.argv[1])
    linux.raise_descriptor_limit()  # it holds as many slabs as the agent does
    # as PID 1 of its container nothing else would end it
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    with listen(path) as listener:
        print(f"keeping what comes over {path}", file=sys.stderr, flush=True)
        serve(listener, Keeper())
    return 0


if __name__ == "__main__":
    sys.exit(main())
