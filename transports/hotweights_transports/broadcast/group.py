"""What the two sides of a group of nodes share: the terms that all are told, their patience, and
the way to a rank of one's own.

A fixed set of nodes comes together, and the head hands each its part of one MPI job.
`leader.GroupLeader` is rank 0's side, `member.GroupMember` everybody else's. Who came says under
which address others can pull from it; so the group is there also where the collective is not: when
a rank did not come, when MPI does not start, when a member dies. A side's ``member`` is then None,
``why`` says why, and the nodes pull. Afterwards nobody leaves before the others have what they
need, or are gone, or stand still.

It knows no plan and no chunk; ``about`` is whatever all must agree on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hotweights_storage.errors import TransferError
from hotweights_transports.broadcast.hydra import START_SECONDS, MpiFailed, find
from hotweights_transports.broadcast.launch_line import LaunchRefused, command, parse_launch
from hotweights_transports.broadcast.rank_process import RankProcess

MAX_WHY: Final = 500  # characters of a reason: it comes from another node and goes into a status


@dataclass(frozen=True, slots=True)
class Terms:
    """What every member of a group is told in the same words."""

    size: int
    about: str
    """What this is for; who comes for something else is refused."""
    slots: int
    slot_nbytes: int
    """The ring: buckets on their way at once, and the largest one."""
    secret: bytes = b""


@dataclass(frozen=True, slots=True)
class GroupTimeouts:
    """How long the nodes bear with each other."""

    join_seconds: float = 60.0
    """For all to come."""
    message_seconds: float = 5.0
    """For one message."""
    stall_seconds: float = 60.0
    """Without progress, in the collective and of a node that still pulls after it."""


def start_member(
    line: str, rank: int, terms: Terms, heads: frozenset[str]
) -> tuple[RankProcess | None, str]:
    """The rank of a launch line, ready; or None and why there is none. ``heads``: the hosts that
    the line may lead to. Waits at most `hydra.START_SECONDS` for MPI to begin.
    """
    try:
        launch = parse_launch(line)
        if launch.proxy_id != rank:
            raise LaunchRefused(
                f"--proxy-id {launch.proxy_id}: rank {rank} takes its own launch only"
            )
        member = RankProcess(command(launch, find().proxy, heads), terms.slots, terms.slot_nbytes)
    except TransferError as error:  # LaunchRefused, MpiFailed, MpiUnavailable
        return None, str(error)
    try:
        member.wait_ready(START_SECONDS)
        if (member.rank, member.size) != (rank, terms.size):
            raise MpiFailed(
                f"MPI made us rank {member.rank} of {member.size} instead of {rank} of {terms.size}"
            )
    except MpiFailed as error:
        member.close()
        return None, str(error)
    return member, ""
