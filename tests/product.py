"""The folders of the product, for tests that look at all of its source: those that pyproject.toml
packs into the wheel.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BUILD = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]

FOLDERS = tuple(sorted(path.partition("/")[0] for path in _BUILD["targets"]["wheel"]["packages"]))
"""Top folders, such as ``agent``; ``hotweights`` is a package itself, the others hold one."""
