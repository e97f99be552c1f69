"""Blanks the machine code for other GPUs in a CUDA library, so that it compresses to a fraction.

A library holds a fat binary for each translation unit, and that an entry for each architecture
(``fatbinary_section.h`` of the CUDA toolkit; the entries' layout as ``cuobjdump --list-elf`` shows
it). What the wanted architecture runs stays: its own machine code, or PTX that is not newer, which
the driver compiles at first use. The payload of every other entry becomes zeros in place: no
offset, header or symbol changes, and the driver reads only the entry that it picks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HOPPER = 90
MAX_PTX_NBYTES = 64 << 10  # in vLLM only that of Marlin (weights of 4 bits) is larger
_UNIT = struct.pack("<IHH", 0xBA55ED50, 1, 16)  # magic, version, length of the header
_PTX, _MACHINE_CODE = 1, 2


class Entry(NamedTuple):
    """The payload of one architecture in one unit."""

    kind: int
    arch: int
    start: int
    nbytes: int


def units(data: bytes | bytearray) -> Iterator[list[Entry]]:
    """Every fat binary of a library, as its entries. Raises ValueError for an unknown layout."""
    at = data.find(_UNIT)
    while at >= 0:
        (nbytes,) = struct.unpack_from("<Q", data, at + 8)
        end = at + 16 + nbytes
        yield list(_entries(data, at + 16, end))
        at = data.find(_UNIT, end)


def _entries(data: bytes | bytearray, at: int, end: int) -> Iterator[Entry]:
    while at < end:
        kind, _, header, nbytes = struct.unpack_from("<HHIQ", data, at)
        (arch,) = struct.unpack_from("<I", data, at + 28)
        if kind not in (_PTX, _MACHINE_CODE) or not header or at + header + nbytes > end:
            raise ValueError(f"no entry of a fat binary at byte {at}: kind {kind}, {nbytes} bytes")
        yield Entry(kind, arch, at + header, nbytes)
        at += header + nbytes


def kept(unit: list[Entry], arch: int) -> list[Entry]:
    """What of a unit this architecture runs."""
    own = [entry for entry in unit if entry.kind == _MACHINE_CODE and entry.arch == arch]
    return own or [
        entry
        for entry in unit
        if entry.kind == _PTX and entry.arch <= arch and entry.nbytes <= MAX_PTX_NBYTES
    ]


def thin(library: Path, arch: int = HOPPER) -> int:
    """Blank what ``arch`` does not run; gives the bytes that were blanked."""
    data = bytearray(library.read_bytes())
    blanked = 0
    for unit in units(data):
        wanted = kept(unit, arch)
        for entry in unit:
            if entry not in wanted:
                data[entry.start : entry.start + entry.nbytes] = bytes(entry.nbytes)
                blanked += entry.nbytes
    library.write_bytes(data)
    return blanked
