"""Pictures of rollouts as trees of text: rollout → steps → nodes → pods, with bars.

One layout for all readers: ``rich.text.Text`` lines, of which a file or a pipe gets the plain text.
Rows of one kind line up. A fleet of many nodes is folded: what is done is counted and not drawn, so
that what waits or failed stays in sight.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.text import Text

from hotweights.kubectl.views.picture import (
    NodePicture,
    PodPicture,
    RolloutPicture,
    StepPicture,
    StepState,
)
from hotweights.kubectl.views.snapshot import Snapshot
from hotweights.kubectl.views.table import short_span, span
from hotweights_common import sizes

BAR_CELLS = 20
MOST_NODES = 40
"""So many nodes are drawn; of more, those that are done are counted."""
_LEAST_NOTE = 30  # characters, however narrow the terminal is
_STYLES = {
    "Updated": ("✔", "green"),
    "Changing": ("●", "yellow"),
    "Prepared": ("◐", "cyan"),
    "Preparing": ("◔", "cyan"),
    "Booting": ("◌", "yellow"),
    "Waiting": ("○", "dim"),
    "Failed": ("✘", "red"),
    "Dirty": ("✘", "red"),
    "NotConnected": ("?", "magenta"),
    "NotScheduled": ("?", "magenta"),
    "NoAgent": ("?", "magenta"),
    "Unknown": ("?", "dim"),
}
_STEPS: dict[StepState, tuple[str, str]] = {
    "Done": ("✔", "green"),
    "Current": ("●", "yellow"),
    "Coming": ("○", "dim"),
    "Skipped": ("⊘", "dim"),
}
_PHASES = {
    "Complete": "green",
    "Stalled": "red",
    "Aborted": "red",
    "RolledBack": "red",
    "Paused": "yellow",
}
_WAITS = {
    "Promotion": "waits for a promotion",
    "Time": "waits for its time",
    "Pods": "waits for its pods",
    "Analysis": "waits for its analysis",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """Some words in one style of rich; the empty one: as the terminal has it."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One line: cells that line up with those of its brothers, then words that need not."""

    cells: tuple[Cell, ...]
    note: Cell = Cell("")
    rows: tuple[Row, ...] = field(default=())
    hangs: bool = True  # on a branch; else it is said of what stands above


def lines(
    pictures: Sequence[RolloutPicture], *, folds: bool = True, width: int | None = None
) -> list[Text]:
    """The trees of all rollouts, an empty line between two. ``folds``: of many nodes, those that are
    done are counted. ``width`` in characters: longer notes go on below; None: lines have no end.
    """
    found: list[Text] = []
    for picture in pictures:
        if found:
            found.append(Text())
        row = _rollout(picture, folds=folds)
        found += _line("", "", row, _widths([row]), width)
        found += _children(row.rows, "", width)
    return found


def notes(shot: Snapshot) -> list[Text]:
    """What the pictures lack, and why."""
    found = []
    if words := shot.unreadable():
        text = f"not shown, for you may not list them: {', '.join(words)}"
        found.append(Text(f"{text} (kubectl hotweights doctor names the rights)", "yellow"))
    return [*found, *(Text(why, "red") for why in shot.malformed)]


def plain(found: Iterable[Text]) -> str:
    """The lines for a file or a pipe."""
    return "".join(f"{line.plain.rstrip()}\n" for line in found)


def bar(done: int, total: int) -> str:
    """``███░░``: full only when all is done."""
    cells = BAR_CELLS * min(done, total) // total if total else 0
    return "█" * cells + "░" * (BAR_CELLS - cells)


# -- what stands in a line ----------------------------------------------------------------------


def _rollout(picture: RolloutPicture, *, folds: bool) -> Row:
    way = (
        f"{picture.stable} → {picture.version}"
        if picture.stable not in ("", picture.version)
        else picture.version
    )
    phase = picture.phase if picture.current else f"{picture.phase} (of the spec before)"
    head = (
        Cell(f"{picture.namespace}/{picture.name}", "bold"),
        Cell(way, "bold"),
        Cell(phase, _PHASES.get(picture.phase, "cyan")),
    )
    begun = f"revision {picture.revision}, {span(picture.seconds)}" if picture.revision else ""
    return Row(head, Cell(begun, "dim"), tuple(_below(picture, folds=folds)))


def _below(picture: RolloutPicture, *, folds: bool) -> Iterator[Row]:
    if picture.message:
        style = "red" if _PHASES.get(picture.phase) == "red" else ""
        yield Row((), Cell(picture.message, style), hangs=False)
    if picture.rolled_back_from:
        yield Row((), Cell(f"rolled back from {picture.rolled_back_from}", "red"), hangs=False)
    if picture.unanswered:
        yield Row(
            (),
            Cell(f"the command {picture.unanswered!r} is not answered yet", "yellow"),
            hangs=False,
        )
    elif picture.last_command.get("outcome"):
        said = picture.last_command
        text = f"{said['verb'] or 'command'}: {said['outcome']}: {said['message']}"
        yield Row((), Cell(text, "dim"), hangs=False)
    yield _counts(picture)
    if picture.bytes_total:
        done, total = picture.bytes_done, picture.bytes_total
        text = f"{sizes.binary(done)} of {sizes.binary(total)}"
        yield Row(
            (Cell("bytes"), Cell(bar(done, total), _of(done, total))),
            Cell(f"{text} on {picture.nodes_staged} of {len(_named(picture))} nodes"),
            hangs=False,
        )
    if picture.steps:
        yield Row((Cell("steps"),), rows=tuple(map(_step, picture.steps)))
    shown, folded = _folded(picture, folds=folds)
    yield from (_node(node) for node in shown)
    if folded:
        pods = sum(len(node.pods) for node in folded)
        yield Row(
            (), Cell(f"and {len(folded)} nodes more, all of their {pods} pods updated", "dim")
        )


def _counts(picture: RolloutPicture) -> Row:
    parts = [
        f"{picture.updated} of {picture.desired} updated",
        f"{picture.prepared} prepared",
        f"{picture.available} available",
    ]
    parts += [f"{picture.failed} failed"] if picture.failed else []
    return Row(
        (
            Cell("pods"),
            Cell(bar(picture.updated, picture.desired), _of(picture.updated, picture.desired)),
        ),
        Cell(", ".join(parts)),
        hangs=False,
    )


def _step(step: StepPicture) -> Row:
    mark, style = _STEPS[step.state]
    note = (
        f"{_WAITS.get(step.waits_for, step.waits_for)}, for {span(step.seconds)}"
        if step.waits_for
        else ""
    )
    note += f": {step.message}" if step.message else ""
    return Row((Cell(mark, style), Cell(step.text)), Cell(note, "yellow"))


def _node(node: NodePicture) -> Row:
    name = Cell(node.name or "no node yet", "" if node.name else "magenta")
    pods = tuple(map(_pod, node.pods))
    if node.staged == "Unknown":
        return Row((name,), rows=pods)
    done, total = node.bytes_done, node.bytes_total
    note = f"{sizes.binary(total)} staged"
    style = ""
    if node.staged == "Failed":
        note, style = _told(node.reason, node.message), "red"
    elif node.staged == "Waiting":
        note = "not begun to stage"
    elif node.staged == "Fetching":
        note = f"staging, {sizes.binary(done)} of {sizes.binary(total)}"
    return Row((name, Cell(bar(done, total), _of(done, total))), Cell(note, style), pods)


def _pod(pod: PodPicture) -> Row:
    mark, style = _STYLES[pod.state]
    version = pod.serves or (f"shows {pod.shows}" if pod.shows else "-")
    facts = [pod.probe] if pod.probe else []
    facts += [f"paused {short_span(pod.pause_seconds)}"] if pod.pause_seconds else []
    facts += [pod.way] if pod.state == "Prepared" and pod.way else []
    facts += [] if pod.ready else ["not Ready"]
    facts += [_told(pod.reason, pod.message)] if pod.reason or pod.message else []
    return Row(
        (Cell(mark, style), Cell(pod.name), Cell(version), Cell(pod.state, style)),
        Cell(", ".join(facts), "red" if style == "red" else "dim"),
    )


def _told(reason: str, message: str) -> str:
    return ": ".join(part for part in (reason, message) if part)


def _of(done: int, total: int) -> str:
    return "green" if total and done >= total else "cyan"


def _named(picture: RolloutPicture) -> list[NodePicture]:
    return [node for node in picture.nodes if node.name]


def _folded(
    picture: RolloutPicture, *, folds: bool
) -> tuple[Sequence[NodePicture], Sequence[NodePicture]]:
    """The nodes that are drawn, and those that are counted only."""
    if not folds or len(picture.nodes) <= MOST_NODES:
        return picture.nodes, ()
    done = [n for n in picture.nodes if all(pod.state == "Updated" for pod in n.pods)]
    rest = [n for n in picture.nodes if n not in done]
    room = max(0, MOST_NODES - len(rest))
    return [*rest, *done[:room]], done[room:]


# -- where it stands ----------------------------------------------------------------------------


def _children(rows: Sequence[Row], indent: str, width: int | None) -> Iterator[Text]:
    """The lines of brothers and of all below them."""
    widths = {hangs: _widths([r for r in rows if r.hangs is hangs]) for hangs in (True, False)}
    last = max((index for index, row in enumerate(rows) if row.hangs), default=-1)
    for index, row in enumerate(rows):
        below = indent + ("   " if index >= last else "│  ")
        branch = indent + ("└─ " if index == last else "├─ ") if row.hangs else below
        yield from _line(branch, below, row, widths[row.hangs], width)
        yield from _children(row.rows, below, width)


def _widths(rows: Sequence[Row]) -> list[int]:
    """How wide each cell is, so that brothers line up."""
    several = [[len(cell.text) for cell in row.cells] for row in rows]
    most = max(map(len, several), default=0)
    return [max((w[index] for w in several if index < len(w)), default=0) for index in range(most)]


def _line(
    guide: str, below: str, row: Row, widths: Sequence[int], width: int | None
) -> Iterator[Text]:
    """A row, and the lines on which its note goes on."""
    text = Text(no_wrap=True)
    text.append(guide, "dim")
    for index, cell in enumerate(row.cells):
        # a mark stands close to what it marks
        gap = 1 if widths[index] == 1 else 2
        text.append(cell.text.ljust(widths[index]) + " " * gap, cell.style)
    column = len(text)
    room = max(_LEAST_NOTE, width - column) if width is not None else len(row.note.text) + 1
    first, *rest = textwrap.wrap(row.note.text, room) or [""]
    text.append(first, row.note.style)
    text.rstrip()
    yield text
    hanging = below + ("│  " if row.rows else "")
    for words in rest:
        more = Text(no_wrap=True)
        more.append(hanging.ljust(column), "dim")
        more.append(words, row.note.style)
        yield more
