"""The tests are worth something: breakages of the operator, one line each, are noticed by them.

`make mutants` tries out every one of the list. Here only this is asked: that each still fits the
operator as it is, and that a dozen of them, one from each corner, are noticed by the test file that
is known to notice them.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.operator.mutants.listing import PACKAGE, everything
from tests.operator.mutants.running import ROOT, TESTS

A_DOZEN = (
    "complete without Ready pods",
    "failed pods are activated again",
    "failures of other digests count",
    "given up and yet booted",
    "all prepare at once",
    "one more than the budget",
    "pods of any namespace are claimed",
    "entries lose a pod that terminates",
    "tokens ignore what the engine answered",
    "actions before the status",
    "a pause is not seen by writes",
    "a key twice in work",
)


@pytest.mark.timeout(300)  # it compiles a file for each
def test_each_fits_the_operator_as_it_is_in_exactly_one_place() -> None:
    mutants = everything()
    assert len(mutants) > 400
    for mutant in mutants:
        mutant.applied((PACKAGE / mutant.file).read_text())
        assert mutant.equivalent or (ROOT / TESTS / mutant.killer).is_file(), mutant.name


@pytest.mark.timeout(600)  # some ten seconds on an idle core
def test_a_dozen_are_noticed() -> None:
    words = [word for name in A_DOZEN for word in ("--only", name)]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.operator.mutants", "--recorded", "--seeds", "0", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{len(A_DOZEN)} mutants: {len(A_DOZEN)} killed" in ran.stdout
