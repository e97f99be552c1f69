"""What becomes of mutants: for each a copy of the operator's package with it, and the tests and the
simulator on that copy.

The working tree is never changed. The copy comes first on the path of a process of its own, and
that process makes sure that it is the copy that was imported. These processes are forked from this
one, which has imported all but the operator: most of what a test takes is imports, and a few
hundred times that would be an hour.
"""

from __future__ import annotations

import compileall
import os
import pkgutil
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import pytest

from tests.operator.mutants.listing import PACKAGE, Misfit, Mutant

ROOT = Path(__file__).parents[3]
TESTS = Path("tests/operator")
LIMIT_SECONDS = 900.0
"""A mutant that runs for so long has hung, and so it is known. One that never waits is known by its
CPU time.
"""
CPU_SECONDS = 90

_UNSUITABLE = frozenset(
    # slow, these very tests, and figures
    {"sim/test_simulation.py", "test_mutations.py", "test_bench_reconcile.py"}
)
_SLOWEST = ("runtime/test_informers.py", "model/test_observed.py")


_NOTHING = Mutant("nothing", "__init__.py", "", "It is the operator as it is.", '"""', '"""')


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a mutant."""

    mutant: Mutant
    killed_by: str  # empty: it survived
    seconds: float

    @property
    def summary(self) -> str:
        """One line."""
        if self.mutant.equivalent:
            return f"equivalent  {self.mutant.name}: {self.killed_by or self.mutant.equivalent}"
        verdict = "killed  " if self.killed_by else "SURVIVED"
        return f"{verdict}    {self.mutant.name}: {self.killed_by or self.mutant.wrong}"


@dataclass(slots=True)
class _Running:
    """A process that tries a mutant out, in a folder of its own."""

    mutant: Mutant
    folder: tempfile.TemporaryDirectory[str]
    began: float = field(default_factory=time.monotonic)


def suitable() -> list[str]:
    """The test files that need no API server, the quick ones first."""
    files = {
        str(path.relative_to(ROOT / TESTS)): path for path in (ROOT / TESTS).rglob("test_*.py")
    }
    unit = [
        name
        for name, path in files.items()
        if name not in _UNSUITABLE and "pytest.mark.apiserver" not in path.read_text()
    ]
    return sorted(unit, key=lambda name: (name in _SLOWEST, name))


@contextmanager
def snapshot() -> Iterator[Path]:
    """The operator's package as it is now: whoever edits it meanwhile does not change what is
    tried.
    """
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        package = Path(name) / PACKAGE.name
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(package, quiet=1)
        yield package


def try_out(
    mutants: Sequence[Mutant],
    original: Path,
    jobs: int,
    seeds: int = 0,
    *,
    recorded: bool = False,
    quick: bool = False,
) -> Iterator[Verdict]:
    """So many at a time: all suitable test files, the recorded killer first (or that one alone, or
    without the slowest), then so many seeds. Raises `Misfit` where nothing could be tried, as when
    tests fail without any mutant.
    """
    _warm()
    killers = sorted({mutant.killer for mutant in mutants}) if recorded else [""]
    nothing = [replace(_NOTHING, killer=killer) for killer in killers]
    for verdict in _try_out(nothing, original, jobs, seeds, recorded=recorded, quick=quick):
        if verdict.killed_by:
            raise Misfit(f"the tests fail without any mutant: {verdict.killed_by}")
    yield from _try_out(mutants, original, jobs, seeds, recorded=recorded, quick=quick)


def _try_out(
    mutants: Sequence[Mutant], original: Path, jobs: int, seeds: int, *, recorded: bool, quick: bool
) -> Iterator[Verdict]:
    waiting = list(reversed(mutants))
    running: dict[int, _Running] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            folder = _copy(original, mutant)
            others = (
                []
                if recorded
                else [file for file in suitable() if not quick or file not in _SLOWEST]
            )
            rounds = [
                [mutant.killer] if mutant.killer else [],
                [file for file in others if file != mutant.killer],
            ]
            running[_fork(Path(folder.name), rounds, seeds)] = _Running(mutant, folder)
        time.sleep(0.02)
        for pid, known in list(running.items()):
            seconds = time.monotonic() - known.began
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended and seconds < LIMIT_SECONDS:
                continue
            if not ended:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
            del running[pid]
            said = (Path(known.folder.name) / "said").read_text()
            known.folder.cleanup()
            reason = f"time: more than {LIMIT_SECONDS:.0f} s"
            yield Verdict(
                known.mutant, _reason(known.mutant, status, said) if ended else reason, seconds
            )


def _warm() -> None:
    """Import what the operator and its tests import, and forget the operator."""
    for module in pkgutil.walk_packages([str(PACKAGE)], f"{PACKAGE.name}."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    for name in (
        "hypothesis.stateful",
        "pytest_asyncio.plugin",
        "xdist.plugin",
        "pytest_timeout",
        "_pytest.junitxml",
    ):
        import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE.name]:
        del sys.modules[name]


def _copy(original: Path, mutant: Mutant) -> tempfile.TemporaryDirectory[str]:
    """A folder with the package, changed."""
    folder = tempfile.TemporaryDirectory(prefix="mutant-")
    package = Path(folder.name) / PACKAGE.name
    shutil.copytree(original, package)
    changed = package / mutant.file
    if mutant.name != _NOTHING.name:
        changed.write_text(mutant.applied(changed.read_text()))
    for compiled in (changed.parent / "__pycache__").glob(f"{changed.stem}.*"):
        compiled.unlink()
    return folder


def _fork(folder: Path, rounds: Sequence[Sequence[str]], seeds: int) -> int:
    """The process that runs the tests in these files, one round after the other, and then the
    seeds, and ends with pytest's code, or 8.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 8
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS + seeds, CPU_SECONDS + seeds))
        said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.chdir(ROOT)
        # what fails here is no news for others
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
        sys.path.insert(0, str(folder))
        if import_module(PACKAGE.name).__file__ == str(folder / PACKAGE.name / "__init__.py"):
            code = next(
                (bad for files in rounds if files and (bad := _run_tests(files))), 0
            ) or _simulate(seeds)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _run_tests(files: Sequence[str]) -> int:
    options = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--assert=plain",
        "--tb=line",
        "--timeout=300",
        "--hypothesis-seed=1",
    ]
    return int(pytest.main([*options, *(str(TESTS / file) for file in files)]))


def _simulate(seeds: int) -> int:
    """0, or whatever a story ends with is raised."""
    if not seeds:
        return 0
    simulate = import_module(f"{PACKAGE.name}.sim.run").simulate
    for seed in range(seeds):
        try:
            simulate(seed)
        except BaseException as error:
            print(f"\nSEED {getattr(error, 'name', type(error).__name__)!r}, seed {seed}")
            raise
    return 0


def _reason(mutant: Mutant, status: int, said: str) -> str:
    """What killed it; empty: nothing."""
    if not os.WIFEXITED(status):
        return f"signal {os.WTERMSIG(status)}"
    if (code := os.WEXITSTATUS(status)) == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) tests/operator/(\S+)|^SEED (.*)", said, re.MULTILINE)
    if found is None and "Timeout" in said:
        return "time: a test runs for more than 300 s"
    if found is None:
        raise Misfit(f"{mutant.name}: it could not be tried (exit code {code}): {said[-3000:]}")
    return found[1] or found[2]
