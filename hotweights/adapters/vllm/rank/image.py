"""A version in memory: the table and slabs that an agent hands over, mapped into this process.

A tensor may lie in several extents; they are mapped side by side with ``MAP_FIXED``, so that the
model's loaders see one contiguous tensor and nothing is copied. Whoever sends this is a process of
its own with its own bugs, and a wrong offset here is a SIGBUS or somebody else's weights: so seals,
bounds, alignment and sizes are all checked before the first page is mapped. The mapping goes away
with its last view: a tensor that is still referenced somewhere never points at nothing.

It is mapped privately (mmap(2), ``MAP_PRIVATE``): a loader that writes into the tensor it is given
gets pages of its own, where memory that cannot be written would end the serving process.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from hotweights.adapters.vllm.rank.fit.dry_load import Spec
from hotweights.adapters.vllm.rank.table import (
    ITEM_BYTES,
    TORCH_NAMES,
    ImageError,
    Table,
    TensorEntry,
    parse_table,
    torch_shape,
    whole_pages,
)

# the table is read whole, into this process' memory: a bound for what another process may ask
MAX_TABLE_BYTES = 256 << 20
# numbers of linux/fcntl.h and asm-generic/mman-common.h; see fcntl(2), "File Sealing",
# memfd_create(2), mmap(2) and madvise(2)
_F_GET_SEALS = 1034
_SEALED = 0x1 | 0x2 | 0x4 | 0x8  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_DONTNEED = 4
_MADV_POPULATE_READ = 22
# 64 MiB: one call prefaults this much, so that the address space's lock is never held for long
_POPULATE_BYTES = 64 << 20


class Region:
    """A range of addresses with the slabs' pages in it; unmapped when nothing refers to it any
    more. mmap(2): first the whole range is reserved without memory, then ``MAP_FIXED`` puts the
    slabs' pages into it. Raises `ImageError`.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = 0  # for `__del__`, should mapping fail
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self.address = _mmap(None, nbytes, 0, flags, -1, 0)  # PROT_NONE: only reserves the range

    def place(self, address: int, fd: int, offset: int, nbytes: int) -> None:
        """Put pages of a slab at ``address``, counted from the region's beginning. All in bytes and
        multiples of `PAGE`, and checked before: ``MAP_FIXED`` replaces whatever lies there.
        """
        # without a reserve: hardly ever is a page written, and none counts against the limits before
        flags = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        _mmap(self.address + address, nbytes, protection, flags, fd, offset)

    def populate(self) -> None:
        """Fault all pages in (madvise(2), ``MADV_POPULATE_READ``); kernels before 5.14 cannot."""
        for start in range(0, self.nbytes, _POPULATE_BYTES):
            length = min(_POPULATE_BYTES, self.nbytes - start)
            if _libc.madvise(
                ctypes.c_void_p(self.address + start), ctypes.c_size_t(length), _MADV_POPULATE_READ
            ):
                return  # what the first call refused, no other would do

    def restore(self) -> None:
        """Forget what was written into it: from here on it reads as the slabs do (madvise(2),
        ``MADV_DONTNEED`` of a private mapping).
        """
        _libc.madvise(ctypes.c_void_p(self.address), ctypes.c_size_t(self.nbytes), _MADV_DONTNEED)

    def __del__(self) -> None:
        if self.address:
            _libc.munmap(ctypes.c_void_p(self.address), ctypes.c_size_t(self.nbytes))
            self.address = 0


class Image:
    """One mapped version. Its file descriptors are closed once it is mapped: the mapping keeps the
    memory.
    """

    def __init__(self, table: Table, region: Region | None) -> None:
        self.table = table
        self.digest = table.digest
        self.nbytes = sum(entry.nbytes for entry in table.entries)
        # made once: a version may have a hundred thousand tensors, and is loaded in many parts
        self.specs = {entry.name: Spec(entry.dtype, entry.shape) for entry in table.entries}
        self._place = {entry.name: place for place, entry in enumerate(table.entries)}
        self._region = region
        self._buffer = _buffer(region)
        self._lent = False  # to loaders, who may have written into it

    @classmethod
    def open(
        cls, fds: Sequence[int], digest: str, admit: Callable[[int], None] = lambda count: None
    ) -> Image:
        """Map what came with a `prepare`: the table's descriptor, then the slabs'. The caller keeps
        (and closes) the descriptors. ``admit`` is asked before the first mapping, with their
        number, and may raise. Raises `ImageError`.
        """
        if not fds:
            raise ImageError("no table came with it")
        slabs = fds[1:]
        # seals before sizes are believed, sizes before the table that speaks of them
        sizes = [_sealed_size(fd, f"slab {index}") for index, fd in enumerate(slabs)]
        table = parse_table(_read_all(fds[0]), sizes)
        if table.digest != digest:
            raise ImageError(f"the table is of {table.digest}, not of {digest}")
        runs = list(_runs(table.entries))
        admit(len(runs))  # at the kernel's limit the serving process itself would fail
        region = Region(table.region_bytes) if table.region_bytes else None
        if region is not None:
            for address, slab, offset, nbytes in runs:
                region.place(address, slabs[slab], offset, nbytes)
        return cls(table, region)

    def populate(self) -> None:
        """Have the kernel enter all of its pages into this process' page tables, of 2 MiB for a GiB
        of weights, so that a pause that reads them need not wait for that. Whoever reads outside
        the pause does without: it is no faster then, and a rank reads only its own slices, and of a
        version that changes little only what changed.
        """
        if self._region is not None:
            self._region.populate()

    def view(self, entry: TensorEntry) -> memoryview:
        """A tensor's bytes, mapped and not copied."""
        if not entry.nbytes:
            return memoryview(b"")
        return memoryview(self._buffer).cast("B")[entry.address : entry.address + entry.nbytes]

    def same_specs(self, other: Image) -> bool:
        """Whether it has the same tensors, dtypes, shapes and side files, wherever they lie."""
        return self.table.files == other.table.files and list(self.specs.items()) == list(
            other.specs.items()
        )

    def changed_from(self, other: Image) -> frozenset[str] | None:
        """The tensors that have other bytes than they have in the other version, or that it has
        not. None: it has some that this one has not, or another order, in which a loader may write
        one over the other; nobody can say what that changes.
        """
        theirs = {e.name: (e.content, e.dtype, e.shape) for e in other.table.entries}
        if [e.name for e in self.table.entries if e.name in theirs] != list(theirs):
            return None
        changed = [
            entry.name
            for entry in self.table.entries
            if theirs.pop(entry.name, None) != (entry.content, entry.dtype, entry.shape)
            or not entry.content
        ]
        return None if theirs else frozenset(changed)

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors are here and have equal bytes; the same extents need no reading."""
        if first not in self._place or second not in self._place:
            return False
        one, other = (self.table.entries[self._place[name]] for name in (first, second))
        if one.nbytes != other.nbytes or one.extents == other.extents:
            return one.nbytes == other.nbytes
        return _memcmp(self._buffer, one.address, other.address, one.nbytes)

    def shared(self) -> frozenset[str]:
        """The tensors that lie in the same memory as another one."""
        counts = Counter(entry.address for entry in self.table.entries if entry.nbytes)
        return frozenset(e.name for e in self.table.entries if counts[e.address] > 1 and e.nbytes)

    def restore(self) -> None:
        """Forget what was written into tensors, in any load of before."""
        if self._region is not None and self._lent:
            self._region.restore()
        self._lent = False

    def tensors(self, only: Collection[str] | None = None) -> Iterator[tuple[str, Any]]:
        """Name and tensor, in load order: whole, on the CPU, with the table's dtype and shape.
        ``only``: those of these names. The tensors are views: what is written into one stays in
        this process, and there until `restore`. Raises `ImageError` for a dtype that this torch
        does not have.
        """
        import torch  # only engines have it; the agent's tests of this module do not

        self._lent = True
        entries = self.table.entries
        if only is not None:
            places = sorted(self._place[name] for name in only if name in self._place)
            entries = tuple(entries[place] for place in places)
        for entry in entries:
            dtype = getattr(torch, TORCH_NAMES[entry.dtype], None)
            if dtype is None:
                raise ImageError(
                    f"{entry.name}: this torch ({torch.__version__}) has no {entry.dtype}"
                )
            if entry.nbytes:
                count = entry.nbytes // ITEM_BYTES[entry.dtype]
                flat = torch.frombuffer(
                    self._buffer, dtype=dtype, count=count, offset=entry.address
                )
            else:
                flat = torch.empty(0, dtype=dtype)
            yield entry.name, flat.view(torch_shape(entry.dtype, entry.shape))


def _runs(entries: Sequence[TensorEntry]) -> Iterator[tuple[int, int, int, int]]:
    """(address, slab, offset, nbytes) with neighbours joined: the kernel allows a process only some
    65 000 mappings (``vm.max_map_count``, 65530 by default).
    """
    run: tuple[int, int, int, int] | None = None
    end = 0
    for entry in entries:
        if entry.address < end:
            continue  # it shares the address of one before it
        address = entry.address
        for slab, offset, nbytes in entry.extents:
            nbytes = whole_pages(nbytes)
            if run and (run[0] + run[3], run[1], run[2] + run[3]) == (address, slab, offset):
                run = (run[0], slab, run[2], run[3] + nbytes)
            else:
                if run:
                    yield run
                run = (address, slab, offset, nbytes)
            address += nbytes
        end = address
    if run:
        yield run


def _sealed_size(fd: int, what: str) -> int:
    """Its size in bytes, once it can no longer change under us: an unsealed file could shrink
    (SIGBUS) or be rewritten. Raises `ImageError`.
    """
    try:
        seals = fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError as error:
        raise ImageError(f"{what} is no memfd: {error}") from error
    if seals & _SEALED != _SEALED:
        raise ImageError(
            f"{what} is not sealed against writing, growing and shrinking (seals {seals:#x})"
        )
    return os.fstat(fd).st_size


def _read_all(fd: int) -> bytes:
    size = _sealed_size(fd, "the table")
    if size > MAX_TABLE_BYTES:
        raise ImageError(f"a table of {size} bytes exceeds {MAX_TABLE_BYTES}")
    parts, offset = [], 0
    while offset < size:
        part = os.pread(fd, size - offset, offset)
        if not part:
            break  # sealed against shrinking, so never; parsing refuses half a table anyway
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _buffer(region: Region | None) -> Any:
    """The region as an object with the buffer protocol, which keeps the region for as long as any
    view lives.
    """
    if region is None:
        return b""
    # a class of its own: a plain ctypes array takes no attribute, and this one keeps the region
    kind = type("RegionBytes", (ctypes.c_char * region.nbytes,), {})
    buffer = kind.from_address(region.address)  # type: ignore[attr-defined]
    buffer.region = region
    return buffer


def _memcmp(buffer: Any, first: int, second: int, nbytes: int) -> bool:
    base = ctypes.addressof(buffer)
    return not _libc.memcmp(
        ctypes.c_void_p(base + first), ctypes.c_void_p(base + second), ctypes.c_size_t(nbytes)
    )


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong,
)  # fmt: skip


def _mmap(
    address: int | None, nbytes: int, protection: int, flags: int, fd: int, offset: int
) -> int:
    result = _libc.mmap(address, nbytes, protection, flags, fd, offset)
    if result is None or result == ctypes.c_void_p(-1).value:
        error = ctypes.get_errno()
        raise ImageError(f"could not map {nbytes} bytes: {os.strerror(error)}")
    return int(result)
