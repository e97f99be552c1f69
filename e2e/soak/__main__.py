"""``python -m e2e.soak``: two versions of a tiny Llama swapped again and again in one vLLM, under
load, and whether anybody noticed.

No request may fail, every answer must be that of the version which the engine names, and from the
tenth swap on its processes may hold no more than they did. Ctrl-C ends it, with what was seen.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from e2e.engine.conftest import Engine, checkpoint, golden, told_apart, version
from e2e.soak.footprint import Footprint, least
from e2e.soak.play import CACHE, ENVIRONMENT, SETTLED, Account, Row, play
from localvllm.build import BuildError

EVERY = 5  # swaps, between two lines


def main() -> int:
    """0 when all held, 1 when something did not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m e2e.soak", description="Swaps without end in one vLLM, under load."
    )
    parser.add_argument("--swaps", type=_count, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a row for each swap, as JSON")
    arguments = parser.parse_args()
    for one in (signal.SIGINT, signal.SIGTERM):  # what shells start with & ignores Ctrl-C
        signal.signal(one, signal.default_int_handler)
    out = Console()
    try:
        return _run(out, arguments.swaps, arguments.json)
    except KeyboardInterrupt:
        out.print("soak: interrupted")
        return 130
    except BuildError as error:
        out.print(f"soak: {error}", style="red", markup=False)
        return 1


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of swaps: 1 or more")
    return int(text)


def _run(out: Console, swaps: int, file: Path | None) -> int:
    models = [checkpoint("llama", 0, shards=3), checkpoint("llama", 1, shards=2)]
    told_apart(*models)
    images = [version(model, f"v{number}") for number, model in enumerate(models)]
    versions = [(image, golden(model)) for image, model in zip(images, models, strict=True)]
    account = Account()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        engine = Engine(models[0], Path(folder) / "engine", "keep", CACHE, 1, **ENVIRONMENT)
        try:
            engine.ready()
            play(engine, versions[::-1], swaps, _teller(out, swaps), account)
        except BaseException:
            out.print(engine.vllm.tail(), markup=False, highlight=False)
            raise
        finally:  # interrupted too
            engine.stop()
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(account.to_json(), indent=2) + "\n")
            _show(out, account)
    return 1 if account.problems() else 0


def _teller(out: Console, swaps: int) -> Callable[[Row], None]:
    def tell(row: Row) -> None:
        if row.swap % EVERY == 0 or row.swap in (1, swaps):
            memory = sum(one.resident_nbytes for one in row.footprints.values())
            out.print(
                f"swap {row.swap} of {swaps}: {row.seconds:.1f} s, paused "
                f"{row.pause_seconds * 1e3:.0f} ms; {memory / 1e6:.0f} MB in all processes",
                highlight=False,
            )

    return tell


def _show(out: Console, account: Account) -> None:
    rows = account.rows
    if not rows:
        out.print("no swap ended")
        return
    names = ("process", "", "memory MB", "page tables kB", "mappings", "descriptors")
    table = Table(*names, title=f"what was held after swap {SETTLED}, and at the end")
    for process in rows[0].footprints:
        for when, window in zip(("then", "at the end"), account.windows(process), strict=True):
            if window:
                table.add_row(process, when, *_figures(window))
    out.print(table)
    pauses = [row.pause_seconds * 1e3 for row in rows]
    out.print(
        f"{len(rows)} swaps, paused {statistics.median(pauses):.0f} ms (at most "
        f"{max(pauses):.0f}); {account.requests} requests, {len(account.failures)} failed; "
        f"{sum(account.judged.values())} answers judged, {len(account.false)} false",
        highlight=False,
    )
    for problem in account.problems():
        out.print(problem, style="red", markup=False)


def _figures(window: Sequence[Footprint]) -> tuple[str, ...]:
    one = least(window)
    megabytes = f"{one.resident_nbytes / 1e6:.1f}"
    return megabytes, str(one.page_table_nbytes >> 10), str(one.mappings), str(one.descriptors)


if __name__ == "__main__":
    sys.exit(main())
