"""Small checkpoints, and the plans between them, as `publish` and `plan` make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from hotweights_planner.manifest import FILE_NAME, Manifest
from hotweights_planner.plan import Plan
from hotweights_planner.plan import build as build_plan
from hotweights_storage.resolve import publish
from hotweights_storage.sources.file import open_folder


def checkpoint(folder: Path, version: str, value: float, rows: int = 64) -> Manifest:
    """Two tensors, of which one has ``value`` everywhere and the other is the same in all versions;
    and a side file.
    """
    folder.mkdir(parents=True)
    tensors: dict[str, Any] = {
        "head": np.full((rows, 64), value, np.float32),
        "body": np.arange(rows * 256, dtype=np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    with open_folder(folder) as source:
        manifest = publish(source, "m", version)
    (folder / FILE_NAME).write_bytes(manifest.canonical)
    return manifest


def plan(folder: Path, manifest: Manifest, base: Manifest | None = None) -> Plan:
    """What leads from ``base`` to the version in ``folder``."""
    return build_plan(manifest, base, folder.resolve().as_uri())
