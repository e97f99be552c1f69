"""Columns and numbers for people."""

from __future__ import annotations

from collections.abc import Sequence

GAP = 3  # spaces between columns, as kubectl has them


def drawn(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as kubectl prints one."""
    lines = [head, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(head))]
    return "".join(
        (" " * GAP)
        .join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        .rstrip()
        + "\n"
        for line in lines
    )


def span(seconds: float) -> str:
    """``12 s``, ``3 min``, ``2.5 h``, ``3 d``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} d"


def short_span(seconds: float) -> str:
    """``59 ms``, ``1.5 s``: how long an engine answered nobody."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def moment(seconds: float) -> str:
    """As a span; below two minutes with a tenth, where pods change one after the other."""
    return f"{seconds:.1f} s" if seconds < 120 else span(seconds)
