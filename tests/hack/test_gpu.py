"""What `make gpu` does that needs no GPU: libraries made thin, steps that end when their time is
up, and results that an interrupted run goes on from.
"""

from __future__ import annotations

import struct
import sys
import tarfile
from pathlib import Path

import pytest

from gpu import assemble, pack, run, thin

PTX, CODE = 1, 2


def _library(units: list[list[tuple[int, int, int]]]) -> bytes:
    """Units of (kind, architecture, payload's bytes), with something before and between them."""
    data = b"ELF and more"
    for number, unit in enumerate(units):
        entries = b""
        for kind, arch, nbytes in unit:
            header = struct.pack("<HHIQ", kind, 0, 64, nbytes).ljust(28, b"h")
            header = (header + struct.pack("<I", arch)).ljust(64, b"h")
            entries += header + bytes([65 + number]) * nbytes
        data += struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries + b"between"
    return data


@pytest.mark.parametrize(
    ("unit", "kept"),
    [
        ([(CODE, 80, 10), (CODE, 90, 20), (PTX, 80, 5)], [(CODE, 90)]),
        ([(CODE, 80, 10), (PTX, 80, 5), (PTX, 100, 7)], [(PTX, 80)]),
        ([(CODE, 100, 10), (PTX, 100, 7)], []),
        ([(PTX, 80, thin.MAX_PTX_NBYTES + 1)], []),
    ],
)
def test_a_thin_library_keeps_what_this_gpu_runs_and_every_offset(
    tmp_path: Path, unit: list[tuple[int, int, int]], kept: list[tuple[int, int]]
) -> None:
    path = tmp_path / "library.so"
    whole = _library([unit, [(CODE, 90, 3)]])
    path.write_bytes(whole)
    blanked = thin.thin(path)
    found = path.read_bytes()
    assert len(found) == len(whole)
    (first, second) = thin.units(found)
    assert [(e.kind, e.arch) for e in first if any(found[e.start : e.start + e.nbytes])] == kept
    assert all(any(found[e.start : e.start + e.nbytes]) for e in second)
    gone = [entry for entry in first if (entry.kind, entry.arch) not in kept]
    assert blanked == sum(entry.nbytes for entry in gone)
    for entry in gone:  # and nothing else has changed
        whole = whole[: entry.start] + bytes(entry.nbytes) + whole[entry.start + entry.nbytes :]
    assert found == whole


def test_an_unknown_layout_is_an_error() -> None:
    broken = bytearray(_library([[(CODE, 90, 8)]]))
    broken[broken.index(b"h") - 16] = 9
    with pytest.raises(ValueError, match="no entry of a fat binary at byte"):
        list(thin.units(broken))


def test_a_bundle_names_what_vllm_and_the_tests_need() -> None:
    wanted = pack.requirements()
    assert len(wanted) > 40
    assert all(name.count("==") == 1 for name in wanted)
    assert len({name.partition("==")[0] for name in wanted}) == len(wanted)


def test_what_a_bundle_holds_is_importable_beside_what_was_there(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "packages.tar.xz", "w:xz") as archive:
        module = tmp_path / "only_in_the_bundle.py"
        module.write_text("import pytest; WORD = 'here'\n")
        archive.add(module, module.name)
    python = assemble.assemble(tmp_path, tmp_path / "place")
    script = "import only_in_the_bundle as m; print(m.WORD)"
    step = run.Step("import", ("-c", script), 50)
    assert run.run(step, python, tmp_path)["passed"]
    assert (tmp_path / "import.log").read_text() == "here\n"
    assert assemble.assemble(tmp_path / "gone", tmp_path / "place") == python  # it stays


def test_no_bundle_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m gpu pack"):
        assemble.assemble(tmp_path, tmp_path / "place")


def test_a_step_ends_when_its_time_is_up_and_a_failed_one_says_why(tmp_path: Path) -> None:
    python = Path(sys.executable)
    slow = run.run(run.Step("slow", ("-c", "import time; time.sleep(60)"), 1), python, tmp_path)
    assert (slow["passed"], slow["error"]) == (False, "not finished within 1 s")
    broken = run.run(run.Step("broken", ("-c", "raise SystemExit('why')"), 50), python, tmp_path)
    assert (broken["passed"], broken["error"]) == (False, "why")


def test_the_steps_are_done_in_under_eight_minutes() -> None:
    assert sum(step.limit_seconds for step in run.STEPS) < 480
