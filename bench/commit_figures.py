"""What `bench/commit.py` measures beside: the floors of the machine, the rows, and what was expected
of them. Nothing here knows an engine.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import localvllm

COPIES = """
import json, sys, time, torch
device, nbytes = sys.argv[1], int(sys.argv[2])
def seconds(work):
    times = []
    for _ in range(6):
        if device == "cpu":
            begin = time.perf_counter(); work(); times.append(time.perf_counter() - begin)
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(); work(); end.record(); end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times[1:])[2]
torch.set_num_threads(1)
part = min(nbytes, 1 << 30)
one = torch.ones(part, dtype=torch.uint8, device=device); two = torch.ones_like(one)
host = torch.ones(part, dtype=torch.uint8)
host = host.pin_memory() if device == "cuda" else host
print(json.dumps({
    "device_copy": seconds(lambda: two.copy_(one)) / part,
    "pinned_copy": seconds(lambda: one.copy_(host, non_blocking=True)) / part,
    "card": torch.cuda.get_device_name() if device == "cuda" else "",
}))
"""


def floors(device: str, nbytes: int) -> dict[str, Any]:
    """Seconds for each byte of a copy within the device (``device_copy``) and onto it from
    page-locked memory (``pinned_copy``), asked with as much as the weights take; and the ``card``.
    """
    command = [str(localvllm.python()), "-c", COPIES, device, str(nbytes)]
    # the last line: importing torch may say something before it
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


@dataclass(slots=True)
class Rows:
    """What was measured; printed as it comes."""

    floors: dict[str, Any]
    nbytes: int  # of all weights
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        what: str,
        way: str,
        seconds: float | None,
        changed: int,
        floor: str = "",
        note: str = "",
    ) -> None:
        """``changed``: bytes that differ; ``floor``: which copy of them, where one is. Without
        seconds it did not happen, and ``note`` says why.
        """
        least = self.floors[floor] * changed if floor else None
        ratio = seconds / least if least and seconds is not None else None
        row = {"what": what, "way": way, "changed": changed / self.nbytes, "seconds": seconds}
        row |= {"floor_seconds": least, "ratio": ratio, "bytes": changed}
        self.rows.append({**row, "note": note} if note else row)
        print(self.rows[-1], flush=True)


@dataclass(frozen=True, slots=True)
class Kind:
    """Rows of one kind, the median of their seconds."""

    what: str
    way: str
    changed: float
    seconds: float | None
    floor_seconds: float | None
    note: str = ""


def kinds(rows: list[dict[str, Any]]) -> list[Kind]:
    """In the order in which they were measured first."""
    found = []
    for key in dict.fromkeys((row["what"], row["way"], row["changed"]) for row in rows):
        alike = [row for row in rows if (row["what"], row["way"], row["changed"]) == key]
        seconds = [row["seconds"] for row in alike if row["seconds"] is not None]
        median = statistics.median(seconds) if seconds else None
        note = next((row["note"] for row in alike if "note" in row), "")
        found.append(Kind(*key, median, alike[0]["floor_seconds"], note))
    return found


@dataclass(frozen=True, slots=True)
class Claim:
    """Something that was expected, and what came."""

    claim: str
    way: str
    changed: float
    seconds: float
    limit_seconds: float

    @property
    def held(self) -> bool:
        return self.seconds <= self.limit_seconds


def claims(measured: list[Kind]) -> list[Claim]:
    """What is expected of our pauses, and of the copies in them alone: the probe is a part of the
    pause whose time has nothing to do with what changed.
    """
    return list(_claims(measured))


def _claims(measured: list[Kind]) -> Iterator[Claim]:
    theirs = [one.seconds for one in measured if one.way == "reload_weights" and one.seconds]
    for one in measured:
        if one.what not in ("pause", "copy") or one.way == "reload_weights" or not one.seconds:
            continue
        if one.floor_seconds is not None:
            limit = 1.3 * one.floor_seconds + 0.05
            yield Claim(
                f"{one.what} <= 1.3 x floor + 50 ms", one.way, one.changed, one.seconds, limit
            )
        if theirs:
            limit = theirs[0] / 5
            name = f"{one.what} >= 5 x faster than reload_weights"
            yield Claim(name, one.way, one.changed, one.seconds, limit)
        if one.changed <= 0.012:  # whole tensors change, so 1 % may be a little more
            yield Claim(f"{one.what} of 1 % <= 60 ms", one.way, one.changed, one.seconds, 0.06)


def show(device: str, measured: list[Kind], expected: list[Claim]) -> None:
    """The medians, one line for each kind of row, and what became of the expectations."""
    table = Table("what", "way", "changed", "seconds", "floor", "ratio", "", title=device)
    for one in measured:
        ratio = one.seconds / one.floor_seconds if one.seconds and one.floor_seconds else None
        figures = [f"{one.changed:.2%}", _text(one.seconds), _text(one.floor_seconds)]
        table.add_row(one.what, one.way, *figures, _text(ratio, 2), one.note)
    out = Console()
    out.print(table)
    table = Table("expected", "way", "changed", "seconds", "at most", "held")
    for claim in expected:
        figures = [f"{claim.changed:.2%}", _text(claim.seconds), _text(claim.limit_seconds)]
        table.add_row(claim.claim, claim.way, *figures, "yes" if claim.held else "no")
    out.print(table)


def _text(number: float | None, digits: int = 4) -> str:
    return "" if number is None else f"{number:.{digits}f}"


def processor() -> str:
    """What this machine calls it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
