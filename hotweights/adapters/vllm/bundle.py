"""Writes the folder that goes on ``PYTHONPATH`` of a stock vLLM image: the modules, metadata by
which vLLM finds their entry points, and what Python runs at its start so that vLLM loads them.

    python -m hotweights.adapters.vllm.bundle DEST

DEST becomes complete at once or not at all (an agent may be killed in between), and an existing one
of the same content stays as it is. Parents' ``__init__`` files are written empty: the real ones may
import what is not in the image.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from hotweights.adapters.vllm import ENDPOINT_PLUGIN, GENERAL_PLUGIN, PLUGIN_VERSION, startup
from hotweights_common import cgroups, memory
from hotweights_transports import handoff

PACKAGE = "hotweights/adapters/vllm"
ENTRY_POINTS = f"""\
[vllm.general_plugins]
{GENERAL_PLUGIN} = hotweights.adapters.vllm.plugin:register

[vllm.endpoint_plugins]
{ENDPOINT_PLUGIN} = hotweights.adapters.vllm.server:Plugin
"""
METADATA = f"""\
Metadata-Version: 2.1
Name: hotweights-vllm
Version: {PLUGIN_VERSION}
Summary: Puts new weights into this vLLM while it runs.
"""


def contents() -> dict[str, str]:
    """Every file of the bundle, by its path in it."""
    information = f"hotweights_vllm-{PLUGIN_VERSION}.dist-info"
    return {
        "hotweights/__init__.py": "",
        "hotweights/adapters/__init__.py": "",
        **_modules(Path(__file__).parent, PACKAGE),
        "hotweights_common/__init__.py": "",
        "hotweights_common/cgroups.py": Path(cgroups.__file__).read_text(),
        "hotweights_common/memory.py": Path(memory.__file__).read_text(),
        "hotweights_transports/__init__.py": "",
        **_modules(Path(handoff.__file__).parent, "hotweights_transports/handoff"),
        "sitecustomize.py": Path(startup.__file__).read_text(),
        f"{information}/METADATA": METADATA,
        f"{information}/entry_points.txt": ENTRY_POINTS,
    }


def _modules(folder: Path, name: str) -> dict[str, str]:
    """The modules beneath a folder, by their paths in the bundle."""
    return {
        f"{name}/{path.relative_to(folder)}": path.read_text()
        for path in sorted(folder.rglob("*.py"))
    }


def write(destination: Path) -> Path:
    """Write the bundle, readable by every user (vLLM may not run as root). Gives ``destination``.
    Raises OSError.
    """
    files = contents()
    if _is_written(destination, files):
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    # beside it: a rename works within one file system only
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        for name, text in files.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        _open_to_all(partial)  # before it is there to be read; mkdtemp makes a folder of mode 0700
        _replace(partial, destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return destination


def _is_written(destination: Path, files: dict[str, str]) -> bool:
    try:
        return all((destination / name).read_text() == text for name, text in files.items())
    except (OSError, UnicodeDecodeError):
        return False


def _open_to_all(folder: Path) -> None:
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _replace(partial: Path, destination: Path) -> None:
    """A folder cannot be renamed over one with content: the old one steps aside first."""
    if destination.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old.", dir=destination.parent))
        os.rename(destination, aside / "old")  # noqa: PTH104 - the two renames belong together
        partial.rename(destination)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        partial.rename(destination)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hotweights.adapters.vllm.bundle", description=__doc__
    )
    parser.add_argument("destination", type=Path, metavar="DEST")
    arguments = parser.parse_args()
    print(write(arguments.destination))
    return 0


if __name__ == "__main__":
    sys.exit(main())
