"""What is wrong with versions and with the world at present, as engines come to feel it.

A flaw belongs to a version and lasts: it is why people roll back. Which pods feel it is drawn once
for each pod and version from a number made of their names, so that a new pod of the same Deployment
may be spared and an old one never changes its mind.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Literal

FlawKind = Literal[
    "refused",
    "refused at boot",
    "unrecorded",  # no golden tokens for this pod's kind of engine
    "mismatched",
    "dirty",
    "crashing",
    "killing",
    "corrupt",
]


@dataclass(frozen=True, slots=True)
class Flaw:
    """What is wrong with one version; it lasts as long as the version."""

    kind: FlawKind
    share: int = 100  # of the pods that feel it, in percent
    # with crashing: how long an engine serves it; with dirty: until it is repaired
    seconds: float = 5.0
    oom: bool = False  # with killing: whether it is the kernel that ends the engine, for its memory

    def hits(self, uid: str, digest: str) -> bool:
        """Whether this pod feels it: always the same answer for a pod and a version."""
        return zlib.crc32(f"{uid} {digest}".encode()) % 100 < self.share


@dataclass(slots=True)
class ActiveFaults:
    """All that is wrong at present, with versions and with the world."""

    flaws: dict[str, Flaw] = field(default_factory=dict)  # by digest; they last
    # pod UID → how many of its next commits fail
    failing_commits: dict[str, int] = field(default_factory=dict)
    # pod UID → whether it repairs itself afterwards
    dirty_commits: dict[str, bool] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)  # URIs that no agent may read
    # nodes whose agents die whenever they are half through staging
    flaky_agents: set[str] = field(default_factory=set)

    def flaw(self, kind: FlawKind, uid: str, digest: str) -> Flaw | None:
        """The version's flaw, if it is of this kind and this pod feels it."""
        found = self.flaws.get(digest)
        return (
            found if found is not None and found.kind == kind and found.hits(uid, digest) else None
        )

    def is_corrupt(self, digest: str) -> bool:
        """Whether the version's source is damaged."""
        found = self.flaws.get(digest)
        return found is not None and found.kind == "corrupt"

    def heal(self) -> None:
        """Only the flaws of versions last."""
        self.failing_commits.clear()
        self.dirty_commits.clear()
        self.unreadable.clear()
        self.flaky_agents.clear()
