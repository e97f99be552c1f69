"""Lays a bundle over the packages that a machine has: an environment whose `bin/python` finds
vLLM, these tests' needs, and behind them everything that was there.

For the standard library alone. What an earlier call assembled stays.
"""

from __future__ import annotations

import compileall
import lzma
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

READY = ".assembled"


def assemble(bundle: Path, place: Path) -> Path:
    """The environment's interpreter. Raises FileNotFoundError without a bundle there."""
    python = place / "venv" / "bin" / "python"
    if (place / READY).exists():
        return python
    parts = sorted(bundle.glob("*.tar.xz"))
    if not parts:
        raise FileNotFoundError(f"no *.tar.xz in {bundle}; make one: python -m gpu pack {bundle}")
    shutil.rmtree(place, ignore_errors=True)
    site = place / "site"
    site.mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(_unpack, parts, [site] * len(parts)))
    # compiled now: else each of an engine's three processes would do it
    compileall.compile_dir(site, quiet=2, workers=0)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "venv")], check=True)
    behind = sysconfig.get_paths()["purelib"]
    line = f"import site, sys; sys.path.append({str(site)!r}); site.addsitedir({behind!r})\n"
    (purelib,) = (place / "venv" / "lib").glob("python*/site-packages")
    (purelib / "gpu.pth").write_text(line)
    (place / READY).touch()
    return python


def _unpack(part: Path, site: Path) -> None:
    with lzma.open(part) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        archive.extractall(site, filter="data")
