"""What a failure leaves behind, by the step that it meets: one table, which
`test_failures.py` plays on a real engine and docs/vllm.md shows.
`python -m e2e.engine.failures.table` writes it there.

Nothing here knows an engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "vllm.md"
HEADING = "## What a failure leaves behind\n"
HALF_COPIED = {"copy": "half"}  # the sabotage's own order: what makes a repair necessary


class Outcome(Enum):
    """What the agent hears of a failure, and what the pod serves afterwards."""

    UNANSWERED = ("nothing: its time-out decides", "the old version")
    REJECTED = ("`rejected`, {}", "the old version")
    REFUSED = ("`commit_failed`, {}", "the old version")
    REPAIRED = ("`commit_failed`, {}, dirty; then that it is repaired", "the old version, again")
    SERVED = ("`committed`", "the new version")
    TOLD_LATER = ("nothing; the next `hello` says it", "the new version")
    DIED = ("that the connection ends", "nothing: vLLM ends")
    ENDED = ("that it is dirty, or that the connection ends", "nothing: the container ends with 1")

    @property
    def is_fatal(self) -> bool:
        """Whether there is no engine any more."""
        return self in (Outcome.DIED, Outcome.ENDED)


@dataclass(frozen=True, slots=True)
class Failure:
    """One row."""

    step: str
    """As the page calls it."""
    fault: str
    outcome: Outcome
    reason: str = ""
    """Of `rejected` or `commit_failed`."""
    orders: Mapping[str, str] = field(default_factory=dict)
    """What the sabotage does, by its steps (``e2e/engine/sabotage``)."""
    by_agent: str = ""
    """What the agent's side does instead, or besides: one of the deeds of `test_failures.py`."""
    way: str = ""
    """How the version has to wait for its commit; empty: as the rank likes."""
    opened: bool = False
    """Whether the engine had resumed with the new version, which the probe had passed."""

    @property
    def name(self) -> str:
        return f"{self.step}: {self.fault}"

    @property
    def held(self) -> str:
        """The step that is held up until somebody has given up waiting; empty: none."""
        return next((step for step, deed in self.orders.items() if deed == "hold"), "")


def _broken_repair(fault: str, outcome: Outcome, orders: Mapping[str, str]) -> Failure:
    return Failure("repair", fault, outcome, "CommitFailed", {**HALF_COPIED, **orders})


PREPARE = (
    Failure(
        "descriptors",
        "one is lost, and the agent goes",
        Outcome.UNANSWERED,
        by_agent="announce one more",
    ),
    Failure(
        "descriptors",
        "the rank may open no more files",
        Outcome.REJECTED,
        "MapFailed",
        by_agent="take the rank's files",
    ),
    Failure(
        "descriptors",
        "a slab can still be written to",
        Outcome.REJECTED,
        "MapFailed",
        by_agent="leave a slab open",
    ),
    Failure("map", "the kernel has no memory", Outcome.REJECTED, "MapFailed", {"map": "memory"}),
    Failure(
        "room", "too little is free", Outcome.REJECTED, "InsufficientMemory", {"room": "memory"}
    ),
    Failure(
        "load",
        "out of memory halfway",
        Outcome.REJECTED,
        "InsufficientMemory",
        {"load": "memory"},
    ),
    Failure(
        "load",
        "the model's loader fails halfway",
        Outcome.REJECTED,
        "LoadFailed",
        {"load": "raise always"},
    ),
    Failure(
        "load", "the agent goes halfway", Outcome.UNANSWERED, orders={"load": "hold"}, by_agent="go"
    ),
    Failure("load", "the worker is killed halfway", Outcome.DIED, orders={"load": "kill"}),
)

COMMIT = (
    Failure(
        "check",
        "a rank has not prepared it",
        Outcome.REFUSED,
        "NotPrepared",
        by_agent="prepare nothing",
    ),
    Failure("check", "the answer is lost", Outcome.REFUSED, "CommitFailed", {"rpc-check": "lose"}),
    Failure("check", "no answer in time", Outcome.REFUSED, "CommitFailed", {"check": "hold"}),
    Failure("pause", "the answer is lost", Outcome.REFUSED, "CommitFailed", {"pause": "lose"}),
    Failure("pause", "no answer in time", Outcome.REFUSED, "CommitFailed", {"pause": "hold"}),
    Failure(
        "pause",
        "the answer is lost, and it does not resume",
        Outcome.REPAIRED,
        "CommitFailed",
        {"pause": "lose", "resume": "raise"},
    ),
    Failure("copy", "it fails halfway", Outcome.REPAIRED, "CommitFailed", HALF_COPIED),
    Failure(
        "copy",
        "out of memory halfway, where it is loaded in the pause",
        Outcome.REPAIRED,
        "CommitFailed",
        {"load": "memory"},
        way="InPause",
    ),
    Failure("copy", "no answer in time", Outcome.REPAIRED, "CommitFailed", {"install": "hold"}),
    Failure("copy", "the worker is killed halfway", Outcome.ENDED, orders={"copy": "kill"}),
    Failure("probe", "other tokens", Outcome.REPAIRED, "ProbeMismatch", {"probe": "wrong"}),
    Failure("probe", "NaN", Outcome.REPAIRED, "ProbeMismatch", {"probe": "nan"}),
    Failure("probe", "it fails", Outcome.REPAIRED, "CommitFailed", {"probe": "raise"}),
    Failure("probe", "no answer in time", Outcome.REPAIRED, "CommitFailed", {"probe": "hold"}),
    Failure("probe", "EngineCore is killed", Outcome.ENDED, orders={"probe": "kill"}),
    Failure("label", "it fails", Outcome.REPAIRED, "CommitFailed", {"label": "raise"}),
    Failure("resume", "it fails", Outcome.REPAIRED, "CommitFailed", {"resume": "raise"}),
    Failure(
        "resume",
        "the answer is lost",
        Outcome.REPAIRED,
        "CommitFailed",
        {"resume": "lose"},
        opened=True,
    ),
    Failure(
        "resume",
        "no answer in time",
        Outcome.REPAIRED,
        "CommitFailed",
        {"resume": "hold"},
        opened=True,
    ),
    Failure("tidying up", "it fails", Outcome.SERVED, orders={"settle": "raise"}),
    Failure("tidying up", "no answer in time", Outcome.SERVED, orders={"settle": "hold"}),
    Failure(
        "answer",
        "the agent goes before it comes",
        Outcome.TOLD_LATER,
        orders={"install": "hold"},
        by_agent="go",
    ),
)

REPAIR = (
    _broken_repair("the pause fails once", Outcome.REPAIRED, {"pause": "raise"}),
    _broken_repair("the copy fails once", Outcome.REPAIRED, {"repair": "raise"}),
    _broken_repair("the copy's answer is lost", Outcome.REPAIRED, {"rpc-repair": "lose"}),
    _broken_repair("the probe answers other tokens once", Outcome.REPAIRED, {"probe": "wrong"}),
    _broken_repair("the label fails once", Outcome.REPAIRED, {"label": "raise"}),
    _broken_repair("the resume fails once", Outcome.REPAIRED, {"resume": "raise"}),
    _broken_repair("the copy fails each time", Outcome.ENDED, {"repair": "raise always"}),
)

FAILURES = (*PREPARE, *COMMIT, *REPAIR)
_PHASES = (("prepare", PREPARE), ("commit", COMMIT), ("repair", REPAIR))

_TEXT = """
Each step of a prepare, of a commit and of the repair after a broken one was made to fail in a running vLLM, by
`e2e/engine/failures`; `python -m e2e.engine.failures.table` writes this table, and the test plays it. After each failure the
greedy tokens are those of the version that vLLM's own label and the last word to the agent name, and nothing has named another; requests that were running get the tokens
of the version that they began with; and the next prepare and commit succeed. Where nothing serves, the container's restart ends in the boot barrier.

"""
_NOTE = """
¹ It had resumed: requests may have been answered by the new version, under its label and after its probe, until the repair paused it again.
"""


def section() -> str:
    """The section of docs/vllm.md, heading and all."""
    lines = [
        "| | step | what fails | what the agent hears | what the pod serves |",
        "|---|---|---|---|---|",
    ]
    for phase, failures in _PHASES:
        for step, rows in groupby(failures, key=lambda failure: failure.step):
            for failure in rows:
                said, serves = failure.outcome.value
                said = said.format(f"`{failure.reason}`") + (" ¹" if failure.opened else "")
                named = "" if phase == step else step
                lines.append(f"| {phase} | {named} | {failure.fault} | {said} | {serves} |")
                phase = step = ""
    return HEADING + _TEXT + "\n".join(lines) + "\n" + _NOTE


def page() -> str:
    """The whole of docs/vllm.md, with the table as it has to be."""
    text = PAGE.read_text()
    found = re.search(rf"{re.escape(HEADING)}.*?(?=^## )", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"{PAGE} has no section {HEADING.strip()!r}, or none after it")
    return text[: found.start()] + section() + "\n" + text[found.end() :]


if __name__ == "__main__":
    PAGE.write_text(page())
