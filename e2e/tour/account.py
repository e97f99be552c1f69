"""What the tour has to show, and whether it showed it: pure.

It promises that a running vLLM answers as one that was started cold on the new weights, that it was
the same processes before and after, that nobody who asked meanwhile was turned away, and that the
way back brings the old answers. Each promise has a line of the account, and a sentence where it was
not kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from e2e.harness.story import table

Answers = Sequence[Sequence[int]]
"""To each prompt, the token ids."""


@dataclass(frozen=True, slots=True)
class Clients:
    """What those who asked all the time have seen."""

    requests: int
    failures: tuple[str, ...]
    slowest_seconds: float
    longest_gap_seconds: float
    """Between two tokens of one stream."""

    def __str__(self) -> str:
        return (
            f"{self.requests} requests, {len(self.failures)} failed; the slowest took "
            f"{self.slowest_seconds:.2f} s, no stream stood still longer than "
            f"{self.longest_gap_seconds:.2f} s"
        )


@dataclass(frozen=True, slots=True)
class Switch:
    """One change of version."""

    version: str
    seconds: float
    """From the command until every worker had applied it."""
    pauses: int
    """How many commits the worker counted meanwhile: one for the one engine."""
    pause_seconds: float
    """How long they had the engine stand still."""
    answers: Answers
    """To the same prompts, after it."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """All of it. ``cold`` are the answers of a vLLM that was started on the new version."""

    before: Answers
    cold: Answers
    forth: Switch
    back: Switch
    clients: Clients
    processes_before: frozenset[int]
    processes_after: frozenset[int]
    staged_nbytes: int
    """What versions take in the worker's memory at the end."""

    def problems(self) -> list[str]:
        """What was promised and not shown."""
        found = []
        if not self.before or not all(self.cold) or len(self.before) != len(self.cold):
            return ["nothing was compared"]
        if _same(self.before, self.cold):
            found.append("both versions answer alike, so the answers prove nothing")
        if not _same(self.forth.answers, self.cold):
            found.append(
                f"after the switch to {self.forth.version} it does not answer as a cold start: "
                f"{self.forth.answers}, not {self.cold}"
            )
        if not _same(self.back.answers, self.before):
            found.append(
                f"after the way back to {self.back.version} it does not answer as before: "
                f"{self.back.answers}, not {self.before}"
            )
        found += [
            f"the worker counted {switch.pauses} commits for {switch.version}, not one"
            for switch in (self.forth, self.back)
            if switch.pauses != 1
        ]
        if not self.clients.requests:
            found.append("no client asked anything")
        if self.clients.failures:
            found.append(
                f"{len(self.clients.failures)} of {self.clients.requests} requests failed; the "
                f"first: {self.clients.failures[0]}"
            )
        if not self.processes_before or self.processes_before != self.processes_after:
            found.append(
                f"vLLM's processes are not those that they were: {sorted(self.processes_before)}, "
                f"now {sorted(self.processes_after)}"
            )
        return found

    def told(self) -> str:
        """The account, for a person."""
        count = sum(map(len, self.cold))
        rows = [
            _row(self.forth, self.cold, f"a cold vLLM on {self.forth.version}"),
            _row(self.back, self.before, "before"),
        ]
        lines = [
            table(("SWITCH", "PAUSE", "COMMAND TO SERVED", f"ANSWERS ({count} tokens)"), rows),
            "",
            f"clients    {self.clients}",
            f"processes  {_kept(self.processes_before, self.processes_after)}",
            f"memory     the worker holds {self.staged_nbytes / 1e6:.1f} MB of versions, shared with "
            "the engine",
        ]
        return "\n".join(lines)


def _row(switch: Switch, expected: Answers, whose: str) -> tuple[str, ...]:
    verdict = f"those of {whose}" if whose != "before" else "those from before"
    return (
        f"to {switch.version}",
        f"{switch.pause_seconds * 1000:.0f} ms",
        f"{switch.seconds:.1f} s",
        verdict if _same(switch.answers, expected) else f"NOT {verdict}",
    )


def _kept(before: frozenset[int], after: frozenset[int]) -> str:
    kept = len(before & after)
    return f"{kept} of vLLM's {len(before)} processes are the same as before"


def _same(answers: Answers, expected: Answers) -> bool:
    """As far as is expected: near ties, a cold start's tokens end early."""
    return len(answers) == len(expected) and all(
        list(answer[: len(tokens)]) == list(tokens)
        for answer, tokens in zip(answers, expected, strict=True)
    )


def metric(exposition: str, name: str, labels: Mapping[str, str] | None = None) -> float:
    """The sum over the samples of a metric that carry these labels, in Prometheus' text format; 0
    where there is none.
    """
    total = 0.0
    for line in exposition.splitlines():
        found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
        if found is None or found[1] != name:
            continue
        has = dict(re.findall(r'(\w+)="([^"]*)"', found[2] or ""))
        if (labels or {}).items() <= has.items():
            total += float(found[3])
    return total
