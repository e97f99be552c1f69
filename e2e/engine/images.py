"""A version's image from a checkpoint folder, as small as possible: memfds and a table, for tests
that have no agent.

Chunks are laid out so that the plugin has to earn its tensors: they alternate between two slabs, so
every larger tensor has several extents.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hotweights_planner.manifest import Manifest
from hotweights_storage import image as storage
from hotweights_storage.resolve import publish
from hotweights_storage.sources.file import open_folder
from hotweights_storage.stage import stage_from_source

PAGE = 4096
CHUNK = 64 * 1024
F_ADD_SEALS = 1033
ALL_SEALS = 0x1 | 0x2 | 0x4 | 0x8


@dataclass
class Tensor:
    name: str
    dtype: str
    shape: list[int]
    data: bytes = field(repr=False)


@dataclass
class Image:
    digest: str
    table: dict[str, Any] = field(repr=False)
    fds: list[int]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []


def read(folder: Path) -> list[Tensor]:
    """The checkpoint's tensors in load order: by file, then by offset."""
    tensors = []
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, item in sorted(header.items(), key=lambda entry: entry[1]["data_offsets"]):
            begin, end = item["data_offsets"]
            tensors.append(
                Tensor(
                    name, item["dtype"], item["shape"], data[8 + length + begin : 8 + length + end]
                )
            )
    return tensors


def overwrite(folder: Path, tensors: Sequence[Tensor]) -> None:
    """Put other values into a checkpoint's tensors, where they lie."""
    data = {tensor.name: tensor.data for tensor in tensors}
    for file in folder.glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        (length,) = struct.unpack_from("<Q", content)
        for name, item in json.loads(content[8 : 8 + length]).items():
            if name in data:
                begin, end = (8 + length + offset for offset in item["data_offsets"])
                assert end - begin == len(data[name]), f"{name} has another size"
                content[begin:end] = data.pop(name)
        file.write_bytes(content)
    assert not data, f"{folder} has no {sorted(data)}"


def stage(folder: Path, version: str) -> storage.Image:
    """A checkpoint as the agent itself lays it out: for those that are too large for `build`."""
    with open_folder(folder) as source:
        manifest = publish(source, folder.name, version)
        with storage.ImageBuilder(manifest) as builder:
            stage_from_source(source, builder)
            return builder.finish()


def combine(old: storage.Image, new: storage.Image, names: set[str], version: str) -> storage.Image:
    """The old version with these tensors of the new one; it takes no memory of its own."""
    theirs = {tensor.name: tensor for tensor in new.manifest.tensors if tensor.name in names}
    tensors = tuple(theirs.get(tensor.name, tensor) for tensor in old.manifest.tensors)
    mine = old.manifest
    manifest = Manifest(
        model=mine.model,
        version=version,
        chunk_bytes=mine.chunk_bytes,
        tensors=tensors,
        files=mine.files,
        probes=mine.probes,
    )
    with storage.ImageBuilder(manifest, {**new.chunks, **old.chunks}) as builder:
        return builder.finish()


def handed(image: storage.Image) -> Image:
    """As an agent hands it over. Its descriptors are the image's."""
    return Image(image.manifest.digest, json.loads(image.table_json), [*image.fds])


def build(
    tensors: list[Tensor],
    probes: list[dict[str, Any]] | None = None,
    version: str = "v1",
    files: Sequence[dict[str, str]] = (),
) -> Image:
    """Seal the tensors into two slabs; the digest is of their contents, as a manifest's would be.
    ``files`` are the table's.
    """
    slabs = [bytearray(), bytearray()]
    entries, digest = [], hashlib.sha256(json.dumps([version, probes]).encode())
    for tensor in tensors:
        extents = []
        for number, start in enumerate(range(0, len(tensor.data), CHUNK)):
            chunk, slab = tensor.data[start : start + CHUNK], number % 2
            extents.append([slab, len(slabs[slab]), len(chunk)])
            slabs[slab] += chunk + bytes(-len(chunk) % PAGE)
        digest.update(f"{tensor.name}{tensor.dtype}{tensor.shape}".encode() + tensor.data)
        entries.append(
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "nbytes": len(tensor.data),
                "content": hashlib.sha256(tensor.data).hexdigest(),
                "extents": extents,
            }
        )
    name = f"sha256:{digest.hexdigest()}"
    table = {"digest": name, "version": version, "tensors": entries, "probes": probes or []}
    table["files"] = list(files)
    return Image(name, table, [sealed(json.dumps(table).encode()), *map(sealed, slabs)])


def sealed(data: bytes | bytearray, seals: int = ALL_SEALS) -> int:
    fd = os.memfd_create("hotweights-test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(fd, data)
    fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd
