"""What came of an architecture, and the table of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

STEPS = (
    ("v1", "Beside"),
    ("v0", "InPause"),
    ("delta", "Beside"),
    ("v0", "InPause"),
    ("v1", "Beside"),
)
"""Which version is switched to, from v0 on, and by which way."""

WAYS = ("Beside", "InPause", "Reload")
EQUAL, REFUSED, FAILED, NOT_RUN = "equal", "refused", "failed", "not run"


@dataclass
class Switch:
    """What came of one version by one way."""

    version: str
    wished: str
    way: str = ""
    """The one by which it was got ready."""
    result: str = ""
    pause_seconds: float | None = None
    message: str = ""


@dataclass
class Row:
    architecture: str
    kind: str
    switches: list[Switch] = field(default_factory=list)
    part: str = ""
    """How many parts of the model a version was that changes its last layer; empty: all."""
    seconds: float = 0.0
    refused: str = ""
    """The sentence with which the engine is refused as a whole."""
    not_run: str = ""
    """Why vLLM itself does not run it here, or nothing could be compared."""
    failed: str = ""

    def result(self) -> str:
        if self.failed or any(switch.result == FAILED for switch in self.switches):
            return FAILED
        if self.not_run:
            return NOT_RUN
        return REFUSED if self.refused else EQUAL

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "result": self.result()}


def by_way(switches: Sequence[Switch]) -> Mapping[str, Sequence[Switch]]:
    """What was tried of each way; where a rank took another way than was wished, of that."""
    found: dict[str, list[Switch]] = {}
    for switch in switches:
        found.setdefault(switch.way or switch.wished, []).append(switch)
    return found


def table(rows: Sequence[Row]) -> Table:
    made = Table(box=None)  # narrow enough for eighty columns, which a file has
    for name in ("architecture", *WAYS, "a part", "result"):
        made.add_column(name, no_wrap=True)
    for row in rows:
        ways = by_way(row.switches)
        cells = [_cell(ways.get(way, [])) for way in WAYS]
        made.add_row(row.architecture, *cells, row.part or "-", row.result())
    return made


def _cell(switches: Sequence[Switch]) -> str:
    """The worst that came of a way, and its longest pause."""
    if not switches:
        return "-"
    results = {switch.result for switch in switches}
    worst = next((one for one in (FAILED, REFUSED, EQUAL) if one in results), FAILED)
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
            if switch.message:
                lines[f"{row.architecture}, {switch.wished}: {switch.message}"] = None
    return [*lines]
