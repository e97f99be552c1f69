"""A version by one MPI broadcast to all nodes of a chain: this node's part of it.

The operator says who belongs together (`StageItem.collective`); who is first reads the source, the
others are invited by it. Nothing here fails: whatever happens to a broadcast, what it brought is
kept and verified, a sentence says what became of it, and what is missing is pulled. It knows no
version that is staged, no engine and no Kubernetes; who an agent is, others check.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from hotweights_agent.staging.progress import ByteCounter
from hotweights_common.errors import HotweightsError
from hotweights_crds.nodeweights import Collective
from hotweights_planner.plan import Plan
from hotweights_storage.errors import Cancelled
from hotweights_storage.image import ImageBuilder
from hotweights_storage.source_reads import SourceReads
from hotweights_storage.sources.base import Source
from hotweights_transports.broadcast import (
    Cargo,
    GroupLeader,
    GroupMember,
    Groups,
    GroupTimeouts,
    Invitation,
    MpiUnavailable,
    Terms,
    accept,
    availability,
    bring,
)
from hotweights_transports.peers.base import Authenticate, PeerMissing, PeerUnreachable
from hotweights_transports.peers.registry import transport_for

log = logging.getLogger(__name__)

BUCKET_NBYTES: Final = 16 << 20
# buckets on their way at once: what a broadcast costs a node in memory beside the version
WINDOW: Final = 3
STALL_SECONDS: Final = 30.0  # without a byte for so long it is lost, and the rest is pulled
AGAIN_SECONDS: Final = 0.2  # between two looks, at the head or for a cancellation


@dataclass(frozen=True, slots=True)
class BroadcastContext:
    """What a node needs to take part."""

    node: str
    """Its name."""
    host: str
    """Under which the others reach it."""
    token: Callable[[], str]
    """Who it is to peers."""
    check: Authenticate
    """Who a peer is."""
    groups: Groups
    """What it tells those whom it leads."""


@dataclass(frozen=True, slots=True)
class BroadcastTask:
    """What a broadcast is to bring, and where to."""

    job: Collective
    plan: Plan
    builder: ImageBuilder
    source: Callable[[], Source]
    """Opened by the head alone."""
    reads: SourceReads
    cancel: threading.Event
    came: ByteCounter
    """Of nothing else."""

    @property
    def cargo(self) -> Cargo:
        """What the group moves."""
        return Cargo(
            self.plan.buckets,
            self.builder,
            lambda chunk: self.came.add(chunk.nbytes),
            self.source,
            self.plan.source,
            self.reads,
            self.cancel,
        )

    def terms(self, secret: bytes) -> Terms:
        """What all members must have in common."""
        about = f"{self.plan.manifest.digest} over {self.plan.base_digest or 'nothing'}"
        largest = max(bucket.nbytes for bucket in self.plan.buckets)
        return Terms(len(self.job.members), about, WINDOW, largest, secret)


@dataclass(frozen=True, slots=True)
class BroadcastResult:
    """What became of a broadcast on this node."""

    nbytes: int
    """Of chunks that were missing here."""
    how: str
    """In a sentence."""
    scheme: str = "mpi"
    """What brought them; the head's come from the source."""


class Broadcasts:
    """`bring` once for each version, from any thread."""

    def __init__(self, means: BroadcastContext, patience_seconds: float) -> None:
        """``patience_seconds``: how long those who are there wait for the others."""
        self._means = means
        self._patience = GroupTimeouts(join_seconds=patience_seconds, stall_seconds=STALL_SECONDS)

    def bring(self, part: BroadcastTask) -> BroadcastResult:
        """Take part, as head or as member, until all has come or the broadcast is lost. Raises
        `Cancelled` only.
        """
        members = part.job.members
        # nothing is missing, or the order is for another node: there is nothing to wait for
        if not part.plan.buckets or self._means.node not in members:
            return BroadcastResult(0, "")
        rank = members.index(self._means.node)
        try:
            found = availability()
            if not found.works:
                raise MpiUnavailable(f"MPI does not work here: {found.because}")
            lost = self._follow(part, rank) if rank else self._lead(part)
        except (HotweightsError, OSError) as error:
            lost = str(error)
        if part.cancel.is_set():
            raise Cancelled("cancelled during a broadcast")
        how = f"by a broadcast to {len(members)} nodes, for which {members[0]} read the source"
        if lost:
            log.warning("the broadcast of %s was lost: %s", part.plan.version, lost)
            how = f"each node for itself, for the broadcast was lost: {lost}"
        return BroadcastResult(
            part.came.nbytes, how, "mpi" if rank else urlsplit(part.plan.source).scheme
        )

    def _lead(self, part: BroadcastTask) -> str:
        """Why not all of it went to all, or ''."""
        terms = part.terms(Groups.new_secret())
        with (
            closing(GroupLeader(self._means.host, 0, terms, 0, self._patience)) as lead,
            _ended_by(part.cancel, lead),
        ):
            self._means.groups.open(part.job.name, part.job.members, lead.port, terms.secret)
            try:
                lead.gather()
            finally:
                self._means.groups.close(part.job.name)  # who comes now comes too late
            return bring(lead, part.cargo, STALL_SECONDS)

    def _follow(self, part: BroadcastTask, rank: int) -> str:
        """Why not all of it came, or ''."""
        host, invitation = self._invited(part.job, part.cancel)
        if invitation.over:
            return "the others began without this node"
        terms = part.terms(invitation.secret)
        follow = GroupMember(rank, host, invitation.port, terms, 0, self._patience)
        with closing(follow), _ended_by(part.cancel, follow):
            follow.gather()
            return bring(follow, part.cargo, STALL_SECONDS)

    def _invited(self, job: Collective, cancel: threading.Event) -> tuple[str, Invitation]:
        """Asks until the head leads the group; that may be a moment later."""
        address = urlsplit(job.head)
        uri = f"tcp://{address.netloc}"
        deadline = time.monotonic() + self._patience.join_seconds
        with transport_for(uri).connect(uri, self._means.token, key=job.head_key) as client:
            while True:
                try:
                    return address.hostname or "", accept(
                        client, job.name, job.members[0], self._means.check
                    )
                except (PeerMissing, PeerUnreachable):
                    if time.monotonic() >= deadline:
                        raise
                if cancel.wait(AGAIN_SECONDS):
                    raise Cancelled("cancelled while it waited for an invitation")


@contextlib.contextmanager
def _ended_by(cancel: threading.Event, group: GroupLeader | GroupMember) -> Iterator[None]:
    """Nobody waits in the group any more once ``cancel`` is set."""
    through = threading.Event()

    def watch() -> None:
        while not through.wait(AGAIN_SECONDS):
            if cancel.is_set():
                group.close()
                return

    watcher = threading.Thread(target=watch, name="broadcast's end", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        through.set()
        watcher.join()
