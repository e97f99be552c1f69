"""Checkpoints in folders of this node: ``file:///path`` and ``pvc://claim/path``.

The installation says which roots may be read and which namespaces may name them; everything else is
refused, also through links. A file that is in the page cache is read from there; otherwise past it
(O_DIRECT), which costs a fraction of the CPU, unless the first reads, which try both, show that
going through the cache is far quicker on this file system. Nothing is ever mapped: a file that
shrinks under a mapping kills.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote, unquote, urlsplit

from hotweights_common.reasons import Reason
from hotweights_planner.manifest import PAGE_NBYTES
from hotweights_storage import linux
from hotweights_storage.errors import SourceRefused, SourceUnavailable
from hotweights_storage.sources.base import Root
from hotweights_storage.sources.safe_open import Escapes, open_beneath

_TRIALS = 4  # cold reads of each kind before one is chosen
_FAR_QUICKER = 2.0  # measured: through the cache, staging takes nearly twice the CPU time per byte
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # NONBLOCK: a FIFO must not hold us


class FileOpener:
    """Opens ``file://`` under the roots. Of nested roots the innermost counts, and it alone: what an
    installation takes out of a root, by naming another one in it, the outer one does not open.
    """

    def __init__(self, roots: Sequence[Root]) -> None:
        self._roots = sorted(roots, key=lambda root: len(root.path.parts), reverse=True)

    def open(self, uri: str, namespace: str) -> FileSource:
        """The folder, if one of the roots holds it and is open to the namespace. Raises
        `SourceRefused`, and `SourceUnavailable` when it is not there.
        """
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise SourceRefused(f"{uri}: names a host; write file:///absolute/path", Reason.BAD_URI)
        path = Path(_checked_path(uri))
        below = [root for root in self._roots if path.is_relative_to(root.path)]
        if not below:
            raise SourceRefused(
                f"{uri}: under none of the allowed source roots; add its root to the installation's"
            )
        innermost = below[0].path
        if any(root.path == innermost and root.is_open_to(namespace) for root in below):
            closed = [
                root.path.resolve()
                for root in self._roots
                if root.path != innermost
                and root.path.is_relative_to(innermost)
                and not root.is_open_to(namespace)
            ]
            return _source_beneath(uri, innermost, str(path.relative_to(innermost)), closed)
        raise SourceRefused(
            f"{uri}: its root is not open to namespace {namespace}; add the namespace to that root"
        )


class ClaimOpener:
    """Opens ``pvc://`` where the claim is mounted. Like a claim itself, its root belongs to a
    namespace: one that names several is open to the claim of that name in each of them.
    """

    def __init__(self, roots: Sequence[Root]) -> None:
        self._roots = roots

    def open(self, uri: str, namespace: str) -> FileSource:
        """The folder in the claim of that name in the object's own namespace. Raises
        `SourceRefused`, and `SourceUnavailable` when it is not there.
        """
        claim = urlsplit(uri).netloc
        for root in self._roots:
            if root.claim == claim and root.is_open_to(namespace):
                return _source_beneath(uri, root.path, _checked_path(uri).strip("/"))
        text = (
            f"claim {claim} of namespace {namespace} is not mounted into the agents; add it "
            "to the installation"
        )
        raise SourceRefused(f"{uri}: {text}")


OPENERS = {
    "file": lambda roots: FileOpener([root for root in roots if not root.claim]),
    "pvc": lambda roots: ClaimOpener([root for root in roots if root.claim]),
}
"""For `registry.installed`."""


def open_folder(path: Path) -> FileSource:
    """A folder that the caller itself named, with the caller's own rights: no root, links lead
    anywhere. Raises `SourceUnavailable` when it is none.
    """
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise SourceUnavailable(f"{path} {what}; name the folder that holds the checkpoint")
    return FileSource(
        "file://" + quote(str(path.resolve())),
        lambda name, flags: os.open(path / (name or "."), flags),
    )


def _checked_path(uri: str) -> str:
    parts = urlsplit(uri)
    # an empty query or fragment too: urlsplit drops its mark without a word
    if parts.query or parts.fragment or "?" in uri or "#" in uri:
        raise SourceRefused(
            f"{uri}: has a query or a fragment; write ? as %3F and # as %23 in a path",
            Reason.BAD_URI,
        )
    path = unquote(parts.path)
    if not path.isprintable() or ".." in path.split("/"):
        raise SourceRefused(
            f"{uri!a}: the path has '..' or unprintable characters; write it out", Reason.BAD_URI
        )
    return path


def _source_beneath(uri: str, root: Path, relative: str, closed: Sequence[Path] = ()) -> FileSource:
    """``closed``: folders in the root (resolved) that are another root's, where no link may lead."""

    def opened(name: str, flags: int) -> int:
        fd = open_beneath(root, f"{relative}/{name}" if name else relative, flags)
        if closed:
            real = Path(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115  # that link alone
            if any(real.is_relative_to(folder) for folder in closed):
                os.close(fd)
                raise Escapes(errno.EXDEV, os.strerror(errno.EXDEV), name)
        return fd

    source = FileSource(uri, opened)
    source.files()  # says now, not later, if it is not there or leads out of its root
    return source


@dataclass(slots=True)
class _OpenFile:
    fd: int
    direct_fd: int  # -1: the file system has no O_DIRECT
    nbytes: int
    identity: tuple[int, int, int, int]


class FileSource:
    """A folder of this node, as `Source` wants it. Files stay open from their first read until
    `close`.
    """

    def __init__(self, uri: str, opened: Callable[[str, int], int]) -> None:
        """``opened`` opens a name in the folder ('' is the folder) with the flags that it is
        given.
        """
        self.uri = uri
        self._opened = opened
        self._lock = threading.Lock()
        self._files: dict[str, _OpenFile] = {}
        self._contest = _FasterRead()

    def files(self) -> Mapping[str, int]:
        """Names and sizes of the regular files; links count as what they lead to."""
        sizes = {}
        for name in self._names():
            status = self._status(name)
            if stat.S_ISREG(status.st_mode):
                sizes[name] = status.st_size
        return sizes

    def read_into(self, file: str, offset: int, into: memoryview) -> int:
        opened = self._file(file)
        wanted = len(into)
        aligned = opened.direct_fd >= 0 and not (offset | wanted) % PAGE_NBYTES
        began = time.perf_counter()
        # only where both ways would have to wait for the disk, they can be compared
        cold = aligned and not _is_cached(opened, offset)
        direct = cold and self._contest.direct()
        try:
            done = _read(opened, offset, into, direct)
        except OSError as error:
            raise SourceUnavailable(
                f"{self.uri}: {file}: {error.strerror}", Reason.SOURCE_UNREADABLE
            ) from error
        if cold and done:
            self._contest.count(direct, done, time.perf_counter() - began)
        return done

    def check_unchanged(self) -> None:
        # the open file, and what its name leads to now: a file may be replaced, too
        for name, opened in self._files.items():
            if (
                _identity(os.fstat(opened.fd)) != opened.identity
                or _identity(self._status(name)) != opened.identity
            ):
                text = (
                    f"{self.uri}: {name} changed while it was read; repeat when nobody writes to it"
                )
                raise SourceUnavailable(text, Reason.SOURCE_CHANGED)

    def close(self) -> None:
        with self._lock:
            for opened in self._files.values():
                for fd in {opened.fd, opened.direct_fd} - {-1}:
                    os.close(fd)
            self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _names(self) -> list[str]:
        fd = self._open("", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return sorted(os.listdir(fd))  # noqa: PTH208  # pathlib lists no descriptor
        finally:
            os.close(fd)

    def _status(self, name: str) -> os.stat_result:
        fd = self._open(name, linux.O_PATH | os.O_CLOEXEC)
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def _open(self, name: str, flags: int) -> int:
        where = f"{self.uri}: {name}" if name else self.uri
        try:
            return self._opened(name, flags)
        except Escapes as error:
            text = f"{where}: a link leads out of the allowed root; put the file itself there"
            raise SourceRefused(text) from error
        except FileNotFoundError as error:
            raise SourceUnavailable(
                f"{where}: does not exist on this node; check the path and the mount"
            ) from error
        except OSError as error:
            raise SourceUnavailable(
                f"{where}: {error.strerror}", Reason.SOURCE_UNREADABLE
            ) from error

    def _file(self, name: str) -> _OpenFile:
        with self._lock:
            if (opened := self._files.get(name)) is not None:
                return opened
            fd = self._open(name, _READ)
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                os.close(fd)
                raise SourceRefused(
                    f"{self.uri}: {name} is not a regular file; put the file itself there"
                )
            direct_fd = -1
            with suppress(OSError):
                if linux.O_DIRECT:
                    direct_fd = os.open(
                        f"/proc/self/fd/{fd}", os.O_RDONLY | linux.O_DIRECT | os.O_CLOEXEC
                    )
            opened = self._files[name] = _OpenFile(fd, direct_fd, status.st_size, _identity(status))
            return opened


class _FasterRead:
    """Which kind of cold read is quicker here: both have a few trials, then one stays. Guesses on a
    tie of threads are harmless.
    """

    def __init__(self) -> None:
        self._begun = {True: 0, False: 0}
        self._done = {True: 0, False: 0}
        self._nbytes = {True: 0, False: 0}
        self._seconds = {True: 0.0, False: 0.0}

    def direct(self) -> bool:
        """Whether the next cold read goes past the cache."""
        if min(self._done.values()) >= _TRIALS:
            through_cache = self._nbytes[False] * self._seconds[True]
            return self._nbytes[True] * self._seconds[False] * _FAR_QUICKER >= through_cache
        # in turn, so that both see the same load
        kind = self._begun[True] <= self._begun[False] or self._begun[False] >= _TRIALS
        self._begun[kind] += 1
        return kind

    def count(self, direct: bool, nbytes: int, seconds: float) -> None:
        """Note what a cold read took; only the first few of each kind count."""
        if self._done[direct] < _TRIALS:
            self._done[direct] += 1
            self._nbytes[direct] += nbytes
            self._seconds[direct] += seconds


def _read(opened: _OpenFile, offset: int, into: memoryview, direct: bool) -> int:
    done = 0
    while done < len(into) and offset + done < opened.nbytes:
        # after a short read the place is no page any more, as O_DIRECT demands (open(2))
        fd = opened.direct_fd if direct and not done % PAGE_NBYTES else opened.fd
        try:
            count = os.preadv(fd, [into[done:]], offset + done)
        except OSError:
            if fd == opened.fd:
                raise
            direct = False  # not here, or not into this memory
            continue
        if not count:  # it ends before the size that it had: the caller says so
            break
        done += count
    return min(done, max(opened.nbytes - offset, 0))  # what has grown meanwhile does not count


def _is_cached(opened: _OpenFile, offset: int) -> bool:
    """Whether the page at ``offset`` is in memory: read it on condition that nothing has to
    wait.
    """
    try:
        return os.preadv(opened.fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:  # not in memory, or the file system cannot say
        return False


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
