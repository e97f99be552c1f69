"""The manifest: what a version is, tensor by tensor and chunk by chunk.

Its canonical bytes are the version's identity, so there is exactly one spelling of it and `parse`
takes no other. It arrives from disks and from peers: everything in it is checked before it is used.
A big model has a million chunks, therefore the lists of digests are checked as one long string and
never become objects; `Chunk` tuples are made when somebody iterates.

It knows nothing of files, of nodes, or of where a chunk is; only what the version consists of.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Final, Literal, NamedTuple

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from hotweights_planner.errors import BadManifest
from hotweights_planner.header import (
    BITS_OF_DTYPE,
    MAX_DIMENSIONS,
    MAX_INTEGER,
    TensorEntry,
    check_tensor_name,
    tensor_nbytes,
)

FORMAT: Final = "hotweights/manifest/v1"
FILE_NAME = "hotweights.manifest.json"
CHUNK_NBYTES = 4 << 20  # part of a version's identity: with another size it has another digest
PAGE_NBYTES = 4096  # mmap(2) takes whole pages: this is x86-64's, and most arm64 kernels'
MAX_MANIFEST_NBYTES = 512 << 20  # at 67 bytes a chunk, 8 million of them: 32 TB of weights
MAX_SIDE_FILE_NBYTES = 256 << 20  # it is read whole, into memory
CONFIG_NAME = "config.json"
MAX_CONFIG_NBYTES = 1 << 20  # larger ones are compared by their digests alone

# a Kubernetes label value, at most 63 characters: versions stand in labels
_LABEL_VALUE = r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
_HEX = b"0123456789abcdef"

Size = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]  # vLLM keeps token ids as int32


class Chunk(NamedTuple):
    """At most ``chunkBytes`` of one tensor: the unit of hashing, transfer and reuse. Its digest
    (BLAKE3, 64 hexadecimal digits) is its name.
    """

    blake3: str
    nbytes: int
    file: str
    offset: int  # in the file
    tensor: str
    number: int  # in the tensor, from 0


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=to_camel,
        populate_by_name=True,
        hide_input_in_errors=True,
    )


class Tensor(_Part):
    """One tensor, where its bytes lie in the checkpoint, and the digests of its chunks in order.
    ``dtype`` is spelled as safetensors does, and ``offset`` counts from the file's first byte.
    """

    name: str
    dtype: str
    shape: Annotated[tuple[Size, ...], Field(max_length=MAX_DIMENSIONS)]
    nbytes: Size
    file: str
    offset: Size
    chunks: tuple[str, ...]


class SideFile(_Part):
    """A small file that belongs to the version: configuration, tokenizer, index."""

    name: str
    nbytes: Annotated[int, Field(ge=0, le=MAX_SIDE_FILE_NBYTES)]
    blake3: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Probe(_Part):
    """What a cold load of this version answers, greedily, to a prompt."""

    prompt_token_ids: Annotated[tuple[Token, ...], Field(min_length=1, max_length=4096)]
    token_ids: Annotated[tuple[Token, ...], Field(min_length=1, max_length=4096)]
    engine: Annotated[str, Field(max_length=128)]


class Manifest(_Part):
    """A version. Made by `build` or `parse`, which check it; compared by `digest`. Frozen, so any
    thread may read it.
    """

    format: Literal["hotweights/manifest/v1"] = FORMAT
    model: Annotated[str, Field(pattern=_LABEL_VALUE)]
    version: Annotated[str, Field(pattern=_LABEL_VALUE)]
    # whole pages, so that every chunk of an image begins on one; at most what a slab holds
    chunk_bytes: Annotated[int, Field(ge=PAGE_NBYTES, le=1 << 30, multiple_of=PAGE_NBYTES)] = (
        CHUNK_NBYTES
    )
    tensors: tuple[Tensor, ...]
    files: Annotated[tuple[SideFile, ...], Field(max_length=4096)] = ()
    probes: Annotated[tuple[Probe, ...] | None, Field(max_length=64)] = None

    @cached_property
    def canonical(self) -> bytes:
        """The bytes that are stored, sent and hashed."""
        return _canonical(self)

    @cached_property
    def digest(self) -> str:
        """``sha256:`` and 64 hexadecimal digits of the canonical bytes."""
        return digest_of(self.canonical)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors, equal chunks counted as often as they occur."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def config_file(self) -> SideFile | None:
        """The configuration, if it is of a size at which it travels with the weights, so that
        engines can say what differs in it.
        """
        for file in self.files:
            if file.name == CONFIG_NAME and 0 < file.nbytes <= MAX_CONFIG_NBYTES:
                return file
        return None

    @cached_property
    def chunk_count(self) -> int:
        """Chunks of all tensors, equal ones counted as often as they occur."""
        return sum(len(tensor.chunks) for tensor in self.tensors)

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk in load order; equal ones as often as they occur."""
        whole = self.chunk_bytes
        for tensor in self.tensors:
            name, file, last = tensor.name, tensor.file, len(tensor.chunks) - 1
            for index, blake3 in enumerate(tensor.chunks):
                nbytes = whole if index < last else tensor.nbytes - last * whole
                yield Chunk(blake3, nbytes, file, tensor.offset + index * whole, name, index)

    def first_chunks(self, digests: Iterable[str]) -> Iterator[Chunk]:
        """The first chunk of each of ``digests`` that occurs, in load order. Digests that do not
        occur are left out.
        """
        wanted = set(digests)
        whole = self.chunk_bytes
        # there may be a million, and a NamedTuple's own constructor is a Python function
        new = tuple.__new__
        for tensor in self.tensors:
            # most tensors have none of a small delta, and this is one call for all chunks of it
            if wanted.isdisjoint(tensor.chunks):
                continue
            name, file, offset, last = (
                tensor.name,
                tensor.file,
                tensor.offset,
                len(tensor.chunks) - 1,
            )
            for index, blake3 in enumerate(tensor.chunks):
                if blake3 in wanted:
                    wanted.remove(blake3)
                    begin = index * whole
                    nbytes = whole if index < last else tensor.nbytes - begin
                    yield new(Chunk, (blake3, nbytes, file, offset + begin, name, index))


def digest_of(canonical: bytes) -> str:
    """The digest of a manifest's bytes: ``sha256:`` and 64 hexadecimal digits."""
    return "sha256:" + hashlib.sha256(canonical).hexdigest()


def is_label(text: object) -> bool:
    """Whether ``text`` may name a model or a version."""
    return isinstance(text, str) and re.fullmatch(_LABEL_VALUE, text) is not None


def chunk_count_of(nbytes: int, chunk_nbytes: int = CHUNK_NBYTES) -> int:
    """How many chunks a tensor of ``nbytes`` has; none for an empty one."""
    return -(-nbytes // chunk_nbytes)


def build(
    model: str,
    version: str,
    headers: Mapping[str, Sequence[TensorEntry]],
    chunks: Mapping[str, Sequence[str]],
    files: Sequence[SideFile] = (),
    probes: Sequence[Probe] | None = None,
    chunk_nbytes: int = CHUNK_NBYTES,
) -> Manifest:
    """The manifest of a checkpoint: ``headers`` by file name in load order, ``chunks`` (BLAKE3,
    hex) by tensor name. Raises `BadManifest` when they do not make one, and `KeyError` when a
    tensor has no ``chunks``.
    """
    tensors = tuple(
        Tensor(
            name=entry.name, dtype=entry.dtype, shape=entry.shape, nbytes=entry.nbytes,
            file=file, offset=entry.offset, chunks=tuple(chunks[entry.name]),
        )
        for file, entries in headers.items()
        for entry in entries
    )  # fmt: skip
    try:
        manifest = Manifest(
            model=model, version=version, chunk_bytes=chunk_nbytes, tensors=tensors, files=tuple(files),
            probes=tuple(probes) if probes else None,  # none is spelled in one way only: left out
        )  # fmt: skip
    except ValidationError as error:
        raise _refusal(error, "manifest") from error
    _check(manifest, "manifest")
    return manifest


def parse(text: bytes, where: str = FILE_NAME, digest: str | None = None) -> Manifest:
    """The manifest that ``text`` spells; with ``digest``, only if it is that one. Everything in it
    is checked. Raises `BadManifest`, with ``where`` in it.
    """
    # from the cheapest to the dearest: nothing is parsed that is too large or another one
    if len(text) > MAX_MANIFEST_NBYTES:
        raise BadManifest(where, f"{len(text)} bytes; a manifest has at most {MAX_MANIFEST_NBYTES}")
    if digest is not None and digest_of(text) != digest:
        raise BadManifest(
            where, f"its digest is {digest_of(text)}, expected {digest}", "fetch it again"
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise _refusal(error, where) from error
    _check(manifest, where)
    if manifest.canonical != text:
        raise BadManifest(
            where, "it is not in canonical form (sorted keys, no blanks, nothing twice)"
        )
    return manifest


def _refusal(error: ValidationError, where: str) -> BadManifest:
    # one is enough to act upon, and the others may be a million
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(step) for step in first["loc"])
    return BadManifest(where, f"{place}: {first['msg']}" if place else first["msg"])


def _check(manifest: Manifest, where: str) -> None:
    """What the types do not say. Digests come last: only then do counts and sizes hold."""
    if not manifest.tensors:
        raise BadManifest(where, "it has no tensors")
    _check_file_names([file.name for file in manifest.files], where)
    names: set[str] = set()
    done: set[str] = set()
    file, end = None, 0
    for tensor in manifest.tensors:
        fault = check_tensor_name(tensor.name)
        if fault:
            raise BadManifest(where, f"the tensor name {ascii(tensor.name)[:80]} {fault}")
        if tensor.name in names:
            raise BadManifest(where, f"tensor {tensor.name} stands twice")
        names.add(tensor.name)
        _check_tensor(tensor, manifest.chunk_bytes, where)
        if tensor.file != file:
            file, end = tensor.file, 0
            _check_file_names([file], where)
            if file in done:
                raise BadManifest(
                    where, f"tensor {tensor.name}: the tensors of {file} do not stand together"
                )
            done.add(file)
        if tensor.offset < end:
            raise BadManifest(
                where,
                f"tensor {tensor.name}: begins at byte {tensor.offset} of {file}, before {end}",
            )
        end = tensor.offset + tensor.nbytes
        if end > MAX_INTEGER:
            raise BadManifest(where, f"tensor {tensor.name}: ends beyond 2**63 bytes")
    _check_digests(manifest, where)


def _check_tensor(tensor: Tensor, chunk_nbytes: int, where: str) -> None:
    if tensor.dtype not in BITS_OF_DTYPE:
        raise BadManifest(where, f"tensor {tensor.name}: unknown dtype {ascii(tensor.dtype)[:40]}")
    nbytes = tensor_nbytes(tensor.dtype, tensor.shape)
    if nbytes != tensor.nbytes:
        text = (
            f"{tensor.dtype} x {list(tensor.shape)} is {nbytes} bytes, nbytes says {tensor.nbytes}"
        )
        raise BadManifest(where, f"tensor {tensor.name}: {text}")
    count = chunk_count_of(nbytes, chunk_nbytes)
    if len(tensor.chunks) != count:
        raise BadManifest(
            where, f"tensor {tensor.name}: {len(tensor.chunks)} chunks, {nbytes} bytes make {count}"
        )


def _check_file_names(names: list[str], where: str) -> None:
    for name in names:
        if (
            not name
            or name[0] == "."
            or "/" in name
            or "\\" in name
            or not name.isprintable()
            or len(name.encode()) > 255  # NAME_MAX of Linux
        ):
            raise BadManifest(where, f"the file name {ascii(name)[:80]} is not a plain name")
    if len(set(names)) != len(names):
        raise BadManifest(where, "two side files have the same name")


def _check_digests(manifest: Manifest, where: str) -> None:
    """64 digits each, and equal digests mean equal sizes: an image trusts a chunk's size before it
    has its bytes.
    """
    for tensor in manifest.tensors:
        text = "".join(tensor.chunks)  # one look at all, instead of a million
        if (
            len(text) != 64 * len(tensor.chunks)
            or not text.isascii()
            or text.encode().translate(None, _HEX)
            or any(len(chunk) != 64 for chunk in tensor.chunks)
        ):
            raise BadManifest(
                where, f"tensor {tensor.name}: a chunk's digest is not 64 hexadecimal digits"
            )
    whole: set[str] = set()
    parts: dict[str, int] = {}
    for tensor in manifest.tensors:
        part = tensor.nbytes % manifest.chunk_bytes
        # only the last chunk may be shorter
        whole.update(tensor.chunks[:-1] if part else tensor.chunks)
        if part and parts.setdefault(tensor.chunks[-1], part) != part:
            raise BadManifest(
                where, f"tensor {tensor.name}: its last chunk's digest stands for two sizes"
            )
    if not whole.isdisjoint(parts):
        raise BadManifest(
            where, f"the digest {next(iter(whole & parts.keys()))} stands for two sizes"
        )


def _canonical(manifest: Manifest) -> bytes:
    """Sorted keys, no blanks, UTF-8 as it is: what ``json.dumps(…, sort_keys=True)`` would write."""
    body: dict[str, object] = {
        "chunkBytes": manifest.chunk_bytes,
        "files": [file.model_dump(by_alias=True) for file in manifest.files],
        "format": manifest.format,
        "model": manifest.model,
        # By hand, for there may be a million digests: `model_dump` would copy them all.
        "tensors": [
            {
                "chunks": tensor.chunks,
                "dtype": tensor.dtype,
                "file": tensor.file,
                "name": tensor.name,
                "nbytes": tensor.nbytes,
                "offset": tensor.offset,
                "shape": tensor.shape,
            }
            for tensor in manifest.tensors
        ],
        "version": manifest.version,
    }
    if manifest.probes is not None:
        body["probes"] = [probe.model_dump(by_alias=True) for probe in manifest.probes]
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS)
