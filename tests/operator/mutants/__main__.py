"""``python -m tests.operator.mutants``: what the tests of the operator's decisions notice, and what
they would let pass.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.operator.mutants.listing import Misfit, Mutant, everything
from tests.operator.mutants.running import Verdict, snapshot, try_out


def main() -> int:
    """0: all of them were killed, but for those that are equivalent; 1: some survived; 2: some do
    not fit the operator any more.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.operator.mutants", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (%(default)s)")
    parser.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help="those with this in name or file; may be repeated",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=300,
        help="of the simulator, where tests do not kill (%(default)s)",
    )
    parser.add_argument(
        "--recorded", action="store_true", help="run only the test file that is known to kill it"
    )
    parser.add_argument(
        "--quick", action="store_true", help="leave out the test files that take several seconds"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="the verdicts, to read by a program"
    )
    asked = parser.parse_args()
    chosen = [
        m
        for m in everything()
        if not asked.only or any(text in (m.name, m.file) for text in asked.only)
    ]
    with snapshot() as original:
        misfits = [(m, misfit) for m in chosen if (misfit := _misfit(m, original))]
        fitting = [m for m in chosen if m not in dict(misfits)]
        verdicts: list[Verdict] = []
        tried = try_out(
            fitting, original, asked.jobs, asked.seeds, recorded=asked.recorded, quick=asked.quick
        )
        try:
            for verdict in tried:
                verdicts.append(verdict)
                print(f"{verdict.seconds:5.1f} s  {verdict.summary}", flush=True)
        except Misfit as error:
            print(error, file=sys.stderr)
            return 2
    equivalent = [v for v in verdicts if v.mutant.equivalent]
    survived = [v for v in verdicts if not v.killed_by and not v.mutant.equivalent]
    count = len(verdicts) - len(equivalent)
    print(
        f"{count} mutants: {count - len(survived)} killed, {len(survived)} survived;"
        f" and {len(equivalent)} that nobody could tell from the original"
    )
    if asked.json:
        verdicts.sort(key=lambda verdict: (verdict.mutant.file, verdict.mutant.name))
        asked.json.write_text(json.dumps([_as_dict(verdict) for verdict in verdicts], indent=1))
    for _, misfit in misfits:
        print(misfit, file=sys.stderr)
    return 2 if misfits else 1 if survived else 0


def _misfit(mutant: Mutant, original: Path) -> Misfit | None:
    try:
        mutant.applied((original / mutant.file).read_text())
    except Misfit as misfit:
        return misfit
    return None


def _as_dict(verdict: Verdict) -> dict[str, object]:
    mutant = verdict.mutant
    return {
        "name": mutant.name,
        "file": mutant.file,
        "wrong": mutant.wrong,
        "killed_by": verdict.killed_by,
        "equivalent": mutant.equivalent,
        "seconds": round(verdict.seconds, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
