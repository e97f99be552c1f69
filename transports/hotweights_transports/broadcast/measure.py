"""How fast a broadcast is on this host alone: what MPI costs its processors, as `peer_endpoints` of
the agent measures the other transports.
"""

from __future__ import annotations

import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from hotweights_transports.broadcast.group import GroupTimeouts, Terms
from hotweights_transports.broadcast.hydra import BETWEEN_HOSTS, MpiFailed
from hotweights_transports.broadcast.leader import GroupLeader
from hotweights_transports.broadcast.member import GroupMember

MEASURED_NBYTES = 128 << 20
SLOT_NBYTES = 8 << 20
STALL_SECONDS = 10.0


def measure(nbytes: int = MEASURED_NBYTES) -> int:
    """MB/s (10^6 bytes) of a broadcast to one other rank on this host. Raises `TransferError`."""
    terms = Terms(2, "a measurement", 2, SLOT_NBYTES, secrets.token_bytes(32))
    patience = GroupTimeouts(join_seconds=10.0, stall_seconds=10.0)
    with (
        ThreadPoolExecutor(1) as other,
        closing(GroupLeader("127.0.0.1", 0, terms, 0, patience, BETWEEN_HOSTS)) as lead,
    ):
        following = other.submit(_follow, lead.port, terms, patience, nbytes)
        lead.gather()
        took = _push(lead, nbytes)
        following.result()
    return int(nbytes / took / 1e6)


def _follow(port: int, terms: Terms, patience: GroupTimeouts, nbytes: int) -> None:
    with closing(GroupMember(1, "127.0.0.1", port, terms, 0, patience)) as follow:
        follow.gather()
        _push(follow, nbytes)


def _push(group: GroupLeader | GroupMember, nbytes: int) -> float:
    """So many bytes into the group's ring, through it and out of it; the seconds that it took."""
    member = group.member
    if member is None:
        raise MpiFailed(group.why)
    count, content = nbytes // SLOT_NBYTES, bytearray(SLOT_NBYTES)
    began = time.monotonic()
    for number in range(count + member.slots):
        if number >= member.slots:
            with member.view(member.completed(STALL_SECONDS)) as view:
                if group.rank:
                    content[:] = view
        if number < count:
            with member.view(number % member.slots) as view:
                if not group.rank:
                    view[:] = content
            member.post(number % member.slots, SLOT_NBYTES)
    took = time.monotonic() - began
    member.finish(STALL_SECONDS)
    return took
