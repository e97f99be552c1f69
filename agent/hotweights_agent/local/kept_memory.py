"""The agent's end of the `keeper`: hands it what is staged, and finds it again after a restart.

A keeper that is not there costs nothing but a restart that stages anew: a failure here is logged
once, and the agent goes on without until there is one. What is found was verified before it was
sealed, and nobody could change it since; so it is believed if the seals, the manifest's digest and
the table say the same.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hotweights_agent.local import keeper
from hotweights_planner import manifest as manifests
from hotweights_planner.layout import Place
from hotweights_planner.manifest import Manifest
from hotweights_storage import linux
from hotweights_storage.errors import TransferError
from hotweights_storage.image import Image, is_config
from hotweights_storage.slab import Slab, sealed_memfd

log = logging.getLogger(__name__)
ANSWER_SECONDS = 5.0  # it only passes descriptors on
CONNECT_SECONDS = 3.0  # at start: its pod may start in the same moment, on a node that is new
RETRY_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class _Kept:
    manifest: bytes
    table: Slab
    slabs: tuple[Slab, ...]

    def release(self) -> None:
        for slab in (self.table, *self.slabs):
            slab.release()


class KeptMemory:
    """Thread-safe. Without a path it does nothing. A keeper that was not there, or began anew, is
    handed all that is staged when the next version is, or goes.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._told = False
        # what it is to have, by digest. With a share of our own in each slab: a number that another
        # file has by now would be handed over as the version's memory
        self._kept: dict[str, _Kept] = {}
        # a name for each slab, as long as anybody here uses it
        self._names: weakref.WeakKeyDictionary[Slab, str] = weakref.WeakKeyDictionary()

    def find(self) -> list[Image]:
        """Connect, and take over what a former agent left; once, at start."""
        if self._path is None:
            return []
        with self._lock:
            try:
                self._sock = _connect(self._path, CONNECT_SECONDS)
                keeper.send(self._sock, {"op": "list"})
                found = list(_images(self._sock, self._names))
                # what cannot be believed is nobody's, and memory all the same
                _only(self._sock, [image.manifest.digest for image in found])
            except (OSError, ValueError, KeyError, TransferError) as error:
                self._give_up(error)
                return []
        for image in found:
            nbytes = image.memory_nbytes
            log.info("Found %s again, %.2f GB in memory", image.manifest.version, nbytes / 1e9)
        return found

    def keep(self, image: Image) -> None:
        """From now on it outlives this process, until `drop`, or another of its digest comes."""
        if self._path is None:
            return
        table, *slabs = image.retain()
        kept = _Kept(image.manifest.canonical, table, tuple(slabs))
        with self._lock:
            before = self._kept.pop(image.manifest.digest, None)
            self._kept[image.manifest.digest] = kept
            self._say(partial(self._hand_over, image.manifest.digest, kept))
        if before is not None:
            before.release()

    def drop(self, digest: str) -> None:
        """It need not outlive this process any more."""
        with self._lock:
            before = self._kept.pop(digest, None)
            self._say(partial(_drop, digest))
        if before is not None:
            before.release()

    def close(self) -> None:
        """End the connection, for good; what is kept stays kept."""
        with self._lock:
            self._path = None  # what is let go of while a node stops is for the next agent
            if self._sock is not None:
                self._sock.close()
            self._sock = None
            for kept in self._kept.values():
                kept.release()
            self._kept.clear()

    def _say(self, what: Callable[[socket.socket], None]) -> None:
        """Over the connection that there is, or else over a new one, on which all is said."""
        if self._path is None:
            return
        if self._sock is not None:
            try:
                what(self._sock)
                return
            except (OSError, ValueError, KeyError) as error:
                self._give_up(error)
        try:
            self._sock = _connect(self._path, 0)
            what(self._sock)
            for digest, kept in self._kept.items():
                self._hand_over(digest, kept, self._sock)
            # what a former agent left, and nobody here knows of
            _only(self._sock, list(self._kept))
            self._told = False
            log.info("The keeper has all %d staged versions", len(self._kept))
        except (OSError, ValueError, KeyError) as error:
            self._give_up(error)

    def _hand_over(self, digest: str, kept: _Kept, sock: socket.socket) -> None:
        names = [self._names.setdefault(slab, secrets.token_hex(8)) for slab in kept.slabs]
        # all of them, also those that it has: it lets go of slabs with the last image
        for start in range(0, len(names), keeper.FDS_AT_ONCE):
            part = slice(start, start + keeper.FDS_AT_ONCE)
            fds = [slab.fd for slab in kept.slabs[part]]
            keeper.send(sock, {"op": "slabs", "names": names[part]}, fds)
        manifest = sealed_memfd(kept.manifest, "hotweights-manifest")
        message = {"op": "keep", "image": digest, "slabs": names}
        try:
            keeper.send(sock, message, [manifest.fd, kept.table.fd])
            _answer(sock, "kept")
        finally:
            manifest.release()

    def _give_up(self, error: Exception) -> None:
        if not self._told:
            log.warning(
                "No keeper at %s (%s): what is staged ends with this process, until one is there",
                self._path, error,
            )  # fmt: skip
        self._told = True
        if self._sock is not None:
            self._sock.close()
        self._sock = None


def _drop(digest: str, sock: socket.socket) -> None:
    keeper.send(sock, {"op": "drop", "image": digest})
    _answer(sock, "dropped")


def _only(sock: socket.socket, digests: list[str]) -> None:
    """Let go of all other images."""
    keeper.send(sock, {"op": "only", "images": digests})
    _answer(sock, "dropped")


def _connect(path: Path, seconds: float) -> socket.socket:
    until = time.monotonic() + seconds
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(ANSWER_SECONDS)
        try:
            sock.connect(str(path))
        except OSError:
            sock.close()
            if time.monotonic() > until:
                raise
            time.sleep(RETRY_SECONDS)
        else:
            return sock


def _answer(sock: socket.socket, op: str) -> None:
    received = keeper.receive(sock)
    if received is None:
        raise ConnectionError("the keeper closed the connection")
    message, fds = received
    keeper.close_all(fds)
    if message.get("op") != op:
        raise ValueError(f"the keeper answered {message.get('op')!r} instead of {op!r}")


def _images(sock: socket.socket, names: weakref.WeakKeyDictionary[Slab, str]) -> Iterator[Image]:
    """What `list` answers, and the slabs' names with it. One that cannot be believed is left
    out.
    """
    slabs: dict[str, Slab] = {}
    try:
        while (received := keeper.receive(sock)) is not None:
            message, fds = received
            if message["op"] == "end":
                break
            if message["op"] == "slabs":
                for name, fd in zip(message["names"], fds, strict=True):
                    try:
                        slabs[name] = Slab.adopt(fd)
                    except TransferError as error:  # its images lack it
                        log.warning("A kept slab is of no use: %s", error)
                    else:
                        names[slabs[name]] = name
                continue
            try:
                yield _image(fds, [slabs[name] for name in message["slabs"]], str(message["image"]))
            except (TransferError, ValueError, KeyError) as error:
                log.warning("What was kept of %s is of no use: %s", message["image"], error)
            finally:
                keeper.close_all(fds)
    finally:
        for slab in slabs.values():  # each image has its own share by now
            slab.release()


def _image(fds: list[int], slabs: list[Slab], digest: str) -> Image:
    manifest = manifests.parse(_read_whole(fds[0]))
    if manifest.digest != digest:
        raise ValueError(f"its manifest is of {manifest.digest}")
    table = _read_whole(fds[1])
    body = json.loads(table)
    chunks = _places(manifest, body, slabs)
    texts = [str(file.get("text", "")).encode() for file in body["files"]]
    config = next((text for text in texts if is_config(manifest, text)), b"")
    return Image(manifest, tuple(slab.retain() for slab in slabs), table, chunks, config)


def _read_whole(fd: int) -> bytes:
    if not linux.is_sealed(fd):
        raise ValueError("a table or manifest that is not sealed")
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _places(manifest: Manifest, table: Any, slabs: list[Slab]) -> dict[str, Place[Slab]]:
    """Where each chunk lies: a tensor's extents hold its chunks one behind the other. Raises
    ValueError when table, manifest and slabs do not agree.
    """
    places: dict[str, Place[Slab]] = {}
    extents = {item["name"]: item["extents"] for item in table["tensors"]}
    for tensor in manifest.tensors:
        rest, number = tensor.nbytes, 0
        for index, offset, nbytes in extents[tensor.name]:
            if offset + nbytes > slabs[index].nbytes:
                raise ValueError(f"{tensor.name} ends beyond its slab")
            while nbytes > 0:
                length = min(manifest.chunk_bytes, rest)
                places[tensor.chunks[number]] = Place(slabs[index], offset, length)
                offset, nbytes = offset + length, nbytes - length
                rest, number = rest - length, number + 1
            if nbytes:
                raise ValueError(f"an extent of {tensor.name} ends within a chunk")
        if rest or number != len(tensor.chunks):
            raise ValueError(f"{tensor.name} is not all there")
    return places
