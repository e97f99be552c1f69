"""Two versions of an architecture, and what lies between them: written once, kept in the cache."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from e2e.engine import images
from e2e.zoo.architectures import Architecture
from localcluster import paths
from localvllm import build, models

MAKE_SECONDS = 1200.0  # of another run that writes the same; most of it imports
LAYER = re.compile(r"^(.*?\.)(\d+)\.")  # the outermost list that a tensor is in


def versions(architecture: Architecture) -> dict[str, Path]:
    """All three, by the names that `row.STEPS` has for them."""
    return {
        "v0": version(architecture, 0),
        "v1": version(architecture, 1),
        "delta": delta(architecture),
    }


def version(architecture: Architecture, seed: int) -> Path:
    """Raises `build.BuildError` with what the model's constructor said."""
    folder = _place(architecture, str(seed))
    with paths.locked(_lock(folder), f"writing {folder.name}", MAKE_SECONDS):
        models.make_models(
            [
                models.Model(
                    folder,
                    architecture.name,
                    seed,
                    config_class=architecture.config_class,
                    settings=architecture.settings,
                    scale=architecture.scale,
                )
            ]
        )
    return folder


def delta(architecture: Architecture) -> Path:
    """Version 0 with the last layer's tensors of version 1: what a trainer changes who freezes the
    rest.
    """
    old, new = version(architecture, 0), version(architecture, 1)
    folder = _place(architecture, "delta")
    with paths.locked(_lock(folder), f"writing {folder.name}", MAKE_SECONDS):
        if not folder.exists():
            beside = folder.with_name(f"{folder.name}.new")
            shutil.copytree(old, beside, dirs_exist_ok=True)
            images.overwrite(beside, last_layer(images.read(new)))
            beside.rename(folder)
    return folder


def last_layer(tensors: list[images.Tensor]) -> list[images.Tensor]:
    """Those of the last item of each list of layers: a model that sees has two of them."""
    found = [(LAYER.match(tensor.name), tensor) for tensor in tensors]
    last: dict[str, int] = {}
    for match, _ in found:
        if match:
            last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    layer = [tensor for match, tensor in found if match and int(match[2]) == last[match[1]]]
    if not layer:
        raise ValueError("no tensor's name has the number of a layer: no part can be changed alone")
    return layer


def _place(architecture: Architecture, name: str) -> Path:
    return build.cache() / "zoo" / f"{architecture.name}-{architecture.digest}-{name}"


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
