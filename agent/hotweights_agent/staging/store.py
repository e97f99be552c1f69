"""What this node holds: versions that are staged or being staged, all in memory. A restart begins
with what the keeper holds, or empty.

The store decides whether a version fits before its first byte moves, keeps an account of what it
promised to versions that still arrive, lends verified chunks to peers, and frees a version when
nobody is left who uses it. What came of a version that was given up is set aside, not thrown away:
the next try goes on from there, and other versions take what they share, until the memory is
needed. When slabs have become too empty the next version leaves them, and the older ones move with
it. Everything about bytes (layout, verification, sealing) is the image's; where they come from is
the fetch's; which versions are wanted is the session's, and what is moved is `compaction`'s to say.

Locking: one lock guards the table of versions and the counts in it, and is never held during I/O,
hashing or a callback. A second one, taken first, serialises `begin`, whose layout of a large
version takes a while.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Literal, Protocol, Self

from hotweights_agent.staging.compacting import build, moved, plans
from hotweights_agent.staging.held import FREEING_SECONDS, Freeing, Held, stored_nbytes
from hotweights_common.reasons import Reason
from hotweights_planner.compaction import Compaction, relocated
from hotweights_planner.layout import Place
from hotweights_planner.manifest import Manifest
from hotweights_storage.capacity import available_nbytes
from hotweights_storage.errors import NoCapacity, TransferError
from hotweights_storage.image import Image, ImageBuilder
from hotweights_storage.slab import Slab
from hotweights_transports.peers.base import ChunkProvider, Lease, Pending

Phase = Literal["Fetching", "Staged"]


class UnknownVersion(TransferError):
    """The version is not staged here: never, not yet, or not any more."""

    reason = Reason.NOT_STAGED


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """The account of the node's memory, in bytes."""

    held: int
    """Of all versions together and of what lies aside; what they share counts once."""
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


class Keeper(Protocol):
    """Holds what is staged while this process is gone (`local/kept_memory.py`). Never raises."""

    def keep(self, image: Image) -> None:
        """From now on."""

    def drop(self, digest: str) -> None:
        """It need not any more."""


class Nobody:
    """No keeper: what is staged ends with this process."""

    def keep(self, image: Image) -> None: ...

    def drop(self, digest: str) -> None: ...


class Store(ChunkProvider):
    """Thread-safe; every method may be called from any thread."""

    def __init__(
        self,
        *,
        reserve_nbytes: int = 0,
        available: Callable[[], int] = available_nbytes,
        keeper: Keeper | None = None,
    ) -> None:
        """`reserve_nbytes` stay free for the agent itself; `available` says what the node and its
        control groups leave; `keeper` holds what is staged while this process is gone.
        """
        self._keeper = keeper or Nobody()
        self._reserve_nbytes = reserve_nbytes
        self._available = available
        self._beginning = threading.Lock()
        self._changed = threading.Condition()
        self._held: dict[str, Held] = {}
        self._aside: dict[
            str, Held
        ] = {}  # given up, the oldest first; of use until memory is short
        self._freeing = Freeing()
        self._keeping = threading.Lock()  # a version that comes again is kept after it was dropped

    def begin(self, manifest: Manifest) -> StagingVersion:
        """Make room for a version and take its known chunks over; a version that was given up goes
        on where it was. `NoCapacity` says what it needs and what there is.
        """
        with self._beginning, contextlib.ExitStack() as pins:
            with self._changed:
                if manifest.digest in self._held:
                    raise TransferError(
                        f"version {manifest.version} is here already, or on its way",
                        Reason.ALREADY_STAGED,
                    )
                aside = self._aside.get(manifest.digest)
                if aside is None:
                    known = self._pin_known(pins)
            if aside is not None:
                held = self._resumed(aside)
            else:
                held = self._builder(manifest, known)
                self._discard(adopted=held.builder.slabs)
            with self._changed:
                self._held[manifest.digest] = held
                self._changed.notify_all()
            return StagingVersion(self, held)

    def adopt(self, image: Image) -> None:
        """Set aside what a former agent had staged: it is the version's again once that is begun,
        without a byte moved, or makes room when memory is short.
        """
        builder = ImageBuilder(image.manifest, image.chunks)
        builder.config = image.config
        image.close()  # the builder has its own share of the slabs
        held = Held(image.manifest, builder, dropped=True, aside=True)
        with self._changed:
            self._aside[image.manifest.digest] = held

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

    def manifest_of(self, digest: str) -> Manifest | None:
        """The manifest of a version that is here or lies aside, whatever became of its source; None
        for others. Peers are told of those that are listed alone (`manifest`).
        """
        with self._changed:
            held = self._held.get(digest) or self._aside.get(digest)
        return None if held is None else held.manifest

    def usage(self) -> Usage:
        available = self._available()
        with self._changed:
            listed = stored_nbytes(self._held.values())
            held = stored_nbytes((*self._held.values(), *self._aside.values()))
            promised = self._promised()
        # what lies aside is given to whoever needs it
        free = room(available + held - listed, promised, self._reserve_nbytes)
        return Usage(held, promised, free)

    def settle(self, timeout_seconds: float = FREEING_SECONDS) -> bool:
        """Wait until the memory of what was let go so far is free; False if that takes longer."""
        return self._freeing.settle(timeout_seconds)

    # What peers ask (`ChunkProvider`):

    def locate(self, blake3: str) -> Lease | Pending | None:
        with self._changed:
            coming: Held | None = None
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
                if held.image is None and held.expects(blake3):
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

    def _finish(self, held: Held) -> Image:
        image = held.builder.finish()
        with self._keeping:
            self._keeper.keep(image)
        with self._changed:
            held.image = image
            self._changed.notify_all()
        if held.leaves:
            self._relocate_older(held, image)
        return image

    def _drop(self, held: Held, *, aside: bool = False) -> None:
        """Out of the table, at once; closed soon, with the last pin, or when its memory is
        needed.
        """
        with self._changed:
            if held.dropped:  # released and given up at the same time; it is closed once
                return
            held.dropped, held.aside = True, aside
            if self._held.get(held.manifest.digest) is held:
                del self._held[held.manifest.digest]
            if aside:
                self._aside[held.manifest.digest] = held
            unused = held.unused
            self._changed.notify_all()
        if not aside:
            self._forget(held)
        if unused:
            self._freeing.close(held)

    def _forget(self, held: Held) -> None:
        # else its memory would outlive its last pin; the keeper is another process to wait for
        self._freeing.run(partial(self._forget_now, held.manifest.digest))

    def _forget_now(self, digest: str) -> None:
        with self._keeping:
            with self._changed:
                # what is kept next replaces what is kept now
                again = digest in self._held or digest in self._aside
            if not again:
                self._keeper.drop(digest)

    def _unpin(self, held: Held) -> None:
        with self._changed:
            held.pins -= 1
            unused = held.unused
        if unused:
            self._freeing.close(held)

    def _arrived(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _wait(self, held: Held, blake3: str, timeout_seconds: float) -> bool:
        def settled() -> bool:
            return held.dropped or held.image is not None or held.builder.has(blake3)

        with self._changed:
            return self._changed.wait_for(settled, timeout_seconds)

    def _promised(self) -> int:
        return sum(held.promised_nbytes for held in self._held.values())

    # How a version is begun:

    def _pin_known(self, pins: contextlib.ExitStack) -> list[Held]:
        """Whose chunks may be taken over, the newest first; pinned, so that none of them goes
        meanwhile. The lock is held.
        """
        staged = [held for held in self._held.values() if held.image is not None]
        known = [*reversed(staged), *reversed(self._aside.values())]
        for held in known:
            held.pins += 1
            pins.callback(self._unpin, held)
        return known

    def _resumed(self, held: Held) -> Held:
        needed = held.builder.promised_nbytes
        if not self._has_room(needed, but=held):
            raise self._no_capacity(held.manifest, needed)
        with self._changed:
            del self._aside[held.manifest.digest]
            held.dropped = held.aside = False
        return held

    def _builder(self, manifest: Manifest, known: Sequence[Held]) -> Held:
        needed = 0
        for plan in plans(manifest, [held.chunks() for held in known]):
            builder = build(manifest, plan, lambda _: self._arrived())
            needed = builder.new_nbytes
            if self._has_room(needed + plan.rest_nbytes):
                return Held(manifest, builder, plan.leaves)
            builder.close()
        raise self._no_capacity(manifest, needed)

    def _has_room(self, nbytes: int, but: Held | None = None) -> bool:
        """Whether so much may be taken; first what was let go is waited for, then what lies aside
        is thrown away, the oldest first.
        """
        if nbytes <= self._free_nbytes() or (self.settle() and nbytes <= self._free_nbytes()):
            return True
        while (oldest := self._oldest_aside(but)) is not None:
            self._end_aside(oldest)
            if self.settle() and nbytes <= self._free_nbytes():
                return True
        return False

    def _free_nbytes(self) -> int:
        available = self._available()
        with self._changed:
            return room(available, self._promised(), self._reserve_nbytes)

    def _oldest_aside(self, but: Held | None) -> Held | None:
        with self._changed:
            return next((held for held in self._aside.values() if held is not but), None)

    def _discard(self, adopted: Sequence[Slab]) -> None:
        """End the use of what lies aside and gave another version slabs: they will be sealed."""
        slabs = set(adopted)
        with self._changed:
            ended = [held for held in self._aside.values() if slabs & set(held.made)]
        for held in ended:
            self._end_aside(held)

    def _end_aside(self, held: Held) -> None:
        with self._changed:
            self._aside.pop(held.manifest.digest, None)
            held.aside = False
            unused = held.unused
        self._forget(held)  # a former agent may have had it kept
        if unused:
            self._freeing.close(held)

    def _no_capacity(self, manifest: Manifest, nbytes: int) -> NoCapacity:
        available = self._available()
        with self._changed:
            promised = self._promised()
        free = room(available, promised, self._reserve_nbytes)
        return NoCapacity(
            f"version {manifest.version} needs {nbytes} bytes of memory, "
            f"{free} are free here ({available} available, less {promised} promised to "
            f"versions that are being staged and {self._reserve_nbytes} in reserve): raise the "
            "agent's memory limit, or release a version on this node"
        )

    # How older versions move out of slabs that the newest one left:

    def _relocate_older(self, newest: Held, image: Image) -> None:
        with contextlib.ExitStack() as pins:
            with self._changed:
                older = [held for held in self._pin_known(pins) if held is not newest]
            newer: ChainMap[str, Place[Slab]] = ChainMap(dict(image.chunks))
            for held in older:
                if held.image is None:
                    continue
                chunks = held.image.chunks
                if newest.leaves.intersection(held.slabs):
                    plan = relocated(chunks, newer, newest.leaves)
                    chunks = self._relocate(held, held.image, plan) or chunks
                newer.maps.append(dict(chunks))

    def _relocate(
        self, held: Held, old: Image, plan: Compaction[Slab]
    ) -> Mapping[str, Place[Slab]] | None:
        found = moved(old, plan, self._free_nbytes)
        if found is None:
            return None
        builder, image = found
        digest, new = held.manifest.digest, Held(held.manifest, builder, image=image)
        new.pins += 1  # it may be released at once, and is not to be closed while it is kept
        with self._changed:
            listed = self._held.get(digest) is held
            if listed:
                self._held[digest] = new
                held.dropped = True  # closed with its last pin, one of which is ours
            self._changed.notify_all()
        if not listed:
            image.close()
            return None
        with self._keeping:
            with self._changed:
                listed = self._held.get(digest) is new
            if listed:
                self._keeper.keep(image)
        self._unpin(new)
        return image.chunks if listed else None


class StagingVersion:
    """A version on its way: `commit` it when nothing is missing; leaving the context without that
    gives it up, and what has come is set aside.
    """

    def __init__(self, store: Store, held: Held) -> None:
        self._store = store
        self._held = held
        self.manifest = held.manifest
        self.builder = held.builder
        self.needed_nbytes = sum(map(held.builder.nbytes, held.builder.missing))
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
            # what came is good, however it ended, and so is what a former agent had brought; but
            # whom memory failed gives it back
            builder = self._held.builder
            useful = (builder.stored_nbytes > 0 or not builder.missing_count) and not isinstance(
                error, NoCapacity
            )
            self._store._drop(self._held, aside=useful)


class Pin:
    """Keeps a staged version's memory and descriptors open until `release`."""

    def __init__(self, store: Store, held: Held, image: Image) -> None:
        self._store = store
        self._held: Held | None = held
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
