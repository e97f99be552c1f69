"""Why a rollout may not act, and what each of these reasons means for it: one table.

A new reason is a new row. Everything that asks whether engines may prepare, pods may change, failed
pods are given what is stable, or the progress deadline runs, reads it here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BlockedKind = Literal[
    "",
    "NoTargets",
    "Terminating",
    "TargetConflict",
    "NotFound",
    "VersionFailed",
    "Resolving",
    "Aborted",
    "TooManyFailures",
    "Paused",
]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a reason means for the pods, the deadline and the verdict of a rollout that it holds."""

    prepares: Literal["All", "Prepared", "None"]
    """Whose engines are asked to have the target at hand: all (in waves), those that have it
    already, nobody's.
    """
    activates: bool = False
    """May pods change to the target, and new ones boot into it."""
    gives_up: bool = False
    """The target is given up in this revision: what boots gets what is stable."""
    deadline_runs: bool = False
    """Does lack of progress count: not while somebody holds the rollout, nor when there is nothing
    to do.
    """
    waits_for_version: bool = False
    """There is no version to roll out yet."""
    may_be_complete: bool = True
    """Is the rollout Ready while every pod serves the target."""


# "Prepared" where the hold may end at any time: what is at hand is kept, nothing new is begun.
# "None" only where the version is given up: a second copy in memory is of no use then. A pause may
# be Ready; a rollout without its version, or with pods that are somebody else's, may not.
RULES: dict[BlockedKind, Rule] = {
    "": Rule("All", activates=True, deadline_runs=True),
    "NoTargets": Rule("All", activates=True),
    "Terminating": Rule("Prepared", may_be_complete=False),
    "TargetConflict": Rule("Prepared", may_be_complete=False),
    "NotFound": Rule("Prepared", deadline_runs=True, waits_for_version=True, may_be_complete=False),
    "VersionFailed": Rule("Prepared", waits_for_version=True, may_be_complete=False),
    "Resolving": Rule(
        "Prepared", deadline_runs=True, waits_for_version=True, may_be_complete=False
    ),
    "Aborted": Rule("None", gives_up=True, may_be_complete=False),
    "TooManyFailures": Rule("None", gives_up=True),
    "Paused": Rule("Prepared"),
}


@dataclass(frozen=True, slots=True)
class Blocked:
    """Why a rollout starts nothing; the empty kind: it acts."""

    kind: BlockedKind
    message: str = ""  # empty where the status finds its own words
    reason: str = ""  # the version's own, with VersionFailed and Resolving; else empty

    @property
    def rule(self) -> Rule:
        return RULES[self.kind]
