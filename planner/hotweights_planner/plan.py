"""The plan: which bytes of the next version have to move, in which order and in which buckets.

A plan is a pure function of two manifests and a few options, and it carries the next manifest
whole. So nothing in it has to be trusted: `parse` makes it anew out of what cannot be computed
(which chunks are missing, who needs them, the bucket's size) and takes only what comes out the
same. A part of a chunk is an item like any other; the chunk is verified when all its parts are
there.

It knows nothing of who has which bytes or how they travel, and opens no URI.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple
from urllib.parse import quote

from hotweights_planner.buckets import DEFAULT_BUCKET_NBYTES, buckets
from hotweights_planner.consumers import GroupMap, Ranks, consumers_by_digest
from hotweights_planner.delta import delta
from hotweights_planner.errors import BadPlan
from hotweights_planner.manifest import Chunk, Manifest, Tensor
from hotweights_planner.plan_document import (
    PLAN_VERSION,
    bucket_fault,
    difference,
    dumps,
    read_document,
    source_fault,
)

FILE_NAME = "transfer.plan.json"


class Item(NamedTuple):
    """A chunk in its bucket, or a part of one. Offsets and sizes are in bytes."""

    chunk: Chunk
    offset: int  # in the bucket
    chunk_offset: int  # in the chunk: 0 unless it is split
    nbytes: int

    @property
    def tensor(self) -> str:
        """Name of its tensor, as `buckets.Piece` has it."""
        return self.chunk.tensor

    @property
    def number(self) -> int:
        """The chunk's number in the tensor."""
        return self.chunk.number

    @property
    def is_part(self) -> bool:
        """Whether the chunk is larger than a bucket and this is a part of it."""
        return self.nbytes != self.chunk.nbytes

    @property
    def is_last(self) -> bool:
        """Whether the chunk is whole with this item."""
        return self.chunk_offset + self.nbytes == self.chunk.nbytes

    @property
    def key(self) -> str:
        """``<tensor>:<number>``, and ``+<chunk_offset>`` behind it where the chunk is split."""
        name = f"{self.chunk.tensor}:{self.chunk.number}"
        return f"{name}+{self.chunk_offset}" if self.is_part else name

    @property
    def file_offset(self) -> int:
        """Where it begins in the checkpoint's file ``chunk.file``."""
        return self.chunk.offset + self.chunk_offset


@dataclass(frozen=True, slots=True)
class PlanBucket:
    """Items that travel together. ``consumers`` None: every rank needs them."""

    bucket_id: int
    nbytes: int
    consumers: Ranks | None
    pieces: tuple[Chunk | Item, ...]
    """Whole chunks, and the parts of others, whose ``offset`` is not set: a plan may have a million
    of them.
    """

    @property
    def items(self) -> tuple[Item, ...]:
        """Everything in its place: ``offset`` counts from the bucket's begin. Made anew at every
        call.
        """
        placed: list[Item] = []
        offset = 0
        new = tuple.__new__  # as in `Manifest.first_chunks`
        for piece in self.pieces:
            nbytes = piece.nbytes
            chunk, chunk_offset = (
                (piece, 0) if isinstance(piece, Chunk) else (piece.chunk, piece.chunk_offset)
            )
            placed.append(new(Item, (chunk, offset, chunk_offset, nbytes)))
            offset += nbytes
        return tuple(placed)

    @property
    def digests(self) -> set[str]:
        """The chunks that it has anything of."""
        return {
            piece.blake3 if isinstance(piece, Chunk) else piece.chunk.blake3
            for piece in self.pieces
        }


@dataclass(frozen=True)
class Plan:
    """Made by `build` or `parse`; compared by `digest`. Frozen, so any thread may read it."""

    manifest: Manifest
    base_version: str | None
    base_digest: str | None
    source: str
    """URI of the folder that has the next version."""
    bucket_nbytes: int
    removed: tuple[str, ...]
    """Tensors of the base that the next version lacks."""
    buckets: tuple[PlanBucket, ...]

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def model_id(self) -> str:
        return self.manifest.model

    @cached_property
    def total_nbytes(self) -> int:
        """Bytes to move: each distinct chunk once."""
        return sum(bucket.nbytes for bucket in self.buckets)

    @cached_property
    def unchanged_nbytes(self) -> int:
        """Bytes of the next version that the base has."""
        moved: set[str] = set().union(*(bucket.digests for bucket in self.buckets))
        whole = self.manifest.chunk_bytes
        return sum(
            min(whole, tensor.nbytes - index * whole)
            for tensor in self.manifest.tensors
            if not moved.issuperset(tensor.chunks)
            for index, digest in enumerate(tensor.chunks)
            if digest not in moved
        )

    @cached_property
    def item_count(self) -> int:
        """Items of all buckets; a split chunk counts once for each of its parts."""
        return sum(len(bucket.pieces) for bucket in self.buckets)

    def chunks_in_order(self) -> Iterator[tuple[Chunk, ...]]:
        """Per bucket the chunks that are whole once it has come; a split chunk counts where its
        last part is.
        """
        for bucket in self.buckets:
            yield tuple(item.chunk for item in bucket.items if item.is_last)

    @cached_property
    def canonical(self) -> bytes:
        """The one spelling of the plan, without a verification: sorted keys, no blanks."""
        return self._head + self._tail

    @cached_property
    def digest(self) -> str:
        """``sha256:`` and 64 hexadecimal digits of the canonical bytes."""
        return "sha256:" + hashlib.sha256(self.canonical).hexdigest()

    def text(self, verification: Mapping[str, Any] | None = None) -> bytes:
        """What is written and sent, UTF-8: `canonical`, or with ``verification`` before the
        version.
        """
        if verification is None:
            return self.canonical
        return b"".join(
            [
                self._head,
                b',"verification":',
                # `parse` has here whatever came: a lone surrogate is no reason to raise
                dumps(verification).encode(errors="surrogatepass"),
                self._tail,
            ]
        )

    @cached_property
    def _head(self) -> bytes:
        tensors = {tensor.name: tensor for tensor in self.manifest.tensors}
        fields = {
            "base_digest": dumps(self.base_digest),
            "base_version": dumps(self.base_version),
            "bucket_bytes": str(self.bucket_nbytes),
            "buckets": "["
            + ",".join(_bucket_text(bucket, tensors, self.source) for bucket in self.buckets)
            + "]",
            "manifest": self.manifest.canonical.decode(),
            "manifest_digest": dumps(self.manifest.digest),
            "model_id": dumps(self.model_id),
            "plan_version": dumps(PLAN_VERSION),
            "removed": dumps(self.removed),
            "source": dumps(self.source),
            "total_bytes": str(self.total_nbytes),
            "unchanged_bytes": str(self.unchanged_nbytes),
        }
        return ("{" + ",".join(f'"{name}":{value}' for name, value in fields.items())).encode()

    @property
    def _tail(self) -> bytes:
        return f',"version":{dumps(self.version)}}}'.encode()

    def document(self) -> dict[str, Any]:
        """The plan as an object of plain lists and dictionaries, for name maps and other people's
        code.
        """
        document: dict[str, Any] = json.loads(self.canonical)
        return document


def build(
    following: Manifest,
    base: Manifest | None,
    source_uri: str,
    bucket_nbytes: int = DEFAULT_BUCKET_NBYTES,
    group_map: GroupMap | None = None,
    renamed: bool = False,
) -> Plan:
    """The plan that leads from ``base`` (None: from nothing) to ``following``, whose folder is at
    ``source_uri``.

    A base of another model is refused, unless the caller knows that the model was only ``renamed``.
    Raises `BadPlan` for that, and for a source or a size of buckets that no plan may have.
    """
    where = f"plan for {following.model} {following.version}"
    fault = source_fault(source_uri) or bucket_fault(bucket_nbytes)
    if fault:
        raise BadPlan(where, fault, "name another")
    if base is not None and base.model != following.model and not renamed:
        text = f"the previous manifest is of another model, {base.model} ({base.version})"
        raise BadPlan(
            where,
            text,
            "give a previous manifest of the same model, or publish both with the same --model",
        )
    present = {digest for tensor in base.tensors for digest in tensor.chunks} if base else set()
    names = {tensor.name for tensor in following.tensors}
    return Plan(
        manifest=following,
        base_version=base.version if base else None,
        base_digest=base.digest if base else None,
        source=source_uri,
        bucket_nbytes=bucket_nbytes,
        removed=tuple(tensor.name for tensor in base.tensors if tensor.name not in names)
        if base
        else (),
        buckets=_packed(
            following.first_chunks(delta(following, present).missing),
            bucket_nbytes,
            consumers_by_digest(following, group_map) if group_map else {},
        ),
    )


def parse(text: bytes, where: str = "plan") -> Plan:
    """The plan that ``text`` (UTF-8) spells. Everything in it is checked; what can be computed must
    be what comes out. Raises `BadPlan`, with ``where`` in it.
    """
    found = read_document(text, where)
    plan = Plan(
        found.manifest, found.base_version, found.base_digest, found.source, found.bucket_nbytes, found.removed,
        _packed(found.chunks, found.bucket_nbytes, found.consumers),
    )  # fmt: skip
    if plan.base_digest is None and plan.unchanged_nbytes:
        raise BadPlan(
            where,
            f"it has no base, and {plan.unchanged_nbytes} bytes of its manifest are in no bucket",
        )
    # another spelling, which is let pass, or another plan, which is not
    if plan.text(found.verification) != text:
        document = json.loads(text)
        document.pop("verification", None)
        if fault := difference(document, plan.document()):
            raise BadPlan(where, fault)
    if found.verification is not None and found.verification.get("digest") != plan.digest:
        raise BadPlan(where, "it is not the plan that its verification speaks of")
    return plan


def _packed(
    chunks: Iterable[Chunk], bucket_nbytes: int, consumers: Mapping[str, Ranks]
) -> tuple[PlanBucket, ...]:
    """In load order; a bucket ends where others need the next chunk."""
    made: list[PlanBucket] = []
    runs = (
        groupby(chunks, key=lambda chunk: consumers.get(chunk.blake3))
        if consumers
        else [(None, chunks)]
    )
    for ranks, run in runs:
        for packed in buckets(_parts(run, bucket_nbytes), bucket_nbytes):
            made.append(PlanBucket(len(made), packed.nbytes, ranks, packed.chunks))
    return tuple(made)


def _parts(chunks: Iterable[Chunk], bucket_nbytes: int) -> Iterator[Chunk | Item]:
    """What is larger than a bucket in parts, whose place is not known yet."""
    for chunk in chunks:
        if chunk.nbytes <= bucket_nbytes:
            yield chunk
        else:
            for begin in range(0, chunk.nbytes, bucket_nbytes):
                yield Item(chunk, 0, begin, min(bucket_nbytes, chunk.nbytes - begin))


def _bucket_text(bucket: PlanBucket, tensors: Mapping[str, Tensor], source: str) -> str:
    consumers = (
        f'"consumer_ranks":{dumps(bucket.consumers)},' if bucket.consumers is not None else ""
    )
    items: list[str] = []
    tensor, file, key, rest, uri = None, None, "", "", ""
    for chunk, offset, chunk_offset, nbytes in bucket.items:
        if tensor is None or tensor.name != chunk.tensor:
            tensor = tensors[chunk.tensor]
            name = dumps(tensor.name)
            key = f'"key":{name[:-1]}:'  # without the closing quote: the chunk's number follows
            shape = ",".join(map(str, tensor.shape))
            rest = f'"shape":[{shape}],"shard_rank":0,"tensor":{name},"tensor_offset":'
            if file != tensor.file:
                file = tensor.file
                uri = f',"uri":{dumps(source.rstrip("/") + "/" + quote(file))}}}'
        part, suffix = "", ""
        if nbytes != chunk.nbytes:
            part, suffix = (
                f'"chunk_nbytes":{chunk.nbytes},"chunk_offset":{chunk_offset},',
                f"+{chunk_offset}",
            )
        begin = chunk.offset + chunk_offset
        items.append(
            f'{{{part}"dtype":"{tensor.dtype}","file_offset":{begin},"hash":"blake3:{chunk.blake3}",'
            f'{key}{chunk.number}{suffix}","nbytes":{nbytes},"offset":{offset},{rest}{begin - tensor.offset}{uri}'
        )
    return f'{{"bucket_id":{bucket.bucket_id},{consumers}"items":[{",".join(items)}],"size":{bucket.nbytes}}}'
