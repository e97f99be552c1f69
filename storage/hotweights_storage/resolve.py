"""From a checkpoint folder to its manifest, and back: hash it, find its manifest, hold it against
one.

Hashing reads every byte once, in parallel, with constant memory. Publishing a folder and resolving
one without a manifest give the same bytes, wherever and by whomever it is done: nothing but
content, model and version goes into them. Where a manifest lies beside the weights, it alone says
which files count: whoever published may have left some out, or overlooked what an index says.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from blake3 import blake3

from hotweights_common.reasons import Reason
from hotweights_planner import manifest as manifests
from hotweights_planner.errors import BadCheckpoint, BadManifest
from hotweights_planner.manifest import CHUNK_NBYTES, FILE_NAME, Chunk, Manifest, Probe, SideFile
from hotweights_storage.checkpoint import Checkpoint, read_checkpoint, read_header
from hotweights_storage.errors import ChecksumMismatch, SourceUnavailable
from hotweights_storage.reader import Limits, Sink, read_chunks
from hotweights_storage.sources.base import Source, read_small
from hotweights_storage.weight_files import INDEX, INDEX_ENDING, is_weights

Progress = Callable[[int], None]
"""Told the number of bytes that are done in addition; from any thread, one at a time."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which a folder is not what its manifest says. ``tensor`` is empty for a side
    file; ``chunk`` is the chunk's number in the tensor.
    """

    file: str
    tensor: str
    chunk: int
    message: str


def publish(
    source: Source,
    model: str,
    version: str,
    checkpoint: Checkpoint | None = None,
    probes: Sequence[Probe] | None = None,
    progress: Progress | None = None,
    limits: Limits | None = None,
    look: Sink | None = None,
) -> Manifest:
    """The manifest of the folder as it is now. Any manifest in it is not looked at; ``look`` sees
    every chunk that is hashed. Raises `BadCheckpoint`, `SourceUnavailable` when a file changed meanwhile, `Cancelled` by ``limits``,
    and what the source does.
    """
    checkpoint = checkpoint or read_checkpoint(source)
    digests = {
        entry.name: [""] * manifests.chunk_count_of(entry.nbytes)
        for entries in checkpoint.headers.values()
        for entry in entries
    }
    count = _counter(progress)

    def note(chunk: Chunk, data: memoryview) -> None:
        digests[chunk.tensor][chunk.number] = blake3(data).hexdigest()
        if look is not None:
            look(chunk, data)
        count(chunk.nbytes)

    read_chunks(source, _unhashed(checkpoint), note, limits=limits)
    files = [
        side_file(source, name, nbytes) for name, nbytes in sorted(checkpoint.side_files.items())
    ]
    source.check_unchanged()  # last: until here somebody may have written to what was hashed
    return manifests.build(model, version, checkpoint.headers, digests, files, probes)


def resolve(
    source: Source,
    model: str,
    version: str,
    progress: Progress | None = None,
    limits: Limits | None = None,
    *,
    prove: bool = False,
) -> Manifest:
    """The manifest that lies beside the weights, whose headers must agree with it; without one, the
    one that publishing them would give. Raises `BadManifest` when it is of another version, and
    what `publish` does.

    ``prove``: every byte is read, so that a manifest alone, beside a file with a hole, opens
    nobody's weights; `ChecksumMismatch` where they are others.
    """
    nbytes = source.entries().get(FILE_NAME)
    if nbytes is None:
        return publish(source, model, version, progress=progress, limits=limits)
    if not isinstance(nbytes, int):  # without it, the folder could be another version
        raise nbytes
    where = f"{source.uri}/{FILE_NAME}"
    found = read_manifest(source, FILE_NAME, nbytes)
    if (found.model, found.version) != (model, version):
        text = (
            f"it is of version {found.version} of model {found.model}, not of {version} of {model}"
        )
        raise BadManifest(
            where, text, "publish the folder under these names, or correct the WeightVersion"
        )
    check_headers(found, source, where)
    _check_index(found, source, where)
    if prove:
        _prove(source, found, progress, limits)
    return found


def _prove(
    source: Source, manifest: Manifest, progress: Progress | None, limits: Limits | None
) -> None:
    count = _counter(progress)

    def compare(chunk: Chunk, data: memoryview) -> None:
        if blake3(data).hexdigest() != chunk.blake3:
            raise ChecksumMismatch(source.uri, chunk)
        count(chunk.nbytes)

    read_chunks(source, manifest.chunks(), compare, limits=limits)
    source.check_unchanged()


def read_manifest(source: Source, file: str, nbytes: int) -> Manifest:
    """A manifest out of a folder, ``nbytes`` long. Raises `BadManifest`, and what the source
    does.
    """
    where = f"{source.uri}/{file}"
    if nbytes > manifests.MAX_MANIFEST_NBYTES:
        raise BadManifest(
            where, f"{nbytes} bytes; a manifest has at most {manifests.MAX_MANIFEST_NBYTES}"
        )
    return manifests.parse(read_small(source, file, nbytes), where)


_AGAIN = "publish the folder again, or copy it again"


def check_headers(manifest: Manifest, source: Source, where: str) -> None:
    """Raise `BadCheckpoint` unless the headers of the manifest's files say what it says. Raises
    what the source does, too.
    """
    entries = source.entries()
    for file, tensors in groupby(manifest.tensors, lambda tensor: tensor.file):
        nbytes = entries.get(file)
        if nbytes is None:
            raise BadCheckpoint(where, f"{file} of the manifest is not in the folder", _AGAIN)
        if not isinstance(nbytes, int):
            raise nbytes
        found = {entry.name: entry for entry in read_header(source, file, nbytes)}
        for tensor in tensors:
            entry = found.pop(tensor.name, None)
            if entry is None:
                text = f"tensor {tensor.name} of the manifest is not in {file}"
                raise BadCheckpoint(where, text, _AGAIN)
            said = (tensor.dtype, tensor.shape, tensor.offset)
            if (entry.dtype, entry.shape, entry.offset) != said:
                text = (
                    f"tensor {tensor.name} is {entry.dtype} {list(entry.shape)} at byte "
                    f"{entry.offset} of {file}; the manifest says {tensor.dtype} "
                    f"{list(tensor.shape)} at byte {tensor.offset}"
                )
                raise BadCheckpoint(where, text, _AGAIN)
        for name in found:
            raise BadCheckpoint(where, f"tensor {name} of {file} is not in the manifest", _AGAIN)


def _check_index(manifest: Manifest, source: Source, where: str) -> None:
    """Raise `BadCheckpoint` when the folder was saved anew, so that other files count in it: its
    headers may still be the same.
    """
    sizes = source.files()
    for file in manifest.files:
        if file.name.endswith(INDEX_ENDING) and (
            file.name not in sizes or not _is_published(source, file, sizes[file.name])
        ):
            raise BadCheckpoint(where, f"{file.name} is not what was published", _AGAIN)


def verify(
    source: Source,
    manifest: Manifest,
    progress: Progress | None = None,
    limits: Limits | None = None,
) -> list[Difference]:
    """Every chunk and side file that is not what the manifest says. Raises `BadCheckpoint` where
    the headers differ already, and what the source does.
    """
    check_headers(manifest, source, source.uri)
    differences: list[Difference] = []
    count = _counter(progress)

    def compare(chunk: Chunk, data: memoryview) -> None:
        if blake3(data).hexdigest() != chunk.blake3:
            text = str(ChecksumMismatch(source.uri, chunk))
            differences.append(Difference(chunk.file, chunk.tensor, chunk.number, text))
        count(chunk.nbytes)

    read_chunks(source, manifest.chunks(), compare, limits=limits)
    # threads found them in any order
    differences.sort(key=lambda difference: (difference.file, difference.tensor, difference.chunk))
    sizes = source.files()
    for file in manifest.files:
        if file.name not in sizes:
            differences.append(
                Difference(file.name, "", 0, f"{file.name} is missing; copy it again")
            )
        elif not _is_published(source, file, sizes[file.name]):
            text = (
                f"{file.name} is not what was published; copy it again, or publish the folder anew"
            )
            differences.append(Difference(file.name, "", 0, text))
    return differences


def _is_published(source: Source, file: SideFile, nbytes: int) -> bool:
    # its size first: a file that has grown is not read, and may be of any size
    return nbytes == file.nbytes and side_file(source, file.name, nbytes) == file


def beside(source: Source, manifest: Manifest) -> list[str]:
    """Weights in the folder that are no part of the version though a cold vLLM would read them: no
    index of the version says otherwise. Raises what the source does.
    """
    if any(file.name == INDEX for file in manifest.files):
        return []
    named = {tensor.file for tensor in manifest.tensors}
    return sorted(name for name in source.files() if is_weights(name) and name not in named)


def side_file(source: Source, name: str, nbytes: int) -> SideFile:
    """The entry of a small file, as it is now, read whole. Raises `SourceUnavailable` when it is
    not ``nbytes`` long any more.
    """
    content = read_small(source, name, nbytes)
    if len(content) != nbytes:
        text = f"{source.uri}: {name} changed while it was read; repeat when nobody writes to it"
        raise SourceUnavailable(text, Reason.SOURCE_CHANGED)
    return SideFile(name=name, nbytes=nbytes, blake3=blake3(content).hexdigest())


def _unhashed(checkpoint: Checkpoint) -> Iterator[Chunk]:
    for file, entries in checkpoint.headers.items():
        for entry in entries:
            for number in range(manifests.chunk_count_of(entry.nbytes)):
                done = number * CHUNK_NBYTES
                nbytes = min(CHUNK_NBYTES, entry.nbytes - done)
                yield Chunk("", nbytes, file, entry.offset + done, entry.name, number)


def _counter(progress: Progress | None) -> Progress:
    lock = threading.Lock()

    def count(nbytes: int) -> None:
        if progress is not None:
            with lock:
                progress(nbytes)

    return count
