"""A version in a GPU's memory, by the fastest road that was proved to work on this machine.

That a library can be imported proves nothing: GPUDirect Storage falls back in silence, kvikio needs
a driver for every call, and a container may see neither. So `choose` tries what it is about to use,
once, on real bytes, and says why it took what it took. The roads, best first:

    gds       file → GPU by kvikio, no copy in host memory      (asked for by HOTWEIGHTS_USE_GDS=1)
    pinned    image → page-locked buffers → GPU, two in turn
    pageable  image → GPU, through the driver's own buffers
    host      no GPU: the version stays where it is

Whatever the road, `DeviceVersion.verify` reads the bytes back and holds them against the manifest.
cupy and kvikio are known here alone, and imported only when a GPU is asked for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

from blake3 import blake3

from hotweights_common.reasons import Reason
from hotweights_planner.manifest import Chunk, Manifest, Tensor
from hotweights_storage.errors import ChecksumMismatch, TransferError
from hotweights_storage.image import Image

logger = logging.getLogger(__name__)

REMEDY = "pip install -e '.[gds]' in the checkout"
PIECE_NBYTES = 16 << 20  # of each of the two host buffers
PROBE_NBYTES = 64 << 10


class CopyPath(NamedTuple):
    """How bytes get onto the device, and why this way."""

    name: Literal["gds", "pinned", "pageable", "host"]
    because: str


def choose(
    device: str, *, pinned: bool = False, direct: bool = False, sample: Path | None = None
) -> CopyPath:
    """The best road to ``device`` (``cpu`` or ``cuda``) that works here. ``sample`` is a file of
    the source, for the probe. What does not work is no error: the next road is taken, and it is
    said why.
    """
    if device == "cpu":
        return CopyPath("host", "the CPU was asked for")
    reason = _no_gpu()
    if reason:
        return CopyPath("host", f"no GPU: {reason}")
    if direct:
        reason = _no_direct_read(sample) if sample else "the source is no file"
        if not reason:
            return CopyPath("gds", f"kvikio read {sample} into GPU memory, byte for byte")
        logger.warning("HOTWEIGHTS_USE_GDS is set, but %s; going on through host memory", reason)
    if not pinned:
        return CopyPath("pageable", "page-locked buffers were not asked for (--pinned)")
    reason = _no_pinned_memory()
    return (
        CopyPath("pageable", reason)
        if reason
        else CopyPath("pinned", "two page-locked buffers in turn")
    )


class DeviceVersion:
    """Every tensor of a version as bytes on the GPU, one allocation each. `close` frees them, once
    nobody else holds an array.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.arrays: dict[str, Any] = {}
        """Name → one-dimensional ``cupy.ndarray`` of uint8; DLPack and ``__cuda_array_interface__``
        give it to others.
        """

    def verify(self) -> None:
        """Read everything back and compare each chunk's BLAKE3. Raises `ChecksumMismatch`."""
        for tensor in self.manifest.tensors:
            array, whole = self.arrays[tensor.name], self.manifest.chunk_bytes
            for number, digest in enumerate(tensor.chunks):
                begin = number * whole
                data = array[begin : begin + whole].get()
                if blake3(memoryview(data)).hexdigest() != digest:
                    place = (digest, len(data), tensor.file, tensor.offset + begin)
                    raise ChecksumMismatch("GPU memory", Chunk(*place, tensor.name, number))

    def close(self) -> None:
        self.arrays.clear()


def to_device(
    image: Image,
    road: CopyPath,
    folder: Path | None = None,
    report: Callable[[int], None] = lambda _nbytes: None,
) -> DeviceVersion:
    """``image`` on the GPU. With the road ``gds`` the bytes come from the files in ``folder`` and
    are verified at once: nobody has hashed them yet. ``report`` is told bytes, in this thread.
    Raises `TransferError` (NoDevice) without a road, and `ChecksumMismatch`.
    """
    if road.name == "host":
        raise TransferError(f"no road to a GPU: {road.because}", Reason.NO_DEVICE)
    version = DeviceVersion(image.manifest)
    if road.name == "gds":
        if folder is None:
            raise TransferError(
                "the road gds reads files; name the source's folder", Reason.NO_DEVICE
            )
        for tensor in image.manifest.tensors:
            version.arrays[tensor.name] = _read_directly(folder / tensor.file, tensor)
            report(tensor.nbytes)
        version.verify()
        return version
    with closing(_Buffers(road.name == "pinned")) as buffers:
        for tensor in image.manifest.tensors:
            version.arrays[tensor.name] = array = _empty(tensor.nbytes)
            for offset, nbytes, fd, at in _pieces(image, tensor):
                buffers.copy(fd, at, nbytes, array[offset : offset + nbytes])
                report(nbytes)
    return version


def _pieces(image: Image, tensor: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Offset in the tensor, length, descriptor, offset there."""
    begin = 0
    for digest in tensor.chunks:
        found = image.range(digest)
        if found is None:
            raise TransferError(
                f"chunk {digest[:16]}… of tensor {tensor.name} is not in the image",
                Reason.INCOMPLETE,
            )
        for done in range(0, found.nbytes, PIECE_NBYTES):
            nbytes = min(PIECE_NBYTES, found.nbytes - done)
            yield begin + done, nbytes, found.fd, found.offset + done
        begin += found.nbytes


class _Buffers:
    """Two host buffers in turn: one is filled while the other is on its way. For one thread."""

    def __init__(self, pinned: bool) -> None:
        import cupy
        import numpy

        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._turns: list[tuple[Any, Any]] = []
        for _ in range(2):
            memory = (
                cupy.cuda.alloc_pinned_memory(PIECE_NBYTES) if pinned else bytearray(PIECE_NBYTES)
            )
            host = numpy.frombuffer(memory, dtype=numpy.uint8, count=PIECE_NBYTES)
            self._turns.append((host, cupy.cuda.Event(disable_timing=True)))

    def copy(self, fd: int, offset: int, nbytes: int, into: Any) -> None:
        host, sent = self._turns[0]
        self._turns.reverse()
        sent.synchronize()  # until what this buffer held has left it
        view = memoryview(host)[:nbytes]
        while view:
            count = os.preadv(fd, [view], offset)
            if not count:
                raise TransferError("the image ended before its table says so", Reason.INCOMPLETE)
            view, offset = view[count:], offset + count
        into.set(host[:nbytes], stream=self._stream)
        sent.record(self._stream)

    def close(self) -> None:
        self._stream.synchronize()


def _empty(nbytes: int) -> Any:
    import cupy

    return cupy.empty(nbytes, dtype=cupy.uint8)


def _read_directly(path: Path, tensor: Tensor) -> Any:
    import kvikio

    array = _empty(tensor.nbytes)
    with kvikio.CuFile(str(path), "r") as file:
        count = file.pread(array, tensor.nbytes, tensor.offset).get()
    if count != tensor.nbytes:
        raise TransferError(
            f"{path}: {count} bytes of tensor {tensor.name}, which has {tensor.nbytes}",
            Reason.SOURCE_UNREADABLE,
        )
    return array


def _no_gpu() -> str:
    """Why no GPU can be used; empty when one can."""
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount() < 1:
            return "the driver knows none"
        # a kernel that runs: a driver may list devices that it cannot use
        if int(cupy.arange(3).sum()) != 3:
            return "it does not add 0, 1 and 2 to 3"
    except ImportError as error:
        return f"{error}; {REMEDY}"
    # CUDARuntimeError and its kin: no driver, no device, too old a driver
    except RuntimeError as error:
        return str(error)
    return ""


def _no_pinned_memory() -> str:
    import cupy

    try:
        cupy.cuda.alloc_pinned_memory(PIECE_NBYTES)
    except RuntimeError as error:
        return (
            f"no page-locked memory is to be had ({error}); raise the limit of locked memory "
            "(ulimit -l)"
        )
    return ""


def _no_direct_read(sample: Path) -> str:
    """Why a file cannot be read straight into GPU memory: tried on its first bytes, and
    compared.
    """
    import cupy

    try:
        import kvikio
        import kvikio.defaults
    except ImportError as error:
        return f"{error} ({REMEDY})"
    nbytes = min(PROBE_NBYTES, sample.stat().st_size)
    try:
        if kvikio.defaults.is_compat_mode_preferred():
            return (
                "kvikio is in compatibility mode: it would go through host memory (is /run/udev "
                "mounted, nvidia-fs loaded?)"
            )
        array = cupy.empty(nbytes, dtype=cupy.uint8)
        with kvikio.CuFile(str(sample), "r") as file:
            count = file.pread(array, nbytes, 0).get()
    except RuntimeError as error:
        return f"kvikio cannot read {sample}: {error}"
    with sample.open("rb") as stream:
        expected = stream.read(nbytes)
    return (
        ""
        if count == nbytes and array.get().tobytes() == expected
        else f"kvikio read other bytes than are in {sample}"
    )
