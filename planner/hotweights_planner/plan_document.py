"""A plan's JSON as it comes from outside: what is taken from it, checked, and where it differs from
what it should be.

Only what cannot be computed is taken: the manifest, the base's name, the source, the bucket's size,
and which chunks are in the buckets and for whom. `plan.parse` makes the rest anew and compares. It
knows nothing of how buckets are filled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from hotweights_common.sanitize import is_digest
from hotweights_planner import manifest as manifests
from hotweights_planner.consumers import Ranks, is_ranks
from hotweights_planner.errors import BadManifest, BadPlan
from hotweights_planner.header import check_tensor_name
from hotweights_planner.manifest import PAGE_NBYTES, Chunk, Manifest

PLAN_VERSION: Final = "1"
MAX_PLAN_NBYTES = 1 << 30  # a plan carries a manifest of up to half as much, and its buckets
# a chunk is split into at most so many parts: 1,024 of the usual 4 MiB
MIN_BUCKET_NBYTES = PAGE_NBYTES
MAX_BUCKET_NBYTES = 1 << 40
MAX_SOURCE_NBYTES = 4096

_FIELDS = {
    "plan_version", "model_id", "version", "base_version", "manifest_digest", "base_digest", "source", "bucket_bytes",
    "total_bytes", "unchanged_bytes", "removed", "manifest", "buckets",
}  # fmt: skip


class Document(NamedTuple):
    """What is taken of a plan's JSON; `read_document` has checked each against the others."""

    manifest: Manifest
    base_version: str | None
    base_digest: str | None
    source: str
    bucket_nbytes: int
    removed: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    consumers: Mapping[str, Ranks]
    verification: dict[str, Any] | None


def read_document(text: bytes, where: str) -> Document:
    """What ``text`` (UTF-8) says. Raises `BadPlan`, with ``where`` in it, when it is too large, not
    a plan of this `PLAN_VERSION`, or not consistent.
    """
    if len(text) > MAX_PLAN_NBYTES:
        raise BadPlan(
            where, f"{len(text)} bytes; a plan has at most {MAX_PLAN_NBYTES}", "use larger buckets"
        )
    document = _object(text, where)
    verification = document.pop("verification", None)
    if verification is not None and not isinstance(verification, dict):
        raise BadPlan(where, "its verification is not an object")
    # they go first, so that they are freed before the manifest is parsed: they may be a million
    wanted, consumers, count = _wanted(document.pop("buckets"), where)
    manifest = _manifest_of(document, where)
    chunks = tuple(manifest.first_chunks(wanted))
    if len(chunks) != len(wanted):
        raise BadPlan(
            where, f"{len(wanted) - len(chunks)} chunks of its buckets are not in its manifest"
        )
    bucket_nbytes, source = document["bucket_bytes"], document["source"]
    fault = source_fault(source) or bucket_fault(bucket_nbytes) or _base_fault(document, manifest)
    if fault:
        raise BadPlan(where, fault)
    expected_count = sum(-(-chunk.nbytes // bucket_nbytes) for chunk in chunks)
    if count != expected_count:  # before so many are made
        raise BadPlan(
            where, f"{count} items, and its chunks and bucket_bytes make {expected_count}"
        )
    return Document(
        manifest, document["base_version"], document["base_digest"], source, bucket_nbytes,
        tuple(document["removed"]), chunks, consumers, verification,
    )  # fmt: skip


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    # UnicodeDecodeError and too many digits are ValueErrors
    except (ValueError, RecursionError) as error:
        raise BadPlan(where, f"it is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BadPlan(where, "it is not a JSON object")
    version = document.get("plan_version")
    if version != PLAN_VERSION:
        what = f"plan_version is {ascii(version)[:40]}, and {PLAN_VERSION!r} is what can be read"
        raise BadPlan(where, what, "make it with this release's `hotweights plan`")
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
        return manifests.parse(dumps(document["manifest"]).encode(), f"{where}: manifest", digest)
    # a lone surrogate, or brackets without end
    except (UnicodeEncodeError, RecursionError) as error:
        raise BadPlan(where, "its manifest is not Unicode, or nested too deeply") from error
    except BadManifest as error:
        raise BadPlan(error.where, error.what) from error


def _wanted(found: Any, where: str) -> tuple[set[str], dict[str, Ranks], int]:
    """The digests that the buckets name, for whom, and in how many items: all that is taken from
    them.
    """
    if not isinstance(found, list):
        raise BadPlan(where, "buckets is not a list")
    wanted: set[str] = set()
    consumers: dict[str, Ranks] = {}
    count = 0
    for number, bucket in enumerate(found):
        if not isinstance(bucket, dict) or not isinstance(items := bucket.get("items"), list):
            raise BadPlan(where, f"bucket {number} has no list of items")
        try:
            digests = [item["hash"].removeprefix("blake3:") for item in items]
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            raise BadPlan(where, f"bucket {number} has an item without a hash") from error
        wanted.update(digests)
        count += len(digests)
        if "consumer_ranks" in bucket:
            if not is_ranks(bucket["consumer_ranks"]):
                raise BadPlan(
                    where, f"consumer_ranks of bucket {number} are not ascending ranks, each once"
                )
            consumers.update(dict.fromkeys(digests, tuple(bucket["consumer_ranks"])))
    return wanted, consumers, count


def source_fault(source: object) -> str | None:
    """What is wrong with a source's URI, or None. It must have a scheme and be ASCII without
    blanks, as RFC 3986 has it.
    """
    if not isinstance(source, str) or "://" not in source:
        return f"the source {ascii(source)[:80]} is no URI"
    if (
        not source.isascii()
        or not source.isprintable()
        or len(source) > MAX_SOURCE_NBYTES
        or " " in source
    ):
        return f"the source {ascii(source)[:80]} is not percent-encoded"
    return None


def bucket_fault(bucket_nbytes: object) -> str | None:
    """What is wrong with a bucket's size in bytes, or None."""
    if (
        type(bucket_nbytes) is not int
        or not MIN_BUCKET_NBYTES <= bucket_nbytes <= MAX_BUCKET_NBYTES
    ):
        text = f"a bucket has {MIN_BUCKET_NBYTES} to {MAX_BUCKET_NBYTES} bytes"
        return f"{text}, not {ascii(bucket_nbytes)[:40]}"
    return None


def _base_fault(document: Mapping[str, Any], manifest: Manifest) -> str | None:
    version, digest, removed = (
        document["base_version"],
        document["base_digest"],
        document["removed"],
    )
    if (version is None) != (digest is None):
        return "base_version and base_digest belong together"
    if digest is not None and not (
        isinstance(digest, str) and is_digest(digest) and manifests.is_label(version)
    ):
        return "base_version is no version, or base_digest no digest"
    if not isinstance(removed, list) or not all(isinstance(name, str) for name in removed):
        return "removed is not a list of names"
    if removed and digest is None:
        return "it has no base, and removes tensors"
    if len({*removed, *(tensor.name for tensor in manifest.tensors)}) != len(removed) + len(
        manifest.tensors
    ):
        return "removed names a tensor twice, or one that its manifest has"
    for name in removed:
        fault = check_tensor_name(name)
        if fault:
            return f"the removed tensor's name {ascii(name)[:80]} {fault}"
    return None


def difference(found: Any, expected: Any, path: str = "") -> str | None:
    """Where ``found`` is not ``expected``, for a person to read: the first place of all, or None
    where they are equal.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in sorted(expected.keys() | found.keys()):
            if name not in found or name not in expected:
                return f"{path}{name!a}"[:200] + (
                    " is missing" if name not in found else " should not be there"
                )
            if found[name] != expected[name]:
                return difference(found[name], expected[name], f"{path}{name}.")
        return None
    if isinstance(expected, list) and isinstance(found, list):
        if len(found) != len(expected):
            return f"{path.rstrip('.')} has {len(found)} entries, and {len(expected)} come out"
        for index, (left, right) in enumerate(zip(found, expected, strict=True)):
            if left != right:
                return difference(left, right, f"{path.rstrip('.')}[{index}].")
        return None
    if found != expected:
        return f"{path.rstrip('.')} is {ascii(found)[:80]}, and {ascii(expected)[:80]} comes out"
    return None


dumps = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode
"""The one spelling of a value."""
