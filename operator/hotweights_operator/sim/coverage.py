"""What happened in the stories, by name, so that a path that no story takes is seen.

A simulation proves nothing about what it never does. Everything that the world can do to a rollout,
and every way that a rollout can take, has a name here and is counted; a run of a thousand stories
in which one of them never happened has failed.
"""

from __future__ import annotations

from collections import Counter

Counts = Counter[str]

FAULTS = (
    "agent dies while it stages",
    "back-off of a container",
    "clock of a node is changed",
    "commit breaks in the middle and is repaired",
    "commit breaks in the middle and the engine dies",
    "commit fails and succeeds when it is tried again",
    "commit fails until it is given up",
    "container dies",
    "engine dies after it served",
    "engine dies while it prepares",
    "engine is killed for its memory while it prepares",
    "engine refuses at boot",
    "engine refuses to prepare",
    "object of a node is deleted",
    "probe gives wrong tokens",
    "probe gives wrong tokens at boot",
    "source is corrupt",
    "stale token is refused",
    "version has no golden tokens where they are demanded",
    "version has no golden tokens where they are not demanded",
    "write is refused as invalid",
)
"""What goes wrong in the world, counted where it takes effect and not where it is arranged."""

OPERATOR = (
    "operator ends between two writes",
    "status is lost",
    "write is refused",
)
"""What goes wrong between the operator and the API server; counted by `cluster.operator`."""

PATHS = (
    "boots into the stable version",
    "boots into the target",
    "comes to rest",
    "comes to rest, all but the lost",
    "conflict of two rollouts",
    "deadline exceeded",
    "gate passed",
    "given up: Aborted",
    "given up: TooManyFailures",
    "goes on although pods failed",
    "leaves a crash loop out",
    "phase Aborted",
    "phase Activating",
    "phase Complete",
    "phase Paused",
    "phase Pending",
    "phase Resolving",
    "phase Staging",
    "phase Stalled",
    "policy lets it go on",
    "prepares in waves",
    "retried",
    "rolled back",
    "rolled back while a pod commits",
    "set back to what it serves",
    "told to change",
    "version that failed before is tried again",
    "waits until pods have been Ready for long enough",
    "withdraws what is not prepared",
    "works beside a node that refuses writes",
)
"""Ways that rollouts took, as the judges saw them."""


def expected(happenings: tuple[str, ...]) -> tuple[str, ...]:
    """All that must have happened in a long run; ``happenings`` are those of `story`."""
    return (*(f"happens: {name}" for name in happenings), *FAULTS, *OPERATOR, *PATHS)


def table(counts: Counts, names: tuple[str, ...]) -> str:
    """One line for each name, what never happened among them, then what nobody expected."""
    others = sorted(set(counts) - set(names))
    width = max(len(name) for name in (*names, *others))
    return "\n".join(f"{name:<{width}}  {counts[name]:>9}" for name in (*names, *others))
