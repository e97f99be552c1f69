"""Numbers that are none: found in every type that has some, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hotweights_planner.header import BITS_OF_DTYPE
from hotweights_planner.manifest import CHUNK_NBYTES
from hotweights_storage.checkpoint import read_checkpoint
from hotweights_storage.resolve import publish
from hotweights_storage.sources.file import open_folder
from hotweights_storage.weight_values import NotFinite, all_zero


def write(path: Path, dtype: str, shape: list[int], data: bytes) -> None:
    header = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def faults(folder: Path) -> list[str]:
    with open_folder(folder) as source:
        found = read_checkpoint(source)
        values = NotFinite(found.headers)
        manifest = publish(source, "m", "v", found, look=values.look)
    return [*values.faults(), *all_zero(manifest)]


@pytest.mark.parametrize(
    ("dtype", "nbytes", "patterns", "nan", "infinite"),
    [
        ("F64", 8, [0x7FEF << 48, 0x7FF0 << 48, 0xFFF0 << 48, 0x7FF8 << 48], 1, 2),
        ("F32", 4, [0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFFC00000, 0x7F800001], 2, 1),
        ("BF16", 2, [0x7F7F, 0xFF7F, 0x8000, 0xFF80, 0x7FC0], 1, 1),
        ("F16", 2, [0x7BFF, 0xFBFF, 0x7C00, 0xFE00], 1, 1),
        ("F8_E5M2", 1, [0x7B, 0xFB, 0x7C, 0xFC, 0x7D, 0xFF], 2, 2),
        ("F8_E4M3", 1, [0x7E, 0xFE, 0x7F, 0xFF], 2, 0),
        ("F8_E8M0", 1, [0xFE, 0xFF], 1, 0),
        ("F8_E4M3FNUZ", 1, [0x7F, 0xFF, 0x80], 1, 0),
        ("F8_E5M2FNUZ", 1, [0x7F, 0xFF, 0x80], 1, 0),
    ],
)
def test_what_is_no_number_is_counted(
    tmp_path: Path, dtype: str, nbytes: int, patterns: list[int], nan: int, infinite: int
) -> None:
    data = b"".join(pattern.to_bytes(nbytes, "little") for pattern in patterns)
    write(tmp_path / "m.safetensors", dtype, [len(patterns)], data)
    assert faults(tmp_path) == [f"tensor w has {nan} NaN and {infinite} infinite values"]


@pytest.mark.parametrize("dtype", sorted(BITS_OF_DTYPE))
def test_ordinary_numbers_are_no_fault(tmp_path: Path, dtype: str) -> None:
    data = bytes([63] * 128)  # a small number in every type
    write(tmp_path / "m.safetensors", dtype, [len(data) * 8 // BITS_OF_DTYPE[dtype]], data)
    assert faults(tmp_path) == []


def test_counts_of_all_chunks_add_up(tmp_path: Path) -> None:
    numbers: Any = np.ones(CHUNK_NBYTES // 4 + 10, np.float32)
    numbers[[0, 5, -1]] = np.nan
    save_file({"w": numbers}, tmp_path / "m.safetensors")
    assert faults(tmp_path) == ["tensor w has 3 NaN and 0 infinite values"]


def test_a_matrix_of_zeros_is_told_and_a_bias_is_not(tmp_path: Path) -> None:
    save_file(
        {
            "bias": np.zeros(8, np.float32),
            "row": np.zeros((1, 8), np.float32),
            "empty": np.zeros((0, 8), np.float32),
            "zero_points": np.zeros((8, 8), np.int32),
            "small": np.zeros((8, 8), np.float16),
            "large": np.zeros((1025, 1025), np.float32),
            "nearly": np.concatenate([np.zeros((1025, 1025), np.float32), np.ones((1, 1025), "f")]),
        },
        tmp_path / "m.safetensors",
    )
    assert sorted(faults(tmp_path)) == [
        "tensor large is zero everywhere",
        "tensor small is zero everywhere",
    ]
