"""``python -m e2e.zoo``: tiny models of many architectures, each switched while it runs, and held
against a cold load of every version.

One engine at a time. Ctrl-C ends the one that runs; what was written and what cold loads answered
is kept, so that the next run goes on from there.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from e2e.zoo.architectures import LEFT_OUT, ZOO, Architecture
from e2e.zoo.cold import ColdLoads
from e2e.zoo.play import EQUAL, FAILED, REFUSED, Row, Switch, by_way, play

WAYS = ("Beside", "InPause", "Reload")


def main() -> int:
    """0 when every engine answered as a cold load or was refused as foreseen, 1 when one did not,
    130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m e2e.zoo",
        description="Hot equals cold, for tiny models of every architecture that runs on CPUs.",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=[one.name for one in ZOO],
        help=f"some of them: {', '.join(one.name for one in ZOO)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="a row for each, as JSON")
    arguments = parser.parse_args()
    chosen = [one for one in ZOO if arguments.only is None or one.name in arguments.only]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out = Console()
    try:
        rows = _run(out, chosen, arguments.json)
    except KeyboardInterrupt:
        out.print("zoo: interrupted")
        return 130
    return 0 if all(row.ok for row in rows) else 1


def _run(out: Console, chosen: Sequence[Architecture], file: Path | None) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="zoo-") as name:
        folder = Path(name)
        cold = ColdLoads(folder)
        try:
            _play_all(out, chosen, cold, folder, rows, file)
        finally:  # interrupted too
            cold.close()
            out.print(table(rows))
            for line in remarks(rows):
                out.print(line, markup=False, highlight=False)
    return rows


def _play_all(
    out: Console,
    chosen: Sequence[Architecture],
    cold: ColdLoads,
    folder: Path,
    rows: list[Row],
    file: Path | None,
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=out, transient=True) as bar:
        task = bar.add_task("", total=len(chosen))
        for architecture in chosen:
            bar.update(task, description=architecture.name)
            row = play(architecture, cold, folder / architecture.name)
            rows.append(row)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps([one.to_json() for one in rows], indent=2) + "\n")
            if row.failed:
                _keep_logs(out, folder, architecture, file)
            bar.advance(task)
            out.print(f"{row.architecture}: {result(row)} ({row.seconds:.0f} s)", markup=False)


def _keep_logs(out: Console, folder: Path, architecture: Architecture, file: Path | None) -> None:
    """Of one that failed, beside the rows: the folder of a run goes with it."""
    log = folder / architecture.name / "vllm.log"
    if file is None or not log.exists():
        return
    kept = file.with_name(f"{file.stem}-{architecture.name}.log")
    kept.write_bytes(log.read_bytes())
    out.print(f"its log is {kept}", markup=False)


def result(row: Row) -> str:
    """In one word."""
    if row.failed:
        return FAILED
    if row.not_run:
        return "not run"
    return REFUSED if row.refused else EQUAL


def table(rows: Sequence[Row]) -> Table:
    made = Table(box=None)  # narrow enough for eighty columns, which a file has
    for name in ("architecture", *WAYS, "a part", "result"):
        made.add_column(name, no_wrap=True)
    for row in rows:
        ways = by_way(row.switches)
        made.add_row(
            row.architecture,
            *(_cell(ways.get(way, [])) for way in WAYS),
            min(row.parts, default="-"),
            result(row),
        )
    return made


def _cell(switches: Sequence[Switch]) -> str:
    """The worst that came of a way, and its longest pause."""
    if not switches:
        return "-"
    results = {switch.result for switch in switches}
    worst = next(one for one in (FAILED, REFUSED, EQUAL) if one in results)
    pauses = [switch.pause_seconds for switch in switches if switch.pause_seconds is not None]
    return f"{worst} {max(pauses) * 1e3:.0f} ms" if pauses else worst


def remarks(rows: Sequence[Row]) -> list[str]:
    """What the table has no room for: each refusal and failure in its own words, once."""
    lines: dict[str, None] = {}
    for row in rows:
        for text in (row.refused, row.not_run, row.failed):
            if text:
                lines[f"{row.architecture}: {text}"] = None
        for switch in row.switches:
            if switch.result == REFUSED:
                lines[f"{row.architecture}, {switch.wished}: {switch.message}"] = None
    return [*lines, *(f"{name}: left out, {why}" for name, why in LEFT_OUT.items())]


if __name__ == "__main__":
    sys.exit(main())
