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
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from e2e.zoo.architectures import LEFT_OUT, ZOO, Architecture
from e2e.zoo.forks import Forks
from e2e.zoo.play import play
from e2e.zoo.row import FAILED, Row, remarks, table
from e2e.zoo.tensors import compare


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
    parser.add_argument(
        "--tensors",
        action="store_true",
        help="start no engine: hold every tensor of a switched model against a cold load's",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="a row for each, as JSON")
    arguments = parser.parse_args()
    chosen = [one for one in ZOO if arguments.only is None or one.name in arguments.only]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out = Console()
    try:
        rows = _run(out, chosen, arguments.json, arguments.tensors)
    except KeyboardInterrupt:
        out.print("zoo: interrupted")
        return 130
    return 0 if not any(row.result() == FAILED for row in rows) else 1


def _run(
    out: Console, chosen: Sequence[Architecture], file: Path | None, tensors: bool
) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="zoo-") as name:
        folder = Path(name)
        forks = Forks("tensors.py" if tensors else "cold.py", folder)
        try:
            for row in _rows(out, chosen, forks, folder, tensors):
                rows.append(row)
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(json.dumps([one.to_json() for one in rows], indent=2) + "\n")
                    _keep_logs(out, folder, row, file)
        finally:  # interrupted too
            forks.close()
            out.print(table(rows))
            for line in remarks(rows):
                out.print(line, markup=False, highlight=False)
            if len(chosen) == len(ZOO):
                for left, why in LEFT_OUT.items():
                    out.print(f"{left}: left out, {why}", markup=False, highlight=False)
    return rows


def _rows(
    out: Console,
    chosen: Sequence[Architecture],
    forks: Forks,
    folder: Path,
    tensors: bool,
) -> Iterator[Row]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=out, transient=True) as bar:
        task = bar.add_task("", total=len(chosen))
        for one in chosen:
            bar.update(task, description=one.name)
            row = compare(one, forks) if tensors else play(one, forks, folder / one.name)
            bar.advance(task)
            out.print(f"{row.architecture}: {row.result()} ({row.seconds:.0f} s)", markup=False)
            yield row


def _keep_logs(out: Console, folder: Path, row: Row, file: Path) -> None:
    """Of one that failed, beside the rows: the folder of a run ends with it."""
    log = folder / row.architecture / "vllm.log"
    if row.result() == FAILED and log.exists():
        kept = file.with_name(f"{file.stem}-{row.architecture}.log")
        kept.write_bytes(log.read_bytes())
        out.print(f"its log is {kept}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
