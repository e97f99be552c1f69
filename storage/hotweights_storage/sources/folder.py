"""A folder of this node as a source.

A file that is in the page cache is read from there; otherwise past it (O_DIRECT), which costs a
fraction of the CPU, unless the first reads, which try both, show that going through the cache is
far quicker on this file system. Nothing is ever mapped: a file that shrinks under a mapping kills.

Folders are as people have them. A name that leads nowhere is no fault of the others beside it; a
network file system gives a file another inode, or forgets the one that is open, without any change
of it.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from hotweights_common.reasons import Reason
from hotweights_planner.manifest import PAGE_NBYTES
from hotweights_storage import linux
from hotweights_storage.errors import SourceRefused, SourceUnavailable
from hotweights_storage.sources import permissions
from hotweights_storage.sources.safe_open import Escapes

_TRIALS = 4  # cold reads of each kind before one is chosen
_FAR_QUICKER = 2.0  # measured: through the cache, staging takes nearly twice the CPU time per byte
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # NONBLOCK: a FIFO must not hold us
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(slots=True)
class _OpenFile:
    fd: int
    direct_fd: int  # -1: the file system has no O_DIRECT
    nbytes: int
    modified_ns: int


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
        self._stale: list[_OpenFile] = []  # other threads may be reading from them
        self._contest = _FasterRead()

    def entries(self) -> Mapping[str, int | SourceRefused | SourceUnavailable]:
        sizes: dict[str, int | SourceRefused | SourceUnavailable] = {}
        for name in self._names():
            try:
                status = self.status(name)
            except (SourceRefused, SourceUnavailable) as error:
                sizes[name] = error
                continue
            if stat.S_ISREG(status.st_mode):
                sizes[name] = status.st_size
        return sizes

    def files(self) -> Mapping[str, int]:
        """Names and sizes of the regular files; links count as what they lead to."""
        return {name: found for name, found in self.entries().items() if isinstance(found, int)}

    def status(self, name: str) -> os.stat_result:
        """What a name in the folder ('' is the folder) leads to now; needs no right to read it.
        Raises `SourceRefused` and `SourceUnavailable`.
        """
        fd = self._open(name, linux.O_PATH | os.O_CLOEXEC)
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def read_into(self, file: str, offset: int, into: memoryview) -> int:
        opened = self._file(file)
        try:
            return self._read(opened, offset, into)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise self._unreadable(file, error) from error
        # the server forgot our handle: asked by name once more, it may have the very same file
        try:
            return self._read(self._file_anew(file, opened), offset, into)
        except OSError as error:
            raise self._unreadable(file, error) from error

    def check_unchanged(self) -> None:
        # the open file, and what its name leads to now: a file may be replaced, too
        for name, opened in self._files.items():
            now = [self.status(name)]
            with suppress(OSError):  # ESTALE; its name has been asked
                now.append(os.fstat(opened.fd))
            if any(_differs(status, opened) for status in now):
                raise self._changed(name)

    def close(self) -> None:
        with self._lock:
            for opened in (*self._files.values(), *self._stale):
                for fd in {opened.fd, opened.direct_fd} - {-1}:
                    os.close(fd)
            self._files.clear()
            self._stale.clear()

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
        fd = self._open("", _LIST)
        try:
            return sorted(os.listdir(fd))  # noqa: PTH208  # pathlib lists no descriptor
        finally:
            os.close(fd)

    def _read(self, opened: _OpenFile, offset: int, into: memoryview) -> int:
        aligned = opened.direct_fd >= 0 and not (offset | len(into)) % PAGE_NBYTES
        began = time.perf_counter()
        # only where both ways would have to wait for the disk, they can be compared
        cold = aligned and not _is_cached(opened, offset)
        direct = cold and self._contest.direct()
        done = _read(opened, offset, into, direct)
        if cold and done:
            self._contest.count(direct, done, time.perf_counter() - began)
        return done

    def _open(self, name: str, flags: int) -> int:
        where = f"{self.uri}: {name}" if name else self.uri
        try:
            return self._opened_twice(name, flags)
        except Escapes as error:
            text = f"{where}: a link leads out of the allowed root; put the file itself there"
            raise SourceRefused(
                f"{text}, or allow a folder that holds both (of a Hugging Face cache the one above "
                "snapshots and blobs)"
            ) from error
        except FileNotFoundError as error:
            text = f"{where}: does not exist on this node; check the path and the mount"
            if name:
                text += " (a link into another folder needs that one mounted, too)"
            raise SourceUnavailable(text) from error
        except PermissionError as error:
            text = f"{where}: {permissions.refusal(self._status_if_seen(name))}"
            raise SourceUnavailable(text, Reason.SOURCE_UNREADABLE) from error
        except OSError as error:
            raise self._unreadable(name, error) from error

    def _opened_twice(self, name: str, flags: int) -> int:
        try:
            return self._opened(name, flags)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        return self._opened(name, flags)  # the kernel has dropped what it knew of the name

    def _status_if_seen(self, name: str) -> os.stat_result | None:
        try:
            fd = self._opened(name, linux.O_PATH | os.O_CLOEXEC)
        except OSError:  # no right to look into the folder
            return None
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def _file(self, name: str) -> _OpenFile:
        with self._lock:
            if (opened := self._files.get(name)) is None:
                opened = self._files[name] = self._opened_file(name)
            return opened

    def _file_anew(self, name: str, stale: _OpenFile) -> _OpenFile:
        with self._lock:
            if self._files[name] is not stale:  # another thread has done it
                return self._files[name]
            opened = self._opened_file(name)
            if (opened.nbytes, opened.modified_ns) != (stale.nbytes, stale.modified_ns):
                self._stale.append(opened)  # to be closed
                raise self._changed(name)
            self._stale.append(stale)
            self._files[name] = opened
            return opened

    def _opened_file(self, name: str) -> _OpenFile:
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
        return _OpenFile(fd, direct_fd, status.st_size, status.st_mtime_ns)

    def _unreadable(self, name: str, error: OSError) -> SourceUnavailable:
        where = f"{self.uri}: {name}" if name else self.uri
        return SourceUnavailable(
            f"{where}: {error.strerror}; see the mount, its file server and the kernel log",
            Reason.SOURCE_UNREADABLE,
        )

    def _changed(self, name: str) -> SourceUnavailable:
        text = f"{self.uri}: {name} changed while it was read; repeat when nobody writes to it"
        return SourceUnavailable(text, Reason.SOURCE_CHANGED)


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


def _differs(status: os.stat_result, opened: _OpenFile) -> bool:
    """Whether it is another file. Not by its inode: gcsfuse and others give one file several, and a
    file that is swapped for one of the same size and time is found by its chunks' digests.
    """
    return (status.st_size, status.st_mtime_ns) != (opened.nbytes, opened.modified_ns)
