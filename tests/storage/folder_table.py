"""Writes docs/folders.md from the table of folders: `python -m tests.storage.folder_table`.

What it quotes is what `hotweights publish` says of each folder when the page is written; what vLLM
reads is what `e2e/engine/test_folder_shapes.py` holds against a real one.
"""

from __future__ import annotations

import tempfile
from itertools import groupby
from pathlib import Path

from hotweights_common.errors import HotweightsError
from hotweights_storage.checkpoint import read_checkpoint
from hotweights_storage.sources.base import Root
from hotweights_storage.sources.file import FileOpener, open_folder
from hotweights_storage.sources.folder import FileSource
from tests.storage.folder_shapes import SHAPES, Shape

PAGE = Path(__file__).parents[2] / "docs" / "folders.md"
_HEAD = """\
# Which folders can be published

`hotweights publish` takes the weights that a vLLM boots from, or refuses the folder and says what to do. {count} kinds of folders that
people have, as it answers today (`python -m tests.storage.folder_table` writes this page); the last column is what a vLLM reads that is
started cold on the same folder ([how that is asked](../e2e/engine/test_folder_shapes.py)). `--ignore` and `--lenient` are options of
`publish`; vLLM knows neither, and is asked about the folder without what is ignored.
"""


def page() -> str:
    """The whole of docs/folders.md."""
    lines = [_HEAD.format(count=len(SHAPES))]
    for kind, shapes in groupby(SHAPES, key=lambda shape: shape.kind):
        lines += [f"## {kind.capitalize()}", ""]
        lines += ["| the folder has | publish | a cold vLLM |", "|---|---|---|"]
        lines += [f"| {_named(shape)} | {_answer(shape)} | {_vllm(shape)} |" for shape in shapes]
        lines += [""]
    return "\n".join(lines)


def opened(shape: Shape, folder: Path) -> FileSource:
    """The folder as an agent or a user opens it. Raises what these do."""
    if not shape.root:
        return open_folder(folder)
    return FileOpener([Root((folder / shape.root).resolve())]).open(folder.as_uri(), "any")


def _named(shape: Shape) -> str:
    options = [f"--ignore '{pattern}'" for pattern in shape.ignore]
    options += ["--lenient"] if shape.lenient else []
    return shape.name + (f", with `{' '.join(options)}`" if options else "")


def _answer(shape: Shape) -> str:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made).resolve() / "models" / "snapshot"
        folder.mkdir(parents=True)
        shape.build(folder)
        try:
            with opened(shape, folder) as source:
                found = read_checkpoint(source, shape.ignore, shape.lenient)
        except HotweightsError as error:
            said, verdict = str(error), "**refused**: "
        else:
            said, verdict = "; ".join(found.notes), "taken: " if found.notes else "taken"
        for path in (folder, folder.parent, folder.parent.parent):
            said = said.replace(path.as_uri(), "file:///…").replace(str(path), "…")
    return verdict + said.replace("|", "\\|").replace("<", "&lt;")


def _vllm(shape: Shape) -> str:
    if shape.vllm == "" or (shape.vllm is None and shape.refused):
        return "refuses it"
    if shape.vllm is None:
        return "reads the same"
    return "reads it" if shape.refused else "reads something else"


if __name__ == "__main__":
    PAGE.write_text(page())
