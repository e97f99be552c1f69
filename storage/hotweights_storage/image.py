"""One version in memory: `ImageBuilder` while it arrives, `Image` when it is whole.

Whoever brings bytes (a source, a peer) asks the builder what is missing and puts chunks in, in any
order, from any thread. `ImageBuilder.put` hashes the caller's buffer and only then copies it into
its final place: nobody ever holds a writable view of a slab, so a slow second parent cannot
overwrite what was verified and sent on. (The copy is cheap: it comes out of the cache, and it
spares the zeroing and faulting of the pages.) What is verified can be read at once, so that it can
be sent on while the rest arrives; what is not verified cannot be read at all. An image exists only
whole and sealed.

It does not know where bytes come from, nor who maps them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import NamedTuple, Self

from blake3 import blake3

from hotweights_planner.layout import MAX_SLAB_NBYTES, NewSlab, Place, lay_out, table_json
from hotweights_planner.manifest import Chunk, Manifest
from hotweights_storage.errors import ChecksumMismatch, Incomplete, NoCapacity, TransferError
from hotweights_storage.slab import Slab, sealed_memfd


class Range(NamedTuple):
    """Bytes behind a descriptor, as sendfile(2) wants them: ``nbytes`` from ``offset``."""

    fd: int
    offset: int
    nbytes: int


class Image:
    """A whole version: sealed slabs and the table over them. `close` gives up its share of the
    slabs. Any thread may read it, but none after or while another closes it.
    """

    def __init__(
        self,
        manifest: Manifest,
        slabs: tuple[Slab, ...],
        table: bytes,
        chunks: dict[str, Place[Slab]],
    ) -> None:
        self.manifest = manifest
        self.slabs = slabs
        self.table_json = table
        self.chunks: Mapping[str, Place[Slab]] = MappingProxyType(chunks)
        self._table = sealed_memfd(table)
        self._open = True

    @property
    def fds(self) -> tuple[int, ...]:
        """Read-only descriptors for an engine: the table first, then the slabs in the table's
        order.
        """
        return (self._table.fd, *(slab.fd for slab in self.slabs))

    @property
    def memory_nbytes(self) -> int:
        """Memory of all its slabs in bytes; those it shares with other images count here too."""
        return sum(slab.nbytes for slab in self.slabs)

    def range(self, blake3_hex: str) -> Range | None:
        """Where a chunk's bytes can be read, until `close`."""
        place = self.chunks.get(blake3_hex)
        return None if place is None else Range(place.slab.fd, place.offset, place.nbytes)

    def close(self) -> None:
        """Give the slabs back. Engines that mapped them keep their memory until they unmap it."""
        if self._open:
            self._open = False
            for slab in (self._table, *self.slabs):
                slab.release()


class ImageBuilder:
    """A version that is arriving. Call `finish` when nothing is `missing`, or `close` to give up;
    both end its use. Until then any thread may call anything; a chunk that was refused may be put
    again.
    """

    def __init__(
        self,
        manifest: Manifest,
        present: Mapping[str, Place[Slab]] | None = None,
        on_chunk: Callable[[str], None] | None = None,
        max_slab_nbytes: int = MAX_SLAB_NBYTES,
    ) -> None:
        """``present`` are chunks of other images, which must stay open until this returns;
        ``on_chunk`` is called, from whatever thread, with each digest as it becomes verified.
        Raises what `lay_out` does, and `OSError` when there are no descriptors or no memory.
        """
        self.manifest = manifest
        self._layout = lay_out(manifest, present or {}, max_slab_nbytes)
        self._on_chunk = on_chunk
        self._changed = threading.Condition()
        self._arriving: set[str] = set()
        self._open = True
        self._missing = dict.fromkeys(self._layout.missing)
        self._slabs: list[Slab] = []
        try:
            for slab in self._layout.slabs:
                self._slabs.append(
                    Slab(slab.nbytes) if isinstance(slab, NewSlab) else slab.retain()
                )
        except (OSError, TransferError):
            self.close()
            raise

    @property
    def missing(self) -> tuple[str, ...]:
        """Digests that are not verified yet, in load order, each once."""
        with self._changed:
            return tuple(self._missing)

    @property
    def missing_count(self) -> int:
        """How many digests are not verified yet; cheaper than `missing`."""
        return len(self._missing)

    @property
    def new_nbytes(self) -> int:
        """Memory in bytes that this version takes beyond what was there."""
        return self._layout.new_nbytes

    def nbytes(self, digest: str) -> int:
        """Size of a chunk in bytes. Raises `KeyError` for a digest that the version lacks."""
        return self._layout.places[digest][2]

    def chunk(self, digest: str) -> Chunk:
        """A chunk's tensor and its place in the checkpoint, for messages: it looks through the
        manifest for it.
        """
        return next(self.manifest.first_chunks([digest]))

    def has(self, digest: str) -> bool:
        """Whether a chunk is verified; False too where the version lacks it."""
        return digest in self._layout.places and digest not in self._missing

    def range(self, digest: str) -> Range | None:
        """Where a chunk's bytes can be read, until `close` or `Image.close`; None while it is not
        verified.
        """
        if not self.has(digest):
            return None
        index, offset, nbytes = self._layout.places[digest]
        return Range(self._slabs[index].fd, offset, nbytes)

    def put(self, digest: str, data: memoryview | bytes, source: str = "peer") -> bool:
        """Verify ``data``, then store it; False if somebody else brought or is bringing it, or
        nobody wants it any more. Raises `ChecksumMismatch`, `NoCapacity` when the memory cannot be
        had, and `KeyError` for a digest that the version lacks.
        """
        index, offset, nbytes = self._layout.places[digest]
        if len(data) != nbytes or blake3(data).hexdigest() != digest:
            raise ChecksumMismatch(source, self.chunk(digest))
        # only now: hashing takes long, and another thread may have been quicker
        with self._changed:
            if not self._open or digest not in self._missing or digest in self._arriving:
                return False
            self._arriving.add(digest)
        stored = False
        try:
            self._slabs[index].write(offset, data)
            stored = True
        except OSError as error:
            raise NoCapacity(
                f"no memory for chunk {digest[:16]}…: {error.strerror}; free memory on the node"
            ) from error
        finally:
            with self._changed:
                self._arriving.remove(digest)
                if stored:
                    del self._missing[digest]
                self._changed.notify_all()
        if self._on_chunk:  # outside of the lock: it may ask this builder something
            self._on_chunk(digest)
        return True

    def finish(self) -> Image:
        """The sealed image. Raises `Incomplete` while a chunk is missing (the builder may be used
        on), and after `close` or another `finish`.
        """
        with self._changed:
            if self._missing:
                text = (
                    f"{len(self._missing)} of {len(self._layout.places)} chunks are not verified; "
                    "fetch them first"
                )
                raise Incomplete(f"version {self.manifest.version}: {text}")
            if not self._open:
                raise Incomplete(
                    f"version {self.manifest.version}: the builder was closed or finished before"
                )
            # before there is an image: whoever has one may hand it to engines
            for slab in self._slabs:
                slab.seal()
            chunks = {
                digest: Place(self._slabs[index], offset, nbytes)
                for digest, (index, offset, nbytes) in self._layout.places.items()
            }
            table = table_json(self.manifest, self._layout)
            image = Image(self.manifest, tuple(self._slabs), table, chunks)
            self._open = False  # its share of the slabs is the image's now
            return image

    def close(self) -> None:
        """Give up; does nothing after `finish`."""
        with self._changed:
            if self._open:
                self._open = False
                # else its descriptor would be closed under a writer
                self._changed.wait_for(lambda: not self._arriving)
                for slab in self._slabs:
                    slab.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
