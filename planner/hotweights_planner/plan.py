"""The plan: which bytes of the next version have to move, in which order and in which buckets.

A plan is a pure function of two manifests and a few options, and it carries the next manifest whole. So nothing in it has to be
trusted: `parse` makes it anew out of what cannot be computed (which chunks are missing, who needs them, the bucket's size) and
takes only what comes out the same. A part of a chunk is an item like any other; the chunk is verified when all its parts are there.

It knows nothing of who has which bytes or how they travel, and opens no URI.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from hotweights_planner import manifest as manifests
from hotweights_planner.buckets import DEFAULT_BUCKET_NBYTES, buckets
from hotweights_planner.consumers import GroupMap, Ranks, consumers_by_digest, is_ranks
from hotweights_planner.delta import delta
from hotweights_planner.errors import BadManifest, BadPlan
from hotweights_planner.header import MAX_INTEGER, check_tensor_name
from hotweights_planner.manifest import PAGE_NBYTES, Chunk, Manifest, Tensor

PLAN_VERSION: Final = "1"
FILE_NAME = "transfer.plan.json"
MAX_PLAN_NBYTES = 1 << 30
MIN_BUCKET_NBYTES = PAGE_NBYTES
MAX_BUCKET_NBYTES = 1 << 40
MAX_SOURCE_NBYTES = 4096

_FIELDS = {
    "plan_version", "model_id", "version", "base_version", "manifest_digest", "base_digest", "source", "bucket_bytes",
    "total_bytes", "unchanged_bytes", "removed", "manifest", "buckets",
}  # fmt: skip


class Item(NamedTuple):
    """A chunk in its bucket, or a part of one."""

    chunk: Chunk
    offset: int  # in the bucket
    chunk_offset: int  # in the chunk: 0 unless it is split
    nbytes: int

    @property
    def tensor(self) -> str:
        """The tensor's name."""
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
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Plan:
    """Made by `build` or `parse`; compared by `digest`."""

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
        """Name of the next version."""
        return self.manifest.version

    @property
    def model_id(self) -> str:
        """Name of the model."""
        return self.manifest.model

    @cached_property
    def total_nbytes(self) -> int:
        """Bytes to move: each distinct chunk once."""
        return sum(bucket.nbytes for bucket in self.buckets)

    @cached_property
    def unchanged_nbytes(self) -> int:
        """Bytes of the next version that the base has."""
        moved = {item.chunk.blake3 for bucket in self.buckets for item in bucket.items}
        return sum(
            min(self.manifest.chunk_bytes, tensor.nbytes - index * self.manifest.chunk_bytes)
            for tensor in self.manifest.tensors
            for index, digest in enumerate(tensor.chunks)
            if digest not in moved
        )

    @cached_property
    def item_count(self) -> int:
        """Items of all buckets."""
        return sum(len(bucket.items) for bucket in self.buckets)

    def chunks_in_order(self) -> Iterator[tuple[Chunk, ...]]:
        """Per bucket the chunks that are whole once it has come; a split chunk counts where its last part is."""
        for bucket in self.buckets:
            yield tuple(item.chunk for item in bucket.items if item.is_last)

    @cached_property
    def canonical(self) -> bytes:
        """The one spelling of the plan, without a verification."""
        return self.text()

    @cached_property
    def digest(self) -> str:
        """``sha256:`` and 64 hexadecimal digits of the canonical bytes."""
        return "sha256:" + hashlib.sha256(self.canonical).hexdigest()

    def text(self, verification: Mapping[str, Any] | None = None) -> bytes:
        """The plan as JSON: sorted keys, no blanks."""
        tensors = {tensor.name: tensor for tensor in self.manifest.tensors}
        fields = {
            "base_digest": _dumps(self.base_digest),
            "base_version": _dumps(self.base_version),
            "bucket_bytes": str(self.bucket_nbytes),
            "buckets": "[" + ",".join(_bucket_text(bucket, tensors, self.source) for bucket in self.buckets) + "]",
            "manifest": self.manifest.canonical.decode(),
            "manifest_digest": _dumps(self.manifest.digest),
            "model_id": _dumps(self.model_id),
            "plan_version": _dumps(PLAN_VERSION),
            "removed": _dumps(self.removed),
            "source": _dumps(self.source),
            "total_bytes": str(self.total_nbytes),
            "unchanged_bytes": str(self.unchanged_nbytes),
        }
        if verification is not None:
            fields["verification"] = _dumps(verification)
        fields["version"] = _dumps(self.version)
        return ("{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}").encode()

    def document(self) -> dict[str, Any]:
        """The plan as an object of plain lists and dictionaries, for name maps and other people's code."""
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
    """The plan that leads from ``base`` (None: from nothing) to ``following``, whose folder is at ``source_uri``.

    A base of another model is refused, unless the caller knows that the model was only ``renamed``.
    """
    where = f"plan for {following.model} {following.version}"
    fault = _source_fault(source_uri) or _bucket_fault(bucket_nbytes)
    if fault:
        raise BadPlan(where, fault, "name another")
    if base is not None and base.model != following.model and not renamed:
        text = f"the previous manifest is of another model, {base.model} ({base.version})"
        raise BadPlan(where, text, "give a previous manifest of the same model, or publish both with the same --model")
    present = {digest for tensor in base.tensors for digest in tensor.chunks} if base else set()
    names = {tensor.name for tensor in following.tensors}
    return Plan(
        manifest=following,
        base_version=base.version if base else None,
        base_digest=base.digest if base else None,
        source=source_uri,
        bucket_nbytes=bucket_nbytes,
        removed=tuple(tensor.name for tensor in base.tensors if tensor.name not in names) if base else (),
        buckets=_packed(
            delta(following, present).missing,
            bucket_nbytes,
            consumers_by_digest(following, group_map) if group_map else {},
        ),
    )


def parse(text: bytes, where: str = "plan") -> Plan:
    """The plan that ``text`` spells. Everything in it is checked; what can be computed must be what comes out."""
    if len(text) > MAX_PLAN_NBYTES:
        raise BadPlan(where, f"{len(text)} bytes; a plan has at most {MAX_PLAN_NBYTES}", "use larger buckets")
    document = _object(text, where)
    manifest = _manifest_of(document, where)
    wanted, consumers = _wanted(document["buckets"], where)
    chunks = tuple(manifest.first_chunks(wanted))
    if len(chunks) != len(wanted):
        raise BadPlan(where, f"{len(wanted) - len(chunks)} chunks of its buckets are not in its manifest")
    bucket_nbytes, source = document["bucket_bytes"], document["source"]
    fault = _source_fault(source) or _bucket_fault(bucket_nbytes) or _base_fault(document, manifest)
    if fault:
        raise BadPlan(where, fault)
    count = sum(len(bucket["items"]) for bucket in document["buckets"])
    expected_count = sum(-(-chunk.nbytes // bucket_nbytes) for chunk in chunks)
    if count != expected_count:  # before so many are made
        raise BadPlan(where, f"{count} items, and its chunks and bucket_bytes make {expected_count}")
    plan = Plan(
        manifest, document["base_version"], document["base_digest"], source, bucket_nbytes,
        tuple(document["removed"]), _packed(chunks, bucket_nbytes, consumers),
    )  # fmt: skip
    if plan.base_digest is None and plan.unchanged_nbytes:
        raise BadPlan(where, f"it has no base, and {plan.unchanged_nbytes} bytes of its manifest are in no bucket")
    verification = document.pop("verification", None)
    if plan.canonical != text:
        difference = _difference(document, plan.document())
        if difference:
            raise BadPlan(where, difference)
    if verification is not None and (not isinstance(verification, dict) or verification.get("digest") != plan.digest):
        raise BadPlan(where, "it is not the plan that its verification speaks of")
    return plan


def _packed(chunks: Iterable[Chunk], bucket_nbytes: int, consumers: Mapping[str, Ranks]) -> tuple[PlanBucket, ...]:
    made: list[PlanBucket] = []
    for ranks, run in groupby(chunks, key=lambda chunk: consumers.get(chunk.blake3)):
        for packed in buckets(_split(run, bucket_nbytes), bucket_nbytes):
            items: list[Item] = []
            offset = 0
            for chunk, _, chunk_offset, nbytes in packed.chunks:
                items.append(Item(chunk, offset, chunk_offset, nbytes))
                offset += nbytes
            made.append(PlanBucket(len(made), offset, ranks, tuple(items)))
    return tuple(made)


def _split(chunks: Iterable[Chunk], bucket_nbytes: int) -> Iterator[Item]:
    for chunk in chunks:
        for begin in range(0, chunk.nbytes, bucket_nbytes):
            yield Item(chunk, 0, begin, min(bucket_nbytes, chunk.nbytes - begin))


def _bucket_text(bucket: PlanBucket, tensors: Mapping[str, Tensor], source: str) -> str:
    consumers = f'"consumer_ranks":{_dumps(bucket.consumers)},' if bucket.consumers is not None else ""
    items: list[str] = []
    for name, group in groupby(bucket.items, key=lambda item: item.chunk.tensor):
        tensor = tensors[name]
        uri = _dumps(f"{source.rstrip('/')}/{quote(tensor.file)}")
        shape = ",".join(map(str, tensor.shape))
        known = f'"shape":[{shape}],"shard_rank":0,"tensor":{_dumps(name)},"tensor_offset":'
        for item in group:
            chunk = item.chunk
            part = f'"chunk_nbytes":{chunk.nbytes},"chunk_offset":{item.chunk_offset},' if item.is_part else ""
            items.append(
                f'{{{part}"dtype":"{tensor.dtype}","file_offset":{item.file_offset},"hash":"blake3:{chunk.blake3}",'
                f'"key":{_dumps(item.key)},"nbytes":{item.nbytes},"offset":{item.offset},'
                f'{known}{item.file_offset - tensor.offset},"uri":{uri}}}'
            )
    return f'{{"bucket_id":{bucket.bucket_id},{consumers}"items":[{",".join(items)}],"size":{bucket.nbytes}}}'


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and too many digits are ValueErrors
        raise BadPlan(where, f"it is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BadPlan(where, "it is not a JSON object")
    version = document.get("plan_version")
    if version != PLAN_VERSION:
        text = f"plan_version is {ascii(version)[:40]}, and {PLAN_VERSION!r} is what can be read"
        raise BadPlan(where, text, "make it with this release's `hotweights plan`")
    if missing := sorted(_FIELDS - document.keys()):
        raise BadPlan(where, f"it lacks {', '.join(missing)}")
    if unknown := sorted(document.keys() - _FIELDS - {"verification"}):
        raise BadPlan(where, f"it has the unknown field {unknown[0]!a}"[:200])
    return document


def _manifest_of(document: Mapping[str, Any], where: str) -> Manifest:
    digest = document["manifest_digest"]
    if not isinstance(digest, str):
        raise BadPlan(where, "manifest_digest is no digest")
    try:
        return manifests.parse(_dumps(document["manifest"]).encode(), f"{where}: manifest", digest)
    except (UnicodeEncodeError, RecursionError) as error:  # a lone surrogate, or brackets without end
        raise BadPlan(where, "its manifest is not Unicode, or nested too deeply") from error
    except BadManifest as error:
        raise BadPlan(error.where, error.what) from error


def _wanted(found: Any, where: str) -> tuple[set[str], dict[str, Ranks]]:
    """The digests that the buckets name, and for whom: all that is taken from them."""
    if not isinstance(found, list):
        raise BadPlan(where, "buckets is not a list")
    wanted: set[str] = set()
    consumers: dict[str, Ranks] = {}
    for number, bucket in enumerate(found):
        if not isinstance(bucket, dict) or not isinstance(items := bucket.get("items"), list):
            raise BadPlan(where, f"bucket {number} has no list of items")
        try:
            digests = [item["hash"].removeprefix("blake3:") for item in items]
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            raise BadPlan(where, f"bucket {number} has an item without a hash") from error
        if not all(type(digest) is str for digest in digests):
            raise BadPlan(where, f"bucket {number} has an item without a hash")
        wanted.update(digests)
        if "consumer_ranks" in bucket:
            if not is_ranks(bucket["consumer_ranks"]):
                raise BadPlan(where, f"consumer_ranks of bucket {number} are not ascending ranks, each once")
            consumers.update(dict.fromkeys(digests, tuple(bucket["consumer_ranks"])))
    return wanted, consumers


def _source_fault(source: object) -> str | None:
    if not isinstance(source, str) or "://" not in source:
        return f"the source {ascii(source)[:80]} is no URI"
    if not source.isascii() or not source.isprintable() or len(source) > MAX_SOURCE_NBYTES or " " in source:
        return f"the source {ascii(source)[:80]} is not percent-encoded"
    return None


def _bucket_fault(bucket_nbytes: object) -> str | None:
    if type(bucket_nbytes) is not int or not MIN_BUCKET_NBYTES <= bucket_nbytes <= MAX_BUCKET_NBYTES:
        text = f"a bucket has {MIN_BUCKET_NBYTES} to {MAX_BUCKET_NBYTES} bytes"
        return f"{text}, not {ascii(bucket_nbytes)[:40]}"
    return None


def _base_fault(document: Mapping[str, Any], manifest: Manifest) -> str | None:
    version, digest, removed = document["base_version"], document["base_digest"], document["removed"]
    if (version is None) != (digest is None):
        return "base_version and base_digest belong together"
    if digest is not None and not (
        isinstance(digest, str) and manifests.is_digest(digest) and manifests.is_label(version)
    ):
        return "base_version is no version, or base_digest no digest"
    if not isinstance(removed, list) or not all(isinstance(name, str) for name in removed):
        return "removed is not a list of names"
    if removed and digest is None:
        return "it has no base, and removes tensors"
    if len({*removed, *(tensor.name for tensor in manifest.tensors)}) != len(removed) + len(manifest.tensors):
        return "removed names a tensor twice, or one that its manifest has"
    for name in removed:
        try:
            fault = check_tensor_name(name)
        except UnicodeEncodeError:
            fault = "is not Unicode"
        if fault:
            return f"the removed tensor's name {ascii(name)[:80]} {fault}"
    return None


def _difference(found: Any, expected: Any, path: str = "") -> str | None:
    """Where ``found`` is not ``expected``, for a person to read."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in sorted(expected.keys() | found.keys()):
            if name not in found or name not in expected:
                return f"{path}{name!a}"[:200] + (" is missing" if name not in found else " should not be there")
            if found[name] != expected[name]:
                return _difference(found[name], expected[name], f"{path}{name}.")
        return None
    if isinstance(expected, list) and isinstance(found, list):
        if len(found) != len(expected):
            return f"{path.rstrip('.')} has {len(found)} entries, and {len(expected)} come out"
        for index, (left, right) in enumerate(zip(found, expected, strict=True)):
            if left != right:
                return _difference(left, right, f"{path.rstrip('.')}[{index}].")
        return None
    if found != expected:
        return f"{path.rstrip('.')} is {ascii(found)[:80]}, and {ascii(expected)[:80]} comes out"
    return None


_dumps = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode
