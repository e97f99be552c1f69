"""`make tour`, as a newcomer runs it: its account holds, and nothing of it is left. What it says of
machines and steps that fail is in tests/e2e/test_tour.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.engine.seed_world import ROOT
from e2e.tour import processes
from tests.ports import free_ports

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
TOUR_SECONDS = 900


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The tour's own; what a test that failed left running there is ended."""
    yield tmp_path / "t"
    processes.end(reversed(processes.recorded(tmp_path / "t")))


def tour(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "e2e.tour", *map(str, arguments)],
        cwd=ROOT,
        env=dict(os.environ),
        check=False,
        capture_output=True,
        text=True,
        timeout=TOUR_SECONDS,
    )


def test_the_tour_shows_what_it_promises_and_keeps_or_leaves_nothing(folder: Path) -> None:
    first, *_ = free_ports(5)
    done = tour("--keep", "--folder", folder, "--first-port", str(first))
    logs = "".join(path.read_text(errors="replace")[-3000:] for path in folder.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    assert re.search(
        r"^to v1 +\d+ ms +\S+ s +those of a cold vLLM on v1$", done.stdout, re.MULTILINE
    )
    assert re.search(r"^to v0 +\d+ ms +\S+ s +those from before$", done.stdout, re.MULTILINE)
    assert re.search(r"^clients +[1-9]\d* requests, 0 failed", done.stdout, re.MULTILINE)
    # what it shows to be typed after it works
    (status,) = re.findall(
        r"^  (\.venv/bin/hotweights coord-status .*)$", done.stdout, re.MULTILINE
    )
    shown = subprocess.run(
        status.split(), cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    assert "1 engine" in shown.stdout
    (ask,) = re.findall(r"^  (curl http://\S+/v1/completions .*)$", done.stdout, re.MULTILINE)
    assert f":{first + 4}/" in ask
    assert (
        "runs already (coordinator, worker, vllm): end it with" in tour("--folder", folder).stderr
    )
    assert processes.recorded(folder)
    assert tour("--end", "--folder", folder).stdout == "ended: coordinator, worker, vllm\n"
    assert processes.recorded(folder) == []
