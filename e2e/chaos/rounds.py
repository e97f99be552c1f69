"""Which bad days a seed stands for: what is changed in each round, and what goes wrong meanwhile.

Nothing but the seed decides, so that a round that failed can be played again. It refuses to know
the cluster: a victim is a number that whoever acts counts off among those who are there.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import TypeVar

VERSIONS = ("v0", "v1")
REPLICAS = (1, 2, 3)
BEGIN_VERSION, BEGIN_REPLICAS = "v0", 2
"""What there is before the first round."""

MAX_DELAY_SECONDS = 3.0  # a version takes about so long from patch to Ready
MIN_FAULT_SECONDS, MAX_FAULT_SECONDS = 2.0, 15.0

_Kind = TypeVar("_Kind")


class Change(StrEnum):
    """What somebody wants."""

    FLIP = "flip"  # the other version
    FLAP = "flap"  # the other version, and this one again within a second
    SCALE = "scale"
    DELETE_POD = "delete-pod"


class Fault(StrEnum):
    """What goes wrong."""

    KILL_OPERATOR = "kill-operator"
    STOP_OPERATOR = "stop-operator"
    KILL_AGENT = "kill-agent"
    STOP_AGENT = "stop-agent"
    RESTART_AGENT = "restart-agent"  # as a kubelet does, with more clients than else
    KILL_ENGINE = "kill-engine"
    STOP_ENGINE = "stop-engine"
    CUT_API_SERVER = "cut-api-server"
    CUT_NODE = "cut-node"
    FILL_DISK = "fill-disk"  # the one with the agent's state folder


@dataclass(frozen=True, slots=True)
class Round:
    """One change, one fault, and how it is to end."""

    number: int  # from 1
    change: Change
    fault: Fault
    version: str  # that all pods serve in the end
    replicas: int  # in the end
    victim: int  # of the fault, and of a deletion: counted round among those that there are
    is_fault_first: bool
    delay_seconds: float  # from the first of them to the second
    fault_seconds: float  # how long it lasts, where it has an end

    @property
    def lasts(self) -> bool:
        """Whether the fault has an end; what was killed is only dead."""
        kills = (Fault.KILL_OPERATOR, Fault.KILL_AGENT, Fault.RESTART_AGENT, Fault.KILL_ENGINE)
        return self.fault not in kills

    @property
    def harms_nobody(self) -> bool:
        """Whether clients of the pods that there are may not notice anything."""
        ends_pods = (Change.SCALE, Change.DELETE_POD)
        reaches_engines = (Fault.KILL_ENGINE, Fault.CUT_NODE)
        return self.change not in ends_pods and self.fault not in reaches_engines


def choose(seed: int, count: int) -> tuple[Round, ...]:
    """The first rounds of a seed; more of them begin with the same ones."""
    return tuple(islice(_rounds(random.Random(seed)), count))


def _rounds(chance: random.Random) -> Iterator[Round]:
    changes, faults = _dealt(tuple(Change), chance), _dealt(tuple(Fault), chance)
    version, replicas, number = BEGIN_VERSION, BEGIN_REPLICAS, 0
    while True:
        number += 1
        change = next(changes)
        if change is Change.FLIP:
            version = other(version)
        if change is Change.SCALE:
            replicas = chance.choice([count for count in REPLICAS if count != replicas])
        yield Round(
            number=number,
            change=change,
            fault=next(faults),
            version=version,
            replicas=replicas,
            victim=chance.randrange(12),  # whether there are one, two, three or four: all alike
            is_fault_first=chance.random() < 0.5,
            delay_seconds=round(chance.uniform(0, MAX_DELAY_SECONDS), 1),
            fault_seconds=round(chance.uniform(MIN_FAULT_SECONDS, MAX_FAULT_SECONDS), 1),
        )


def other(version: str) -> str:
    """The version that a round changes to from this one."""
    return VERSIONS[1 - VERSIONS.index(version)]


def _dealt(kinds: Sequence[_Kind], chance: random.Random) -> Iterator[_Kind]:
    """As cards are dealt: none comes again before all have come, so short runs miss little."""
    while True:
        deck = list(kinds)
        chance.shuffle(deck)
        yield from deck
