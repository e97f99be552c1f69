"""What this node holds: versions that are staged or being staged, all in memory. A restart begins
empty.

The store decides whether a version fits before its first byte moves, keeps an account of what it
promised to versions that still arrive, lends verified chunks to peers, and frees a version when
nobody is left who uses it. Everything about bytes (layout, verification, sealing) is the image's;
where they come from is the fetch's; which versions are wanted is the session's.

Locking: one lock guards the table of versions and the counts in it, and is never held during I/O,
hashing or a callback. A second one, taken first, serialises `begin`, whose layout of a large
version takes a while.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Literal, Self

from hotweights_common.reasons import Reason
from hotweights_planner.layout import Place, page_rounded
from hotweights_planner.manifest import Manifest
from hotweights_storage.capacity import available_nbytes
from hotweights_storage.errors import Cancelled, NoCapacity, TransferError
from hotweights_storage.image import Image, ImageBuilder
from hotweights_storage.slab import Slab
from hotweights_transports.peers.base import ChunkProvider, Lease, Pending

TICK_SECONDS = 0.2  # how late a cancellation is noticed while a version waits for its turn

Phase = Literal["Fetching", "Staged"]


class UnknownVersion(TransferError):
    """The version is not staged here: never, not yet, or not any more."""

    reason = Reason.NOT_STAGED


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """The account of the node's memory, in bytes."""

    held: int
    """Of all versions together; what they share counts once."""
    promised: int
    """Still to be taken by versions that are being staged."""
    free: int
    """What another version may take."""


@dataclasses.dataclass(frozen=True, slots=True)
class Version:
    """One version, as it is told to others."""

    digest: str
    version: str
    phase: Phase
    nbytes: int
    pins: int


def room(available: int, promised: int, reserve: int) -> int:
    """What a new version may take, of `available` bytes that are free now."""
    return max(0, available - promised - reserve)


@dataclasses.dataclass(slots=True, eq=False)
class _Held:
    """A version in the table. `builder` while it arrives, then `image`."""

    manifest: Manifest
    builder: ImageBuilder
    expected: frozenset[str]  # the chunks that were to be fetched
    image: Image | None = None
    stored_nbytes: int = 0  # of the builder's new memory
    pins: int = 0
    dropped: bool = False  # out of the table: closed with the last pin

    @property
    def promised_nbytes(self) -> int:
        return (
            0
            if self.image is not None or self.dropped
            else max(0, self.builder.new_nbytes - self.stored_nbytes)
        )

    def close(self) -> None:
        if self.image is not None:
            self.image.close()
        else:
            self.builder.close()


class Store(ChunkProvider):
    """Thread-safe; every method may be called from any thread."""

    def __init__(
        self,
        *,
        reserve_nbytes: int = 0,
        stagings_at_once: int = 1,
        available: Callable[[], int] = available_nbytes,
    ) -> None:
        """`reserve_nbytes` stay free for the agent itself; `available` says what the node and its
        control groups leave.
        """
        self._reserve_nbytes = reserve_nbytes
        self._available = available
        self._places = threading.Semaphore(stagings_at_once)
        self._beginning = threading.Lock()
        self._changed = threading.Condition()
        self._held: dict[str, _Held] = {}

    @contextlib.contextmanager
    def turn(self, cancel: threading.Event, deadline: float | None = None) -> Iterator[None]:
        """Wait until one of the places for staging is free, and keep it. ``deadline`` is
        `time.monotonic`'s. Raises `Cancelled`, also when that passes.
        """
        while not self._places.acquire(timeout=TICK_SECONDS):
            if cancel.is_set():
                raise Cancelled("cancelled while it waited for its turn")
            if deadline is not None and time.monotonic() > deadline:
                raise Cancelled(
                    "its turn did not come in time; stage fewer versions at once",
                    Reason.DEADLINE_EXCEEDED,
                )
        try:
            yield
        finally:
            self._places.release()

    def begin(self, manifest: Manifest) -> StagingVersion:
        """Make room for a version and take its known chunks over; `NoCapacity` says what it needs
        and what there is.
        """
        with self._beginning, contextlib.ExitStack() as pins:
            with self._changed:
                if manifest.digest in self._held:
                    raise TransferError(
                        f"version {manifest.version} is here already, or on its way",
                        Reason.ALREADY_STAGED,
                    )
                staged = [held for held in self._held.values() if held.image is not None]
                # so that none of them goes while its chunks are taken over
                for held in staged:
                    held.pins += 1
                    pins.callback(self._unpin, held)
            present: ChainMap[str, Place[Slab]] = ChainMap(
                *(dict(held.image.chunks) for held in staged if held.image)
            )
            builder = ImageBuilder(
                manifest, present, on_chunk=lambda blake3: self._arrived(manifest.digest, blake3)
            )
            try:
                self._check_room(builder)
            except NoCapacity:
                builder.close()
                raise
            held = _Held(manifest, builder, frozenset(builder.missing))
            with self._changed:
                self._held[manifest.digest] = held
                self._changed.notify_all()
            return StagingVersion(self, held)

    def image(self, digest: str) -> Pin:
        """The staged version, which stays as long as the pin; for handing it to an engine."""
        with self._changed:
            held = self._held.get(digest)
            if held is None or held.image is None:
                raise UnknownVersion(f"{digest} is not staged on this node; stage it first")
            held.pins += 1
            return Pin(self, held, held.image)

    def release(self, digest: str) -> bool:
        """Let go of a staged version; its memory goes when no pin and no other version needs it.
        False: not staged.
        """
        with self._changed:
            held = self._held.get(digest)
            if held is None or held.image is None:
                return False
        self._drop(held)
        return True

    def versions(self) -> tuple[Version, ...]:
        """Everything that is here or on its way, oldest first."""
        with self._changed:
            return tuple(
                Version(
                    digest,
                    held.manifest.version,
                    "Staged" if held.image else "Fetching",
                    held.manifest.nbytes,
                    held.pins,
                )
                for digest, held in self._held.items()
            )

    def usage(self) -> Usage:
        available = self._available()
        with self._changed:
            slabs = {
                id(slab): slab.nbytes
                for held in self._held.values()
                if held.image
                for slab in held.image.slabs
            }
            promised = self._promised()
            arriving = sum(held.stored_nbytes for held in self._held.values() if held.image is None)
        return Usage(
            sum(slabs.values()) + arriving,
            promised,
            room(available, promised, self._reserve_nbytes),
        )

    # What peers ask (`ChunkProvider`):

    def locate(self, blake3: str) -> Lease | Pending | None:
        with self._changed:
            coming: _Held | None = None
            for held in self._held.values():
                found = (
                    held.image.range(blake3)
                    if held.image is not None
                    else held.builder.range(blake3)
                )
                if found is not None:
                    held.pins += 1
                    return Lease(
                        *found, release=partial(self._unpin, held), sealed=held.image is not None
                    )
                # remembered only: another version may have it already
                if held.image is None and blake3 in held.expected:
                    coming = held
        if coming is None:
            return None
        version = coming
        return Pending(lambda timeout_seconds: self._wait(version, blake3, timeout_seconds))

    def manifest(self, digest: str) -> bytes | None:
        with self._changed:
            held = self._held.get(digest)
        return None if held is None else held.manifest.canonical

    # What stagings and pins do:

    def _finish(self, held: _Held) -> Image:
        image = held.builder.finish()
        with self._changed:
            held.image = image
            self._changed.notify_all()
        return image

    def _drop(self, held: _Held) -> None:
        """Out of the table, at once; closed now or with the last pin."""
        with self._changed:
            if held.dropped:  # released and given up at the same time; it is closed once
                return
            held.dropped = True
            if self._held.get(held.manifest.digest) is held:
                del self._held[held.manifest.digest]
            free = held.pins == 0
            self._changed.notify_all()
        if free:
            held.close()

    def _unpin(self, held: _Held) -> None:
        with self._changed:
            held.pins -= 1
            free = held.dropped and held.pins == 0
        if free:
            held.close()

    def _arrived(self, digest: str, blake3: str) -> None:
        with self._changed:
            held = self._held.get(digest)
            if held is not None:
                held.stored_nbytes += page_rounded(held.builder.nbytes(blake3))
                self._changed.notify_all()

    def _wait(self, held: _Held, blake3: str, timeout_seconds: float) -> bool:
        def settled() -> bool:
            return held.dropped or held.image is not None or held.builder.has(blake3)

        with self._changed:
            return self._changed.wait_for(settled, timeout_seconds)

    def _promised(self) -> int:
        return sum(held.promised_nbytes for held in self._held.values())

    def _check_room(self, builder: ImageBuilder) -> None:
        available = self._available()
        with self._changed:
            promised = self._promised()
        free = room(available, promised, self._reserve_nbytes)
        if builder.new_nbytes > free:
            raise NoCapacity(
                f"version {builder.manifest.version} needs {builder.new_nbytes} bytes of memory, "
                f"{free} are free here ({available} available, less {promised} promised to "
                f"versions that are being staged and {self._reserve_nbytes} in reserve): raise the "
                "agent's memory limit, or release a version on this node"
            )


class StagingVersion:
    """A version on its way: `commit` it when nothing is missing; leaving the context without that
    gives it up.
    """

    def __init__(self, store: Store, held: _Held) -> None:
        self._store = store
        self._held = held
        self.manifest = held.manifest
        self.builder = held.builder
        self.needed_nbytes = sum(held.builder.nbytes(blake3) for blake3 in held.expected)
        """To be fetched; the rest was here already."""

    def commit(self) -> Image:
        """Seal it. From now on it is staged, until `Store.release`."""
        return self._store._finish(self._held)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._held.image is None:
            self._store._drop(self._held)


class Pin:
    """Keeps a staged version's memory and descriptors open until `release`."""

    def __init__(self, store: Store, held: _Held, image: Image) -> None:
        self._store = store
        self._held: _Held | None = held
        self.image = image

    def release(self) -> None:
        """Let go of it. Doing it twice changes nothing: a pin may end in two ways at once."""
        held, self._held = self._held, None
        if held is not None:
            self._store._unpin(held)

    def __enter__(self) -> Image:
        return self.image

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
