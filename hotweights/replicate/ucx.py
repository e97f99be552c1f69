"""Ranks in a chain over UCX: rank 0 reads the source, every other rank pulls from the one before it
while that is still pulling.

It is the agent's fetch over the agent's peers, so each chunk is verified before anybody gets it
from here, and a rank whose parent dies goes on with the earlier ranks and at last with the source.
What is new is only how the ranks find each other and part: each listens at MASTER_PORT plus its
rank, asks its parent until that is there, and says goodbye when it has everything; a parent stays
until its child said so, or has asked for nothing for a while.

MASTER_ADDR is rank 0's host, or a list of all ranks' hosts, separated by commas; a single one
counts for all.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from hotweights.replicate.rank_provider import RankProvider
from hotweights.replicate.world import Measured, Replicator, World
from hotweights.worker.auth import PEER_VARIABLE, PeerSecret, peer_secret
from hotweights_agent.staging.chunk_sources import OriginSource, connected, in_order
from hotweights_agent.staging.fetch import Fetch
from hotweights_common import hosts
from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason
from hotweights_coordinator.wire.auth import TOKEN_VARIABLE
from hotweights_planner.errors import Refused
from hotweights_storage.errors import TransferError
from hotweights_storage.source_reads import SourceReads
from hotweights_transports.peers.base import (
    ClientLimits,
    PeerClient,
    PeerError,
    PeerTimeout,
    PeerUnreachable,
)
from hotweights_transports.peers.stream import address as addresses
from hotweights_transports.peers.ucx import TRANSPORT

if TYPE_CHECKING:
    from hotweights_planner.plan import Plan
    from hotweights_storage.image import ImageBuilder
    from hotweights_storage.resolve import Progress
    from hotweights_storage.sources.base import Source

JOIN_SECONDS: Final = 60.0  # ranks of one launcher start at different moments
QUIET_SECONDS: Final = 15.0  # without any question a child counts as dead
AGAIN_SECONDS: Final = 0.2  # between two tries to reach a rank that is not there yet
MAX_WINDOW_NBYTES: Final = 256 * 1024 * 1024  # asked for at once, however large buckets are
MAX_PORT: Final = 65535
SCHEME: Final = "ucx"

log = logging.getLogger(__name__)


class RankMissing(HotweightsError):
    """A rank that belongs to this world is not there, or is one of another world."""

    reason = Reason.RANK_MISSING


def replicator(
    *,
    window: int,
    join_seconds: float = JOIN_SECONDS,
    quiet_seconds: float = QUIET_SECONDS,
    reads: SourceReads | None = None,
) -> Replicator:
    """Raises `TransferError` where UCX does not work here. ``window``: buckets on their way at
    once. ``reads``: the process's.
    """
    availability = TRANSPORT.available()
    if not availability.works:
        raise TransferError(
            f"UCX does not work here: {availability.because}", Reason.TRANSPORT_UNAVAILABLE
        )
    return UcxReplicator(window, join_seconds, quiet_seconds, availability.because, reads)


class UcxReplicator:
    """A `world.Replicator`: each rank pulls from the one before it."""

    def __init__(
        self,
        window: int,
        join_seconds: float,
        quiet_seconds: float,
        networks: str,
        reads: SourceReads | None,
    ) -> None:
        self._window = window
        self._join_seconds = join_seconds
        self._quiet_seconds = quiet_seconds
        self._networks = networks
        self._reads = reads

    def run(
        self,
        plan: Plan,
        builder: ImageBuilder,
        source: Callable[[], Source],
        world: World,
        progress: Progress,
    ) -> Measured:
        """Until this rank has everything and its child too. Raises `RankMissing`, `TransferError`
        or `PeerError`.
        """
        hosts = hosts_of(world)
        door = PeerSecret(peer_secret(os.environ.get(TOKEN_VARIABLE, "")))
        limits = ClientLimits(
            window_nbytes=min(max(1, self._window) * plan.bucket_nbytes, MAX_WINDOW_NBYTES)
        )
        child = world.rank + 1 if world.rank + 1 < world.size else None
        board = RankProvider(plan, builder, child, progress)
        with ExitStack() as stack:
            # listens before it asks: its child may be there first
            if child is not None:
                uri = _bindable(hosts[world.rank], world.port + world.rank, door)
                stack.enter_context(TRANSPORT.listen(uri, board, door))
                # first of all, so that nobody waits for what does not come
                stack.callback(board.end)
            uris = [
                addresses.form(hosts[rank], world.port + rank, SCHEME)
                for rank in reversed(range(world.rank))  # the parent first, rank 0 last
            ]
            parents = connected(stack, uris, door.token, limits)
            if parents:
                self._meet(parents[0], plan, world.rank - 1)
            began = time.monotonic()
            origin = OriginSource(plan.source, source, plan.manifest, reads=self._reads)
            asked = in_order(parents, origin, plan.manifest.digest)
            found = Fetch(builder, [board.announcing(one) for one in asked]).run()
            seconds = time.monotonic() - began
            # only to the parent: no other rank waits for this one
            if parents:
                _say_goodbye(parents[0], board.goodbye(world.rank))
            if child is not None:
                self._await_child(board, child)
        return Measured(
            SCHEME,
            found.done_nbytes,
            seconds,
            {"networks": self._networks, **_shares(found.by_source)},
        )

    def _meet(self, parent: PeerClient, plan: Plan, rank: int) -> None:
        deadline = time.monotonic() + self._join_seconds
        while True:
            try:
                parent.fetch_manifest(plan.manifest.digest)
                return
            except (PeerUnreachable, PeerTimeout) as error:
                if time.monotonic() > deadline:
                    raise RankMissing(
                        f"rank {rank} did not answer within {self._join_seconds:g} s ({error}): "
                        "start it, or see MASTER_ADDR and MASTER_PORT"
                    ) from error
            except PeerError as error:
                raise RankMissing(
                    f"rank {rank} replicates something else, or knows another secret ({error})",
                    error.reason,
                ) from error
            time.sleep(AGAIN_SECONDS)

    def _await_child(self, board: RankProvider, rank: int) -> None:
        began = time.monotonic()
        while not board.parted:
            now = time.monotonic()
            if board.heard_at is None:
                if now - began > self._join_seconds:
                    raise RankMissing(
                        f"rank {rank} did not come within {self._join_seconds:g} s: start it"
                    )
            elif now - max(board.heard_at, began) > self._quiet_seconds:
                raise RankMissing(
                    f"rank {rank} fell silent before it had everything; see what it says"
                )
            board.wait(AGAIN_SECONDS)


def hosts_of(world: World) -> list[str]:
    """The host of each rank, by rank. Raises `Refused` where MASTER_ADDR or MASTER_PORT do not fit
    so many.
    """
    hosts = [host.strip() for host in world.address.split(",")]
    if len(hosts) == 1:
        hosts *= world.size
    if len(hosts) != world.size or not all(hosts):
        raise Refused(
            "MASTER_ADDR",
            f"{world.address!r} names {len(hosts)} hosts for {world.size} ranks",
            "name rank 0's host if it is everybody's, else one host for each rank, separated "
            "by commas",
        )
    # the last rank has no child, so it listens nowhere
    if world.port + world.size - 2 > MAX_PORT:
        raise Refused(
            "MASTER_PORT",
            f"{world.port} leaves no ports for {world.size} ranks",
            "choose a lower one",
        )
    return hosts


def _bindable(host: str, port: int, door: PeerSecret) -> str:
    """Where to listen as ``host``: what others know this rank by need not be an address of one of
    its own interfaces.
    """
    if hosts.is_loopback(host):
        return addresses.form(host, port, SCHEME)
    if not door.protected:
        raise Refused(
            host,
            "ranks on other hosts could be anybody's",
            f"give all ranks one secret in {PEER_VARIABLE} (or {TOKEN_VARIABLE})",
        )
    return addresses.form(hosts.anywhere(host), port, SCHEME)


def _say_goodbye(parent: PeerClient, digest: str) -> None:
    """The parent may be gone already; then it was not waiting."""
    try:
        parent.fetch_manifest(digest)
    except PeerError as error:
        log.debug("%s did not hear that this rank is done: %s", parent.address, error)


def _shares(by_source: tuple[tuple[str, int], ...]) -> dict[str, int]:
    return {f"bytes from {name}": nbytes for name, nbytes in by_source if nbytes}
