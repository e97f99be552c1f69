"""Curves as an SVG that reads on light and dark pages alike, written by hand: a picture of three
panels is no reason for a plotting library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, PANEL, LEFT, RIGHT, TOP, GAP = 760, 150, 64, 20, 34, 46  # user units
COLORS = ("#2f6fde", "#d9822b", "#8a8f98")
POINTS = 380  # two user units each: more are not seen


@dataclass(frozen=True, slots=True)
class Curve:
    """One line; one value for each version, from the first on. It may end early."""

    name: str
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves over the same versions."""

    title: str
    curves: Sequence[Curve]
    bound: float | None = None
    """Drawn as a dashed line."""
    bound_name: str = ""


def draw(panels: Sequence[Panel], versions: int, caption: str) -> str:
    """The picture. Panels stand one below the other, over the number of versions."""
    height = TOP + len(panels) * (PANEL + GAP) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#6b7280">',
        f"<title>{escape(caption)}</title>",
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, versions, TOP + number * (PANEL + GAP))
    parts += [_text(LEFT, height - 8, caption), "</svg>"]
    return "\n".join(parts) + "\n"


def _panel(panel: Panel, versions: int, top: int) -> list[str]:
    highest = max(panel.bound or 0.0, *(max(curve.values) for curve in panel.curves))
    most = _round_up(highest * 1.05)
    bottom = top + PANEL

    def y(value: float) -> float:
        return bottom - value / most * PANEL

    parts = [_text(LEFT, top - 14, panel.title, weight=600)]
    for quarter in range(5):
        value = most * quarter / 4
        parts.append(_line(y(value), "#9ca3af", "0.4"))
        parts.append(_text(LEFT - 8, y(value) + 4, f"{value:,.4g}", anchor="end"))
    for share in (0.0, 0.5, 1.0):
        x = LEFT + share * (WIDTH - LEFT - RIGHT)
        anchor = "middle" if share < 1 else "end"
        parts.append(_text(x, bottom + 16, f"{round(share * versions):,}", anchor=anchor))
    if panel.bound is not None:
        parts.append(_line(y(panel.bound), "#c0392b", "1", dashes="5 4"))
        parts.append(_text(WIDTH - RIGHT, y(panel.bound) - 5, panel.bound_name, anchor="end"))
    at = WIDTH - RIGHT
    for number, curve in reversed(list(enumerate(panel.curves))):
        color = COLORS[number % len(COLORS)]
        parts.append(_polyline(curve.values, versions, y, color))
        parts.append(_text(at, top - 14, curve.name, anchor="end", color=color))
        at -= 8 * len(curve.name) + 14
    return parts


def _polyline(
    values: Sequence[float], versions: int, y: Callable[[float], float], color: str
) -> str:
    step = max(1, versions // POINTS)
    # the worst of each step: a picture must not hide a peak
    worst = [max(values[at : at + step]) for at in range(0, len(values), step)]
    width = (WIDTH - LEFT - RIGHT) * step / max(1, versions)
    points = " ".join(f"{LEFT + at * width:.1f},{y(value):.1f}" for at, value in enumerate(worst))
    return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.4"/>'


def _line(y: float, color: str, width: str, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color}" '
        f'stroke-width="{width}"{dashed}/>'
    )


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: int = 400, color: str = ""
) -> str:
    fill = f' fill="{color}"' if color else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}"{fill}>'
        f"{escape(text)}</text>"
    )


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 8 and their tenfold, so that quarters are round too."""
    scale = 1.0
    while value > 10 * scale:
        scale *= 10
    while value <= scale / 1.25:
        scale /= 10
    return next(scale * step for step in (1, 2, 4, 5, 8, 10) if value <= scale * step)
