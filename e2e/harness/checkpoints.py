"""Broken and odd checkpoints, made from a good one by editing its bytes: what bad days bring."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
Header = dict[str, Any]


def copy(good: Path, name: str) -> Path:
    """A fresh copy beside ``good``."""
    target = good.with_name(name)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(good, target)
    (target / "hotweights.manifest.json").unlink(missing_ok=True)  # it is another version
    return target


def flip_byte(checkpoint: Path, tensor: str = "") -> tuple[str, int]:
    """Flip one bit in a tensor's middle; its name and the byte's offset in the file."""
    header, start, _ = _parts(checkpoint)
    name = tensor or sorted(key for key in header if key != "__metadata__")[0]
    begin, end = header[name]["data_offsets"]
    offset = start + (begin + end) // 2
    with (checkpoint / WEIGHTS).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    return name, offset


def truncate(checkpoint: Path, nbytes: int = 1000) -> None:
    """Cut the last bytes off."""
    path = checkpoint / WEIGHTS
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - nbytes)


def edit_header(checkpoint: Path, change: Callable[[Header], None]) -> None:
    """Rewrite the header; the data stays as it is."""
    header, _, data = _parts(checkpoint)
    change(header)
    body = json.dumps(header).encode()
    body += b" " * (-len(body) % 8)
    (checkpoint / WEIGHTS).write_bytes(struct.pack("<Q", len(body)) + body + data)


def rename_tensor(checkpoint: Path, old: str, new: str) -> None:
    """The same bytes under another name."""

    def change(header: Header) -> None:
        header[new] = header.pop(old)

    edit_header(checkpoint, change)


def transpose(checkpoint: Path, tensor: str) -> None:
    """The same bytes in the reversed shape."""

    def change(header: Header) -> None:
        header[tensor]["shape"] = header[tensor]["shape"][::-1]

    edit_header(checkpoint, change)


def claim_header_of(checkpoint: Path, nbytes: int) -> None:
    """A header that says it is so long."""
    with (checkpoint / WEIGHTS).open("r+b") as file:
        file.write(struct.pack("<Q", nbytes))


def _parts(checkpoint: Path) -> tuple[Header, int, bytes]:
    raw = (checkpoint / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header: Header = json.loads(raw[8 : 8 + length])
    return header, 8 + length, raw[8 + length :]
