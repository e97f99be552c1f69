"""Broadcasts to a fixed set of nodes, over MPI: what is exported here is all that others use of it.

Nothing below knows of it. Whoever wants to be rid of MPI deletes this folder and its two users: the
agent's `staging.broadcasts` (with the setting ``mpi``) and ``hotweights replicate --mpi``.
"""

from hotweights_transports.broadcast.collective import Cargo, bring
from hotweights_transports.broadcast.group import GroupTimeouts, Terms
from hotweights_transports.broadcast.hydra import MpiUnavailable, availability
from hotweights_transports.broadcast.invitation import Groups, Invitation, Inviting, accept
from hotweights_transports.broadcast.leader import GroupLeader
from hotweights_transports.broadcast.measure import measure
from hotweights_transports.broadcast.member import GroupMember

__all__ = [
    "Cargo",
    "GroupLeader",
    "GroupMember",
    "GroupTimeouts",
    "Groups",
    "Invitation",
    "Inviting",
    "MpiUnavailable",
    "Terms",
    "accept",
    "availability",
    "bring",
    "measure",
]
