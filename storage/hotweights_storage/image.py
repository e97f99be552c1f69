"""One version in memory: `ImageBuilder` while it arrives, `Image` when it is whole.

Whoever brings bytes (a source, a peer) asks the builder what is missing and puts chunks in, in any
order, from any thread. `ImageBuilder.put` hashes the caller's buffer and only then copies it into
its final place: nobody ever holds a writable view of a slab, so a slow second parent cannot
overwrite what was verified and sent on. (The copy is cheap: it comes out of the cache, and it
spares the zeroing and faulting of the pages.) What is verified can be read at once, so that it can
be sent on while the rest arrives; what is not verified cannot be read at all. An image exists only
whole and sealed. Chunks that are here and get a new place all the same (`planner/compaction`) are
copied at the end.

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
        config: bytes = b"",
    ) -> None:
        """``config``: the bytes of `Manifest.config_file`; none: they are not here."""
        self.manifest = manifest
        self.config = config
        self.slabs = slabs
        self.table_json = table
        self.chunks: Mapping[str, Place[Slab]] = MappingProxyType(chunks)
        self._table = sealed_memfd(table)
        self._config = sealed_memfd(config, "hotweights-config") if config else None
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
        if place is not None:
            return Range(place.slab.fd, place.offset, place.nbytes)
        file = self.manifest.config_file
        if self._config is not None and file is not None and file.blake3 == blake3_hex:
            return Range(self._config.fd, 0, file.nbytes)  # asked for like a chunk
        return None

    def retain(self) -> tuple[Slab, ...]:
        """Its table and then its slabs, each with a share for the caller to `release`: whoever
        closes the image takes nothing from these.
        """
        return tuple(slab.retain() for slab in (self._table, *self.slabs))

    def close(self) -> None:
        """Give the slabs back. Engines that mapped them keep their memory until they unmap it."""
        if self._open:
            self._open = False
            for slab in (self._table, self._config, *self.slabs):
                if slab is not None:
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
        copies: Mapping[str, Place[Slab]] | None = None,
    ) -> None:
        """``present`` are chunks of other images, which must stay open until this returns, and
        ``copies`` those that `finish` copies to a new place; ``on_chunk`` is called, from whatever
        thread, with each digest as it becomes verified. Raises what `lay_out` does, and `OSError`
        when there are no descriptors or no memory.
        """
        self.manifest = manifest
        self._layout = lay_out(manifest, present or {}, max_slab_nbytes)
        self._on_chunk = on_chunk
        self._changed = threading.Condition()
        self._arriving: set[str] = set()
        self._open = True
        self.config = b""
        """The bytes of `Manifest.config_file`, verified; none: they are not here, and the image is
        whole without them.
        """
        here = copies or {}
        self._copies = {digest: here[digest] for digest in self._layout.missing if digest in here}
        self._missing = dict.fromkeys(d for d in self._layout.missing if d not in self._copies)
        self._slabs: list[Slab] = []
        self._made: list[Slab] = []
        self._lent: list[Slab] = []  # what is copied out of
        try:
            for slab in self._layout.slabs:
                if isinstance(slab, NewSlab):
                    self._made.append(Slab(slab.nbytes))
                    self._slabs.append(self._made[-1])
                else:
                    self._slabs.append(slab.retain())
            for lender in {place.slab for place in self._copies.values()}:
                self._lent.append(lender.retain())
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

    @property
    def promised_nbytes(self) -> int:
        """What of that is still to be taken, in bytes."""
        return sum(slab.nbytes - slab.stored_nbytes for slab in self._made)

    @property
    def stored_nbytes(self) -> int:
        """What of it is taken, in bytes."""
        return sum(slab.stored_nbytes for slab in self._made)

    @property
    def made(self) -> tuple[Slab, ...]:
        """The slabs that it fills."""
        return tuple(self._made)

    @property
    def slabs(self) -> tuple[Slab, ...]:
        """All that it uses or copies from, until `close`."""
        return (*self._slabs, *self._lent)

    @property
    def mapping_count(self) -> int:
        """As `Layout.mapping_count`."""
        return self._layout.mapping_count

    def verified(self) -> dict[str, Place[Slab]]:
        """Every chunk that can be read now, by digest, wherever it is."""
        with self._changed:
            waiting = self._missing.keys() | self._copies.keys()
            return self._copies | {
                digest: Place(self._slabs[index], offset, nbytes)
                for digest, (index, offset, nbytes) in self._layout.places.items()
                if digest not in waiting
            }

    def nbytes(self, digest: str) -> int:
        """Size of a chunk in bytes. Raises `KeyError` for a digest that the version lacks."""
        return self._layout.places[digest][2]

    def chunk(self, digest: str) -> Chunk:
        """A chunk's tensor and its place in the checkpoint, for messages: it looks through the
        manifest for it.
        """
        return next(self.manifest.first_chunks([digest]))

    def has(self, digest: str) -> bool:
        """Whether a chunk is verified and in its place; False too where the version lacks it."""
        return digest in self._layout.places and not self.awaits(digest)

    def awaits(self, digest: str) -> bool:
        """Whether a chunk of the version is still to come."""
        return digest in self._missing or digest in self._copies

    def range(self, digest: str) -> Range | None:
        """Where a chunk's bytes can be read, until `close` or `Image.close`; None while they are
        not there.
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
            raise _no_memory(digest, error) from error
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
        on), and after `close` or another `finish`; `NoCapacity` when there is no memory for the
        copies.
        """
        self._check_complete()
        self._copy()
        # Before there is an image: whoever has one may hand it to engines. Outside of the lock: it
        # may wait for readers, who ask this builder for their next range.
        for slab in self._slabs:
            slab.seal()
        with self._changed:
            self._check_complete()
            chunks = {
                digest: Place(self._slabs[index], offset, nbytes)
                for digest, (index, offset, nbytes) in self._layout.places.items()
            }
            table = table_json(self.manifest, self._layout, _text(self.config))
            image = Image(self.manifest, tuple(self._slabs), table, chunks, self.config)
            self._open = False  # its share of the slabs is the image's now
            for slab in self._lent:
                slab.release()
            return image

    def _check_complete(self) -> None:
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

    def _copy(self) -> None:
        """Give each chunk that gets a new place its own. They were verified when they came, and lie
        in memory that nobody can write.
        """
        # one buffer for all: a new one each time costs as much as the copy
        buffer = memoryview(
            bytearray(max((lent.nbytes for lent in self._copies.values()), default=0))
        )
        for digest in tuple(self._copies):
            lent = self._copies[digest]
            index, offset, nbytes = self._layout.places[digest]
            lent.slab.read_into(lent.offset, buffer[:nbytes])
            try:
                self._slabs[index].write(offset, buffer[:nbytes])
            except OSError as error:
                raise _no_memory(digest, error) from error
            del self._copies[digest]

    def close(self) -> None:
        """Give up; does nothing after `finish`."""
        with self._changed:
            if self._open:
                self._open = False
                # else its descriptor would be closed under a writer
                self._changed.wait_for(lambda: not self._arriving)
                for slab in (*self._slabs, *self._lent):
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


def is_config(manifest: Manifest, content: bytes) -> bool:
    """Whether these are the bytes of the version's configuration (`Manifest.config_file`)."""
    file = manifest.config_file
    return file is not None and blake3(content).hexdigest() == file.blake3


def _text(config: bytes) -> str | None:
    """None: there is none, or it is no text; then only its digest can be compared."""
    try:
        return config.decode() if config else None
    except UnicodeDecodeError:
        return None


def _no_memory(digest: str, error: OSError) -> NoCapacity:
    return NoCapacity(
        f"no memory for chunk {digest[:16]}…: {error.strerror}; free memory on the node"
    )
