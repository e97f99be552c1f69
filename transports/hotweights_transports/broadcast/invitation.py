"""How nodes that know each other by tokens come to the secret of a group: the head gives it to
whoever its peers' server let in.

A peer that pulls chunks need not know whom it pulls from, because digests guard the bytes. A member
of an MPI job must know: the head's mpiexec names the program that a member's proxy runs. So an
invitation carries the head's own token, and the guest has it checked, as the head had the guest's,
before it joins with the secret. The secret is the group's alone and ends with it.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from hotweights_transports.peers.base import (
    Authenticate,
    AuthenticationUnavailable,
    ChunkProvider,
    Identity,
    Lease,
    PeerClient,
    PeerProtocolError,
    PeerRefused,
    Pending,
)

# names of groups that are over; one that was forgotten looks as if it were not open yet
REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a guest needs to join. ``over``: the group has met without it, and there is nothing to
    join.
    """

    port: int = 0
    secret: bytes = field(default=b"", repr=False)
    over: bool = False


@dataclass(frozen=True, slots=True)
class _Group:
    members: frozenset[str]
    port: int
    secret: bytes = field(repr=False)


class Groups:
    """What a head tells of the groups that it leads. Thread-safe."""

    def __init__(self, token: Callable[[], str]) -> None:
        """``token``: the head's own, as peers know it."""
        self._token = token
        self._lock = threading.Lock()
        self._open: dict[str, _Group] = {}
        self._over: OrderedDict[str, None] = OrderedDict()

    @staticmethod
    def new_secret() -> bytes:
        """32 random bytes, for one group."""
        return secrets.token_bytes(32)

    def open(self, name: str, members: Collection[str], port: int, secret: bytes) -> None:
        """From now on the nodes ``members`` are invited, to that port."""
        with self._lock:
            self._over.pop(name, None)
            self._open[name] = _Group(frozenset(members), port, secret)

    def close(self, name: str) -> None:
        """Whoever comes from now on comes too late, and is told so."""
        with self._lock:
            self._open.pop(name, None)
            self._over[name] = None
            while len(self._over) > REMEMBERED:
                self._over.popitem(last=False)

    def invitation(self, name: str, guest: Identity) -> bytes | None:
        """What the guest is told, as `ChunkProvider.answer` wants it: in the threads of the
        peers' server.
        """
        with self._lock:
            if name in self._over:  # whoever asks: it is no secret that there is nothing to join
                return json.dumps({"over": True}).encode()
            group = self._open.get(name)
        if group is None or guest.node not in group.members:
            return None
        return json.dumps(
            {"port": group.port, "secret": group.secret.hex(), "token": self._token()}
        ).encode()


class Inviting(ChunkProvider):
    """A node's chunks, and its groups beside them."""

    def __init__(self, chunks: ChunkProvider, groups: Groups) -> None:
        self._chunks = chunks
        self._groups = groups

    def locate(self, blake3: str) -> Lease | Pending | None:
        return self._chunks.locate(blake3)

    def manifest(self, digest: str) -> bytes | None:
        return self._chunks.manifest(digest)

    def answer(self, name: str, asking: Identity) -> bytes | None:
        return self._groups.invitation(name, asking)


def accept(client: PeerClient, name: str, head: str, check: Authenticate) -> Invitation:
    """The invitation to the group ``name`` by node ``head``. Raises `PeerError`: `PeerMissing`
    where it is not open (yet), `PeerRefused` where who invites is not that node's agent.
    """
    found = _read(client.address, client.ask(name))
    if found.get("over") is True:
        return Invitation(over=True)
    port, secret, token = found.get("port"), found.get("secret"), found.get("token")
    if (
        type(port) is not int
        or not 1 <= port <= 65535
        or not isinstance(secret, str)
        or not isinstance(token, str)
    ):
        raise PeerProtocolError(client.address, "it sent what is no invitation")
    try:
        identity = check(token)
        key = bytes.fromhex(secret)
    except AuthenticationUnavailable as error:
        raise PeerRefused(client.address, f"its token could not be reviewed: {error}") from error
    except ValueError as error:
        raise PeerProtocolError(client.address, "it sent what is no invitation") from error
    if identity is None or identity.node != head or len(key) < 32:
        who = identity.node or identity.name if identity is not None else "nobody that we know"
        raise PeerRefused(
            client.address, f"who invites to {name} must be the agent of {head}, and is {who}"
        )
    return Invitation(port, key)


def _read(address: str, text: bytes) -> dict[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PeerProtocolError(address, "it sent an invitation that is no JSON") from error
    if not isinstance(found, dict):
        raise PeerProtocolError(address, "it sent an invitation that is no JSON object")
    return found
