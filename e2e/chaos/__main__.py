"""``python -m e2e.chaos``: rounds of one change and one fault each, on a cluster of this machine.

The first round that fails ends it, with its number, its seed and what the cluster said last: the
same seed plays the same rounds again. Ctrl-C ends what was begun and takes the cluster down.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from e2e.chaos.play import Row, begin, play
from e2e.chaos.rounds import VERSIONS, choose
from e2e.harness import cold, samples
from e2e.harness.environment import ROOT, Environment, diagnose, provide
from e2e.harness.kubectl import CommandFailed, TimedOut
from e2e.own_cluster import run_on_own_cluster
from localcluster import ClusterError

LAST_EVENTS = 15


def main() -> int:
    """0 when every round held, 1 when one did not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m e2e.chaos",
        description="Random changes and faults on a cluster of this machine, and what came of them.",
    )
    parser.add_argument("--seed", type=int, default=1, help="which rounds (default: %(default)s)")
    parser.add_argument("--rounds", type=_count, default=20, help="how many (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a row for each round, as JSON")
    arguments = parser.parse_args()
    return run_on_own_cluster(
        parser, lambda out: _run(out, arguments.seed, arguments.rounds, arguments.json)
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rounds: 1 or more")
    return int(text)


def _run(out: Console, seed: int, count: int, file: Path | None) -> int:
    truth = {version: cold.answers(version, cold.PROMPT, cold.TOKENS) for version in VERSIONS}
    if truth["v0"] == truth["v1"]:
        raise CommandFailed("both versions answer the same: whatever a pod served, it would pass")
    environment = provide()
    samples.start_pods(environment)
    begin(environment)
    rows: list[Row] = []
    try:
        failed = _rounds(out, environment, truth, seed, count, rows, file)
    finally:  # interrupted too
        out.print(table(rows))
        compared = sum(row.compared for row in rows)
        false = sum(len(row.false) for row in rows)
        out.print(f"seed {seed}: {len(rows)} rounds, {compared} statements compared, {false} false")
    return 1 if failed else 0


def _rounds(
    out: Console,
    environment: Environment,
    truth: Mapping[str, list[int]],
    seed: int,
    count: int,
    rows: list[Row],
    file: Path | None,
) -> bool:
    """Whether one failed: no other is played then."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=out, transient=True) as bar:
        task = bar.add_task("", total=count)
        for planned in choose(seed, count):
            bar.update(task, description=f"{planned.change}, {planned.fault}")
            try:
                row = play(environment, truth, seed, planned)
            except (CommandFailed, TimedOut, ClusterError) as error:
                row = Row(planned, seed, lacking=[str(error)])
            rows.append(row)
            if file is not None:
                file.write_text(json.dumps([one.to_json() for one in rows], indent=2) + "\n")
            bar.advance(task)
            out.print(_line(row), markup=False, highlight=False)
            if row.problems():
                _tell(out, environment, row)
                return True
    return False


def _line(row: Row) -> str:
    took = "-" if row.seconds is None else f"{row.seconds:.0f} s"
    said = "FAILED" if row.problems() else "held"
    return (
        f"round {row.planned.number}: {row.planned.change}, {row.planned.fault}: {said} "
        f"({took}, {row.compared} compared, {len(row.false)} false)"
    )


def _tell(out: Console, environment: Environment, row: Row) -> None:
    """What somebody needs who looks for the reason."""
    number = row.planned.number
    out.print(f"round {number} of seed {row.seed} failed: {row.planned}", style="red", markup=False)
    for problem in row.problems():
        out.print(f"  {problem}", markup=False)
    file = ROOT / "build" / "chaos" / f"{row.seed}-{number}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    seen = diagnose(environment)  # events are what it ends with
    file.write_text(seen)
    out.print("the last events:", *seen.splitlines()[-LAST_EVENTS:], sep="\n  ", markup=False)
    out.print(f"what the cluster looked like is in {file}", markup=False)


def table(rows: list[Row]) -> Table:
    """Round by round."""
    made = Table(box=None)  # narrow enough for eighty columns, which a file has
    for name in ("round", "change", "fault", "ends on", "seconds", "compared", "false", "failed"):
        made.add_column(name, no_wrap=True)
    for row in rows:
        planned = row.planned
        made.add_row(
            str(planned.number),
            planned.change,
            planned.fault,
            f"{planned.replicas} {planned.version}",
            "-" if row.seconds is None else f"{row.seconds:.1f}",
            str(row.compared),
            str(len(row.false)),
            str(len(row.failed)),
        )
    return made


if __name__ == "__main__":
    sys.exit(main())
