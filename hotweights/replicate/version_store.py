"""The versions that were committed on this host: written, read back, and put in place by one step.

    <home>/versions/<64 hex digits>/   a whole checkpoint folder, its manifest beside the weights
    <home>/current                     a link to the one that counts; <home>/previous to the one
    before it
    <home>/current_manifest.json       what `hotweights plan` starts from

A version appears under its name only when every byte of it was flushed, read back and compared;
``current`` changes last, by replacing a link. So whenever it ends (Ctrl-C, a full disk, the power),
what counted before counts still, and the rest of an unfinished version goes with the next commit.
Older versions than the previous one are removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from hotweights.files import write_whole
from hotweights.home import CURRENT_MANIFEST
from hotweights_common import files, locks
from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason
from hotweights_planner.header import PREFIX_NBYTES, header_nbytes
from hotweights_planner.manifest import FILE_NAME, Manifest
from hotweights_planner.published import published_text
from hotweights_storage import linux
from hotweights_storage.errors import TransferError
from hotweights_storage.image import Image
from hotweights_storage.resolve import Progress, check_headers, read_manifest, verify
from hotweights_storage.sources.base import Source, read_small
from hotweights_storage.sources.file import open_folder

LOCK_SECONDS = 600.0  # another commit writes a whole version meanwhile
PIECE_NBYTES = 16 << 20  # read and written at once
SPARE_NBYTES = 16 << 20  # for headers, manifest and folders, beside weights and side files


class CannotCommit(HotweightsError):
    """The version could not be put in place; what was there stays."""

    reason = Reason.CANNOT_WRITE


class VersionStore:
    """One host's home folder and the versions in it; `commit` may run in several processes, one at
    a time.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._versions = home / "versions"
        self._current = home / "current"
        self._previous = home / "previous"

    def current(self) -> Path | None:
        """The folder of the version that counts; None: there is none."""
        return self._current.resolve() if (self._current / FILE_NAME).is_file() else None

    def current_manifest(self) -> Manifest | None:
        """Its manifest, if it can be read; a broken one only costs what could have been reused."""
        folder = self.current()
        if folder is None:
            return None
        with open_folder(folder) as source:
            return read_manifest(source, FILE_NAME, source.files().get(FILE_NAME, 0))

    def commit(
        self, image: Image, source: Source, progress: Progress = lambda _nbytes: None
    ) -> Path:
        """Put the version in place; ``source`` gives its headers and side files. Raises
        `CannotCommit`.
        """
        try:
            self._versions.mkdir(parents=True, exist_ok=True)
            with self._locked():
                folder = self._versions / image.manifest.digest.removeprefix("sha256:")
                if not self._is_whole(folder, image.manifest):
                    self._write(folder, image, source, progress)
                self._switch(folder, image.manifest)
                self._prune()
                return folder
        except OSError as error:
            raise _refused(error, self.home) from error

    def _write(self, folder: Path, image: Image, source: Source, progress: Progress) -> None:
        self._check_room(image.manifest)
        # another process' leftovers have another number, and go when versions are pruned
        new = self._versions / f".new-{os.getpid()}"
        try:
            new.mkdir()
            _write_checkpoint(new, image, source, progress)
            files.sync_folder(new)
            _check(new, image.manifest)  # before it has its name: by that it is believed
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)  # it was there and not whole
            new.rename(folder)
            files.sync_folder(self._versions)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _check_room(self, manifest: Manifest) -> None:
        needed = manifest.nbytes + sum(file.nbytes for file in manifest.files) + SPARE_NBYTES
        free = shutil.disk_usage(self._versions).free
        if needed > free:
            text = f"{self.home} has {free} bytes free, and {manifest.version} needs {needed}"
            raise CannotCommit(
                f"{text}; make room, or name another place with --home", Reason.DISK_FULL
            )

    def _is_whole(self, folder: Path, manifest: Manifest) -> bool:
        """Whether the version was written before, and still is what it was."""
        if not folder.is_dir():
            return False
        try:
            _check(folder, manifest)
        except (TransferError, ValueError):
            return False
        return True

    def _switch(self, folder: Path, manifest: Manifest) -> None:
        # previous first: if it ends here, what counted before counts still
        before = self.current()
        # committing the same again must not make it its own way back
        if before is not None and before != folder:
            _link(self._previous, before)
        _link(self._current, folder)
        text = published_text(manifest, "file://" + quote(str(folder.resolve())))
        # and all names in the folder with it
        write_whole(self.home / CURRENT_MANIFEST, text, "the current manifest")

    def _prune(self) -> None:
        kept = {link.resolve() for link in (self._current, self._previous)}
        for folder in self._versions.iterdir():
            if folder.resolve() not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One commit at a time on this host."""
        try:
            with locks.held(self.home / "lock", LOCK_SECONDS):
                yield
        except locks.Busy:
            text = f"another commit into {self.home} did not end within {LOCK_SECONDS:g} s"
            raise CannotCommit(
                f"{text}; look for it, or name another place with --home", Reason.BUSY
            ) from None


def _write_checkpoint(folder: Path, image: Image, source: Source, progress: Progress) -> None:
    """The files as they are at the source: its headers, our verified bytes, its small files."""
    manifest = image.manifest
    check_headers(manifest, source, source.uri)
    sizes = source.files()
    for name in dict.fromkeys(tensor.file for tensor in manifest.tensors):
        nbytes = PREFIX_NBYTES + header_nbytes(
            read_small(source, name, PREFIX_NBYTES), sizes[name], name
        )
        with (folder / name).open("wb", buffering=0) as file:
            _write_all(file.fileno(), read_small(source, name, nbytes), 0)
            _write_tensors(file.fileno(), name, image, progress)
            os.fsync(file.fileno())
            linux.forget_pages(file.fileno())  # what is read back comes from the disk
    for side in manifest.files:
        _write_file(folder / side.name, read_small(source, side.name, side.nbytes))
    _write_file(folder / FILE_NAME, manifest.canonical)


def _write_tensors(descriptor: int, name: str, image: Image, progress: Progress) -> None:
    places: Mapping[str, object] = image.chunks
    whole = image.manifest.chunk_bytes
    for tensor in image.manifest.tensors:
        if tensor.file != name:
            continue
        for index, digest in enumerate(tensor.chunks):
            found = image.range(digest)
            if found is None:
                # 16 digits are enough to find it in the manifest
                raise CannotCommit(
                    f"chunk {digest[:16]}… is not among the image's {len(places)}",
                    Reason.INCOMPLETE,
                )
            for begin in range(0, found.nbytes, PIECE_NBYTES):
                piece = os.pread(
                    found.fd, min(PIECE_NBYTES, found.nbytes - begin), found.offset + begin
                )
                _write_all(descriptor, piece, tensor.offset + index * whole + begin)
            progress(found.nbytes)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        offset, view = offset + written, view[written:]


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _check(folder: Path, manifest: Manifest) -> None:
    """Raises `TransferError` where the folder is not the version."""
    with open_folder(folder) as source:
        differences = verify(source, manifest)
    if differences:
        raise CannotCommit(
            f"what was written was not read back: {differences[0].message}",
            Reason.CHECKSUM_MISMATCH,
        )


def _link(link: Path, target: Path) -> None:
    """Relative, so that the home folder may move."""
    beside = link.with_name(f".{link.name}-{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(os.path.relpath(target, link.parent.resolve()))
    beside.replace(link)


def _refused(error: OSError, home: Path) -> CannotCommit:
    # a full disk, a used-up quota, a file system's limit for one file
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = f"cannot write the version into {home}: {error.strerror}; what was there stays"
    remedy = "make room" if full else "see its permissions"
    return CannotCommit(
        f"{what}: {remedy}, or name another place with --home", Reason.DISK_FULL if full else None
    )
