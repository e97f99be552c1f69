"""Folders that people have: what is published is what a cold vLLM reads, tensor by tensor; where it
is something else, the table says so.
"""

from __future__ import annotations

import json
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

import localvllm
from e2e.engine import inside
from hotweights.adapters.vllm.rank.fit import dry_load
from hotweights.adapters.vllm.rank.table import TORCH_NAMES, torch_shape
from hotweights_storage.checkpoint import read_checkpoint
from hotweights_storage.sources.file import open_folder
from tests.storage.folder_shapes import SHAPES, Shape

SECONDS = 300.0  # importing vLLM takes most of it
Found = dict[str, list[tuple[str, str, list[int]]] | None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every shape of the table, built; without what is ignored, which vLLM knows nothing of."""
    built = {}
    for number, shape in enumerate(SHAPES):
        folder = tmp_path_factory.mktemp("shapes") / str(number)
        folder.mkdir()
        shape.build(folder)
        for pattern in shape.ignore:
            for path in list(folder.iterdir()):  # glob passes over dangling links
                if fnmatchcase(path.name, pattern):
                    path.unlink()
        built[shape.name] = folder
    return built


@pytest.fixture(scope="module")
def cold(folders: dict[str, Path]) -> Found:
    """What one process of vLLM reads of them."""
    script = Path(inside.__path__[0]) / "weight_files.py"
    done = subprocess.run(
        [str(localvllm.python()), str(script)],
        input=json.dumps([str(folder) for folder in folders.values()]),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {name: found[str(folder)] for name, folder in folders.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_vllm_reads_what_the_table_says(cold: Found, shape: Shape) -> None:
    found = cold[shape.name]
    expected = shape.tensors if shape.vllm is None else shape.vllm
    assert "".join(sorted(name for name, _, _ in found or ())) == "".join(sorted(expected))
    assert (found is None) == (not expected)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.vllm != ""], ids=lambda shape: shape.name)
def test_an_engines_measure_is_what_it_booted_from(
    cold: Found, folders: dict[str, Path], shape: Shape
) -> None:
    """What a version's tensors are held against is read by the plugin itself, after the boot."""
    booted = {name for name, _, _ in cold[shape.name] or ()}
    assert dry_load.read_checkpoint(folders[shape.name]).keys() == booted


@pytest.mark.parametrize(
    "shape", [s for s in SHAPES if s.tensors and s.vllm is None], ids=lambda shape: shape.name
)
def test_what_is_published_is_what_vllm_reads(
    cold: Found, folders: dict[str, Path], shape: Shape
) -> None:
    with open_folder(folders[shape.name]) as source:
        found = read_checkpoint(source, lenient=shape.lenient)
    published = [
        (entry.name, TORCH_NAMES[entry.dtype], list(torch_shape(entry.dtype, entry.shape)))
        for entries in found.headers.values()
        for entry in entries
    ]
    assert sorted(published) == sorted(tuple(tensor) for tensor in cold[shape.name] or ())
