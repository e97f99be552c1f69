"""Ranks in an MPI broadcast: rank 0 reads the source once, and all get every bucket as it comes;
who loses the collective pulls.

The ranks meet at MASTER_ADDR:MASTER_PORT, rank 0 starts the job, each node its own part of it
(`broadcast.group`), and the plan's buckets go through it (`broadcast.collective`). A rank that dies
takes the collective with it, not the others: what had come is kept, and the rest is pulled, by the
agent's fetch, from the earlier ranks and at last from the source. Nobody leaves before the others
are through.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from hotweights.replicate.rank_provider import RankProvider
from hotweights.replicate.world import Measured, Replicator, World
from hotweights.worker.auth import PeerSecret, peer_secret
from hotweights_agent.staging.chunk_sources import OriginSource, connected, in_order
from hotweights_agent.staging.fetch import Fetch, FetchFailed
from hotweights_common import hosts
from hotweights_coordinator.wire.auth import TOKEN_VARIABLE
from hotweights_planner.errors import Refused
from hotweights_planner.manifest import Chunk
from hotweights_storage.source_reads import SourceReads
from hotweights_transports.broadcast import (
    Cargo,
    GroupLeader,
    GroupMember,
    GroupTimeouts,
    MpiUnavailable,
    Terms,
    availability,
    bring,
)
from hotweights_transports.peers.base import ClientLimits, PeerServer, Want
from hotweights_transports.peers.registry import transport_for
from hotweights_transports.peers.stream import address as addresses

if TYPE_CHECKING:
    from hotweights_planner.plan import Plan
    from hotweights_storage.image import ImageBuilder
    from hotweights_storage.resolve import Progress
    from hotweights_storage.sources.base import Source

SCHEME: Final = "mpi"
MAX_WINDOW: Final = 4  # buckets in memory at once, beside the image


def replicator(
    *, window: int, patience: GroupTimeouts | None = None, reads: SourceReads | None = None
) -> Replicator:
    """Raises `TransferError` where MPI does not work here. ``window``: buckets on their way at
    once. ``reads``: the process's.
    """
    found = availability()
    if not found.works:
        raise MpiUnavailable(f"MPI does not work here: {found.because}")
    # at least two: one is verified while the next is on its way
    return MpiReplicator(
        min(max(2, window), MAX_WINDOW), patience or GroupTimeouts(), found.because, reads
    )


class MpiReplicator:
    """A `world.Replicator`: a broadcast, and pulling where that was lost."""

    def __init__(
        self, window: int, patience: GroupTimeouts, programs: str, reads: SourceReads | None
    ) -> None:
        self._window = window
        self._patience = patience
        self._programs = programs
        self._reads = reads

    def run(
        self,
        plan: Plan,
        builder: ImageBuilder,
        source: Callable[[], Source],
        world: World,
        progress: Progress,
    ) -> Measured:
        """Until this rank has everything, and the others too or nothing to say any more. Raises
        `TransferError`, `PeerError` or `FetchFailed`.
        """
        secret = peer_secret(os.environ.get(TOKEN_VARIABLE, ""))
        door = PeerSecret(secret)
        terms = Terms(
            world.size,
            plan.digest,
            self._window,
            max((bucket.nbytes for bucket in plan.buckets), default=1),
            secret.encode(),
        )
        board = RankProvider(plan, builder, None, progress)
        with ExitStack() as stack:
            # before the ranks meet: each tells the others where it can be pulled from
            server = stack.enter_context(_serve(world, board, door))
            stack.callback(board.end)  # first of all, so that nobody waits for what does not come
            group = self._meet(world, terms, addresses.parse(server.address)[1])
            stack.callback(group.close)
            group.gather()
            began = time.monotonic()

            def kept(chunk: Chunk) -> None:
                board.arrived(Want(chunk.blake3, chunk.nbytes))

            needed = builder.missing
            cargo = Cargo(
                plan.buckets, builder, kept, source, plan.source, self._reads or SourceReads()
            )
            lost = bring(group, cargo, self._patience.stall_seconds)
            pulled = self._pull(group, plan, builder, board, source, door, lost)
            seconds = time.monotonic() - began
            group.leave()  # waits for the others, who may still pull from here
        details: dict[str, str | int | float] = {
            "broadcast": "lost: " + lost if lost else "whole",
            "pulled_bytes": pulled,
            "mpi": self._programs,
        }
        return Measured(SCHEME, sum(builder.nbytes(blake3) for blake3 in needed), seconds, details)

    def _meet(self, world: World, terms: Terms, pull_port: int) -> GroupLeader | GroupMember:
        if world.rank == 0:
            return GroupLeader(world.address, world.port, terms, pull_port, self._patience)
        return GroupMember(world.rank, world.address, world.port, terms, pull_port, self._patience)

    def _pull(
        self,
        group: GroupLeader | GroupMember,
        plan: Plan,
        builder: ImageBuilder,
        board: RankProvider,
        source: Callable[[], Source],
        door: PeerSecret,
        lost: str,
    ) -> int:
        """What the collective did not bring: from the earlier ranks, the nearest first, then from
        the source.
        """
        if not builder.missing_count:  # the broadcast brought everything
            return 0
        limits = ClientLimits(stall_seconds=self._patience.stall_seconds)
        # only earlier ones: two ranks that wait for each other would wait for ever
        earlier = sorted((rank for rank in group.pull_addresses if rank < group.rank), reverse=True)
        with ExitStack() as stack:
            uris = [group.pull_addresses[rank] for rank in earlier]
            clients = connected(stack, uris, door.token, limits)
            origin = OriginSource(plan.source, source, plan.manifest, reads=self._reads)
            asked = in_order(clients, origin, plan.manifest.digest)
            fetch = Fetch(
                builder,
                [board.announcing(one) for one in asked],
                progress=lambda _: group.progressed(),
            )
            try:
                return fetch.run().done_nbytes
            except FetchFailed as error:
                text = f"the broadcast was lost: {lost}; and {error}" if lost else str(error)
                raise FetchFailed(text, error.reason, transient=error.transient) from error


def _serve(world: World, board: RankProvider, door: PeerSecret) -> PeerServer:
    """Where the others pull from this rank if they lose the collective."""
    if hosts.is_loopback(world.address):
        host = "127.0.0.1"
    elif door.protected:
        host = hosts.anywhere(world.address)
    else:
        raise Refused(
            world.address,
            "ranks on other hosts could be anybody's",
            "give all ranks one secret in HOTWEIGHTS_PEER_TOKEN",
        )
    uri = addresses.form(host, 0)
    return transport_for(uri).listen(uri, board, door)
