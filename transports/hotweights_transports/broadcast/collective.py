"""The buckets of a plan through a group's collective, from rank 0's source into everybody's image.

Rank 0 reads the plan's buckets, verifies each chunk, keeps it and puts it into a slot; a slot that
is full and whose turn it is, is posted. The others post every slot in the same order, and verify
and keep what came while the next ones flow. Every rank gets every bucket and leaves alone what it
does not need: in a chain the bytes pass through it anyway, and a communicator per set of consumers
would be one more thing that all have to enter together.

A collective that is lost is no error here: `send` and `receive` say so, and what is missing then is
to be pulled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from hotweights_planner.manifest import Chunk
from hotweights_planner.plan import Item, PlanBucket
from hotweights_storage.errors import ChecksumMismatch
from hotweights_storage.image import ImageBuilder
from hotweights_storage.reader import Limits, read_chunks
from hotweights_storage.source_reads import SourceReads
from hotweights_storage.sources.base import Source
from hotweights_transports.broadcast.hydra import MpiFailed
from hotweights_transports.broadcast.leader import GroupLeader
from hotweights_transports.broadcast.member import GroupMember
from hotweights_transports.broadcast.rank_process import RankProcess

VERIFIERS: Final = 2
FINISH_SECONDS: Final = 10.0  # for all to leave MPI together, after everything has come

Kept = Callable[[Chunk], None]
"""Told of each chunk that was verified and stored; from any thread."""


@dataclass(frozen=True, slots=True)
class Cargo:
    """What a broadcast brings to a node, and where to."""

    buckets: Sequence[PlanBucket]
    builder: ImageBuilder
    kept: Kept
    source: Callable[[], Source]
    """Opened by rank 0 alone."""
    uri: str = "the source"
    """Its name in errors."""
    reads: SourceReads = field(default_factory=SourceReads)
    """How rank 0 reads it."""
    stop: threading.Event | None = None
    """Set when rank 0 is to stop reading."""


def bring(group: GroupLeader | GroupMember, cargo: Cargo, stall_seconds: float) -> str:
    """This node's part, after `gather`: whichever side of the group it is. Returns why not all of
    it came, or ''. Raises what rank 0's source does.
    """
    if isinstance(group, GroupMember):
        return receive(group, cargo, stall_seconds)
    return cargo.reads.read(
        cargo.uri,
        cargo.source,
        lambda source, limits: send(group, cargo, source, limits, stall_seconds),
        cargo.stop,
    )


def send(
    lead: GroupLeader, cargo: Cargo, source: Source, limits: Limits, stall_seconds: float
) -> str:
    """Rank 0's part: read everything once, and send it along for as long as the others can hear it.
    Returns why they could not hear all of it, or ''. Raises what the source does, and
    `ChecksumMismatch` before a wrong chunk is sent; then the collective is over for all. Called in
    the head's own thread; `cargo.kept` in the readers'.
    """
    slots = _Slots(lead.member, cargo.buckets, stall_seconds)
    parts = _ChunkAssembler(cargo.builder, cargo.kept, source.uri)
    if lead.member is None:
        slots.fail(lead.why)
    try:
        read_chunks(
            source,
            slots.pieces(),
            lambda piece, data: slots.take(piece, data, parts),
            limits=limits,
            failing=lambda _: slots.fail("gone"),
        )
        slots.send_slot()
    except BaseException as error:
        slots.fail("gone")
        lead.give_up(f"rank 0 gave up: {error}")
        raise
    finally:
        slots.close()
    if slots.lost:
        lead.give_up(slots.lost)
    elif lead.member is not None:
        lead.member.finish(FINISH_SECONDS)
    return slots.lost


def receive(follow: GroupMember, cargo: Cargo, stall_seconds: float) -> str:
    """Every other rank's part, to the end also when nothing is missing here: the others need this
    rank. Returns why not all of it came, or ''. A chunk that is not what it should be is left
    missing. Called in the member's own thread; `cargo.kept` in the verifiers'.
    """
    member = follow.member
    if member is None:
        return follow.why or "there is no collective"
    buckets = cargo.buckets
    parts = _ChunkAssembler(cargo.builder, cargo.kept, follow.address)
    done, whole = 0, False
    try:
        with ThreadPoolExecutor(VERIFIERS, thread_name_prefix="verify") as pool:
            for slot in _completions(member, buckets, stall_seconds):
                with member.view(slot) as view:
                    # list: wait for all of them, and raise what they raise, before the slot is
                    # posted again
                    list(
                        pool.map(
                            parts.take_or_leave,
                            buckets[done].items,
                            [view] * len(buckets[done].items),
                        )
                    )
                done += 1
                follow.progressed()
        whole = True
    except MpiFailed as error:
        return f"{follow.reason() or error} (after {done} of {len(buckets)} buckets)"
    finally:
        if not whole:
            follow.give_up("this rank left the collective")
    member.finish(FINISH_SECONDS)
    return f"{parts.wrong} chunks came wrong" if parts.wrong else ""


def _completions(
    member: RankProcess, buckets: Sequence[PlanBucket], stall_seconds: float
) -> Iterator[int]:
    """Slots in the order of the buckets; one is posted again when its taker is through with it."""
    for number, bucket in enumerate(buckets[: member.slots]):
        member.post(number, bucket.nbytes)
    for number in range(len(buckets)):
        slot = member.completed(stall_seconds)
        if slot != number % member.slots:
            raise MpiFailed(f"slot {slot} came instead of {number % member.slots}")
        yield slot
        if number + member.slots < len(buckets):
            member.post(slot, buckets[number + member.slots].nbytes)


class _ChunkAssembler:
    """From items to verified chunks in the image: whole ones at once, split ones when their last
    part is here.
    """

    def __init__(self, builder: ImageBuilder, kept: Kept, source: str) -> None:
        self._builder = builder
        self._kept = kept
        self._source = source
        self._begun: dict[str, tuple[bytearray, list[int]]] = {}
        self._lock = threading.Lock()
        self.wrong = 0
        """How many chunks were not what they should be."""

    def take(self, item: Item, data: memoryview) -> None:
        """Keep one item's bytes: a whole chunk at once, a part when it is the last that lacks.
        Raises `ChecksumMismatch`. From any thread.
        """
        chunk = item.chunk
        if self._builder.has(chunk.blake3):  # this node had it before; others did not
            return
        if not item.is_part:
            self._keep(chunk, data)
            return
        with self._lock:
            buffer, left = self._begun.setdefault(
                chunk.blake3, (bytearray(chunk.nbytes), [chunk.nbytes])
            )
            buffer[item.chunk_offset : item.chunk_offset + item.nbytes] = data
            left[0] -= item.nbytes
            if left[0]:
                return
            del self._begun[chunk.blake3]
        with memoryview(buffer) as view:
            self._keep(chunk, view)

    def take_or_leave(self, item: Item, bucket: memoryview) -> None:
        """An item of a bucket; one that is wrong stays missing. It is copied first: the rank's
        process shares the slot, and could write to it between the hash and the image.
        """
        if self._builder.has(item.chunk.blake3):
            return
        data = bytes(bucket[item.offset : item.offset + item.nbytes])
        try:
            self.take(item, memoryview(data))
        except ChecksumMismatch:
            self.wrong += 1

    def _keep(self, chunk: Chunk, data: memoryview) -> None:
        if self._builder.put(chunk.blake3, data, self._source):
            self._kept(chunk)


class _Slots:
    """Where rank 0's readers bring items, in any order, and slots leave, in the buckets' order."""

    def __init__(
        self, member: RankProcess | None, buckets: Sequence[PlanBucket], stall_seconds: float
    ) -> None:
        self.lost = ""
        """Why nobody hears us any more."""
        self._member = member
        self._slots = member.slots if member is not None else 0
        self._buckets = buckets
        self._stall_seconds = stall_seconds
        self._changed = threading.Condition()  # of what follows
        # what is being read, by file and offset
        self._items: dict[tuple[str, int], tuple[int, Item]] = {}
        self._lacking = [len(bucket.items) for bucket in buckets]
        self._posted = self._completed = 0
        self._closing = False
        self._watcher = threading.Thread(target=self._watch, name="mpi slots", daemon=True)
        self._watcher.start()

    def pieces(self) -> Iterator[Chunk]:
        """What to read, in order, an item at a time."""
        for number, bucket in enumerate(self._buckets):
            for item in bucket.items:
                with self._changed:
                    self._items[item.chunk.file, item.file_offset] = number, item
                yield item.chunk._replace(offset=item.file_offset, nbytes=item.nbytes)

    def take(self, piece: Chunk, data: memoryview, parts: _ChunkAssembler) -> None:
        """Verify and keep it, then put it into its slot, as soon as that is free."""
        with self._changed:
            number, item = self._items.pop((piece.file, piece.offset))
        # verified before it is sent, and kept also when nobody can hear it any more
        parts.take(item, data)
        with self._changed:
            self._changed.wait_for(lambda: self.lost or number < self._completed + self._slots)
        if self.lost or self._member is None:  # it is kept here, and the others pull it
            return
        with self._member.view(number % self._slots) as slot:
            slot[item.offset : item.offset + item.nbytes] = data
        with self._changed:
            self._lacking[number] -= 1
            self._post_full(self._member)

    def send_slot(self) -> None:
        """Until everything has been sent, or cannot be."""
        with self._changed:
            self._changed.wait_for(lambda: self.lost or self._completed == len(self._buckets))

    def fail(self, why: str) -> None:
        """There is nobody to send to any more."""
        with self._changed:
            if self._completed < len(self._buckets):
                self.lost = self.lost or why or "there is no collective"
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread that waits for completions; it is hung up on when the collective is
        lost.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self.lost and self._member is not None:
            self._member.hang_up()
        self._watcher.join()

    def _post_full(self, member: RankProcess) -> None:
        try:
            while self._posted < len(self._buckets) and self._lacking[self._posted] == 0:
                member.post(self._posted % self._slots, self._buckets[self._posted].nbytes)
                self._posted += 1
        except MpiFailed as error:
            self.fail(str(error))
        self._changed.notify_all()

    def _watch(self) -> None:
        """Take note of what is through."""
        while (member := self._member) is not None:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._posted > self._completed or self.lost or self._closing
                )
                if self.lost or self._posted == self._completed:
                    return
            try:
                slot = member.completed(self._stall_seconds)
                if slot != self._completed % self._slots:
                    raise MpiFailed(
                        f"slot {slot} is through instead of {self._completed % self._slots}"
                    )
            except MpiFailed as error:
                self.fail(f"{error} (after {self._completed} of {len(self._buckets)} buckets)")
                return
            with self._changed:
                self._completed += 1
                self._changed.notify_all()
