"""Builds the virtual environment with vLLM's CPU build, once per set of pinned requirements: of the
newest release, or of the one that HOTWEIGHTS_VLLM names (`releases`).

It is built under a temporary name beside its place, moved there with one rename, and guarded by a
file lock: an interrupted build leaves nothing that a later run could mistake for a finished one,
and two test runs at a time build once. A virtual environment does not survive a rename by itself
(its scripts name their interpreter), so nothing here uses its scripts: only `bin/python`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from localvllm import releases

VLLM_VERSION = releases.NEWEST
UV_VERSION = "0.13.9"
PYTHON_VARIABLE = "HOTWEIGHTS_VLLM_PYTHON"
COMPILED = "compiled"  # a file in an environment, all of which is


class BuildError(RuntimeError):
    """The environment could not be built; the message says what failed and what to try."""


def cache() -> Path:
    """The folder for whatever is expensive to build and safe to delete."""
    return Path(os.environ.get("HOTWEIGHTS_CACHE") or Path.home() / ".cache" / "hotweights")


def release() -> str:
    """The release to build and to run. Raises `BuildError` for one that is not known."""
    named = os.environ.get("HOTWEIGHTS_VLLM") or releases.NEWEST
    if named not in releases.PINS:
        raise BuildError(f"HOTWEIGHTS_VLLM is {named!r}: choose from {', '.join(releases.PINS)}")
    return named


def recipe() -> str:
    """What is installed, as a requirements file. Raises `BuildError` as `release` does."""
    return releases.requirements(release())


def key() -> str:
    """Names a build by what goes into it: another pin or another interpreter is another folder."""
    inputs = recipe() + f"{sys.version_info[:2]} {os.uname().machine}"
    return hashlib.sha256(inputs.encode()).hexdigest()[:12]


def location() -> Path:
    return cache() / f"vllm-{key()}"


def python() -> Path:
    """The interpreter that has vLLM: the one that HOTWEIGHTS_VLLM_PYTHON names (a GPU machine's,
    or that of another release), else this build's own (after `ensure`).
    """
    given = os.environ.get(PYTHON_VARIABLE)
    return Path(given) if given else ensure() / "bin" / "python"


def ensure(compiled: bool = True) -> Path:
    """The finished environment's folder; builds it when it is not there (minutes, several
    gigabytes).

    Three processes per start would otherwise each compile torch, transformers and vLLM, so all of
    it is compiled, unless it is not to be ``compiled``: for a single start it takes a quarter of
    the time to compile what that start imports, as Python does by itself.
    """
    place = location()
    # an older release is started a few times, and needs a tenth of what compiling all takes
    compiled = compiled and release() == VLLM_VERSION
    if _is_there(place, compiled):
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place.with_suffix(".lock")):
        if not place.is_dir():
            # We hold the lock: whatever lies there is of a build that was interrupted.
            for rest in place.parent.glob(f"{place.name}.building-*"):
                shutil.rmtree(rest, ignore_errors=True)
            _build(place)
        if not _is_there(place, compiled):
            _compile(place)
    return place


def _is_there(place: Path, compiled: bool) -> bool:
    return (place / COMPILED if compiled else place).exists()


def _build(place: Path) -> None:
    partial = place.with_name(f"{place.name}.building-{os.getpid()}")
    started = time.monotonic()
    _say(f"building vLLM {release()} for CPUs in {place} (once; about 6 GB)")
    try:
        uv = _uv(partial)
        _run(
            [*uv, "venv", "--quiet", "--python", sys.executable, str(partial)],
            "create the virtual environment",
        )
        interpreter = partial / "bin" / "python"
        requirements = partial / "requirements.txt"
        requirements.write_text(recipe())
        # No dependencies: the file lists them all, and vLLM's own metadata would bring back what
        # must be absent.
        install = ["pip", "install", "--python", str(interpreter), "--no-deps"]
        _run([*uv, *install, "--requirement", str(requirements)], "install the pinned packages")
        _say("checking that it imports")
        _run([str(interpreter), "-c", "import torch, vllm"], "import vLLM")
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(_uv_home(partial), ignore_errors=True)
    _say(f"ready after {time.monotonic() - started:.0f} s")


def _compile(place: Path) -> None:
    _say("compiling all of it")
    # quiet: some packages ship templates that look like modules
    program = f"import compileall; compileall.compile_dir({str(place)!r}, quiet=2, workers=0)"
    _run([str(place / "bin" / "python"), "-c", program], "compile it")
    (place / COMPILED).touch()


def _uv(partial: Path) -> list[str]:
    """uv from where it already is, else a pinned one from PyPI inside the unfinished build."""
    for candidate in (Path(sys.executable).with_name("uv"), shutil.which("uv")):
        if candidate and Path(candidate).is_file():
            return [str(candidate)]
    _say(f"fetching uv {UV_VERSION}")
    home = _uv_home(partial)
    _run([sys.executable, "-m", "venv", str(home)], "create an environment for uv")
    _run(
        [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", f"uv=={UV_VERSION}"],
        "fetch uv",
    )
    return [str(home / "bin" / "uv")]


def _uv_home(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}-uv")


def _run(command: list[str], what: str) -> None:
    # uv hard-links from its cache where it can; copying 6 GB is the fallback that it announces as a
    # warning.
    result = subprocess.run(
        command, check=False, stdout=sys.stderr, env={**os.environ, "UV_LINK_MODE": "hardlink"}
    )
    if result.returncode:
        raise BuildError(
            f"could not {what} (exit {result.returncode}, output above); it left nothing, run it "
            "again"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another build of the same environment")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    print(f"[localvllm] {line}", file=sys.stderr, flush=True)
