"""An engine: the process in a pod's container, and what its node's agent asks of it.

Its own state is the truth; what its agent wrote last is what the world knows; both drift apart
whenever a process dies or a report is late. The agent steers by level and remembers what was given
up, for which token, revision and image; that memory dies with the agent or with the engine, as it
does in `hotweights_agent`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from hotweights_crds.nodeweights import GivenUp, ProbeStrength

Op = Literal["Prepare", "Commit"]

MOST_COMMITS = 3  # tries, as an agent's
_WAITS_SECONDS = (1.0, 4.0)  # before the second and the third


@dataclass(slots=True)
class Engine:
    """The process in a pod's container, as it is in truth."""

    life: int  # how often its container had restarted when it began
    boots_until: datetime
    phase: Literal["Starting", "Booting", "Serving", "Committing", "Dirty"] = "Starting"
    digest: str = ""  # what it serves
    probe: ProbeStrength = ""  # what proved that
    prepared: str = ""
    token: int = 0
    confirmed_at: datetime | None = None  # by the node's clock
    preparing: str = ""
    committing: str = ""
    busy_until: datetime | None = None  # with preparing or committing
    boots: bool = True  # it has not opened its port yet
    repaired_at: datetime | None = None
    dies_at: datetime | None = None
    dies_of_memory: bool = False

    @property
    def is_open(self) -> bool:
        """Whether its port answers: not before the boot barrier is passed."""
        return not self.boots

    @property
    def is_busy(self) -> bool:
        """Whether it owes its agent an answer, to a prepare or a commit."""
        return bool(self.preparing or self.committing)


Goal = tuple[int, tuple[str, int], int]  # token; rollout and its revision; image


@dataclass(slots=True)
class Effort:
    """The tries of one step towards one version."""

    goal: Goal
    failures: int = 0
    again_at: datetime | None = None
    given_up: bool = False
    reason: str = ""


@dataclass(slots=True)
class Memory:
    """What an agent remembers of one engine in its present life."""

    life: int
    efforts: dict[tuple[Op, str], Effort] = field(default_factory=dict)
    failed: GivenUp | None = None

    def effort(self, op: Op, digest: str, goal: Goal) -> Effort:
        """The tries for this goal; another one starts afresh. A commit does not ask which image it
        was prepared from.
        """
        goal = goal if op == "Prepare" else (goal[0], goal[1], 0)
        found = self.efforts.get((op, digest))
        if found is None or found.goal != goal:
            found = self.efforts[op, digest] = Effort(goal)
        return found

    def gave_up(self, digest: str, goal: Goal) -> Effort | None:
        """How the tries for this goal ended, if they did; a version that is not here (image 0) is
        no other than it was.
        """
        commit, prepare = (
            self.efforts.get(("Commit", digest)),
            self.efforts.get(("Prepare", digest)),
        )
        # [:2]: token and revision, without the image
        if commit is not None and commit.given_up and commit.goal[:2] == goal[:2]:
            return commit
        same = (
            prepare is not None and prepare.goal[:2] == goal[:2] and goal[2] in (0, prepare.goal[2])
        )
        return prepare if prepare is not None and same and prepare.given_up else None

    def fails(
        self, op: Op, digest: str, reason: str, now: datetime, *, booting: bool, lasting: bool
    ) -> Effort:
        """One more failure; the last one if it will not pass."""
        effort = self.efforts[op, digest]
        effort.failures += 1
        effort.reason = reason
        if not lasting and effort.failures < MOST_COMMITS:
            effort.again_at = now + timedelta(seconds=_WAITS_SECONDS[effort.failures - 1])
            return effort
        effort.given_up = True
        token, (rollout, revision), _ = effort.goal
        self.failed = GivenUp(
            digest=digest,
            rollout=rollout,
            revision=revision,
            token=token,
            step=op,
            booting=booting,
            reason=reason,
            message="simulated",
        )
        return effort

    def succeeded(self, digest: str) -> None:
        """It serves or has prepared a version after all."""
        if self.failed is not None and self.failed.digest == digest:
            self.failed = None

    def only(self, digests: tuple[str, str]) -> None:
        """What is asked for no more is forgotten."""
        for key in [key for key in self.efforts if key[1] not in digests]:
            del self.efforts[key]
