"""What a source is, and how one is opened by its URI's scheme.

A source is read by a pool of threads in large pieces; who reads decides which and in what order.
Nothing here knows tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import urlsplit

from hotweights_common.reasons import Reason
from hotweights_storage.errors import SourceRefused, SourceUnavailable

ANY_NAMESPACE = "*"


class Source(Protocol):
    """An open checkpoint folder, wherever it is.

    `entries` or `files` first, then any number of `read_into` from any number of threads, then `close` (after
    which nothing may be called; as a context manager it closes itself). Pieces are best asked for
    on page boundaries, into page-aligned memory: a source may use that, none demands it. Errors are
    `SourceRefused` and `SourceUnavailable`; after one, other files may still be read.
    """

    uri: str

    def entries(self) -> Mapping[str, int | SourceRefused | SourceUnavailable]:
        """Names and sizes (bytes) of the regular files directly in the folder; for a name that
        leads to nothing that may be read, the error to raise when it is wanted.
        """

    def files(self) -> Mapping[str, int]:
        """Names and sizes of those that may be read."""

    def read_into(self, file: str, offset: int, into: memoryview) -> int:
        """Fill ``into`` with the file's bytes from ``offset``; how many there were: fewer only
        where the file ends.
        """

    def check_unchanged(self) -> None:
        """Raise `SourceUnavailable` (SourceChanged) if a file that was read looks different from
        when it was opened.
        """

    def close(self) -> None:
        """Close all files. No read may be on its way in another thread."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Root:
    """What the installation lets be read, and for the objects of which namespaces (``*``: of all):
    a folder, or the claim (a PersistentVolumeClaim) that is mounted there.
    """

    path: Path
    namespaces: tuple[str, ...] = (ANY_NAMESPACE,)
    claim: str = ""

    def is_open_to(self, namespace: str) -> bool:
        """Whether objects in that namespace may read it."""
        return ANY_NAMESPACE in self.namespaces or namespace in self.namespaces


class Opener(Protocol):
    """Opens the URIs of one scheme."""

    def open(self, uri: str, namespace: str) -> Source:
        """The source, if it is there and objects in ``namespace`` may use it. Raises
        `SourceRefused` and `SourceUnavailable`.
        """


class Sources:
    """The kinds of sources that this installation has, by scheme."""

    def __init__(self, openers: Mapping[str, Opener]) -> None:
        self._openers = dict(openers)

    def open(self, uri: str, namespace: str) -> Source:
        """The source behind ``uri`` for an object in ``namespace``. Raises `SourceRefused` also for
        a scheme that no opener is for.
        """
        opener = self._openers.get(urlsplit(uri).scheme)
        if opener is None:
            known = ", ".join(f"{scheme}://" for scheme in sorted(self._openers))
            raise SourceRefused(
                f"{uri}: no source of this kind; this installation reads {known}",
                Reason.UNKNOWN_SCHEME,
            )
        return opener.open(uri, namespace)


def read_small(source: Source, file: str, nbytes: int, offset: int = 0) -> bytes:
    """``nbytes`` of a file from ``offset``, or what there is of them. All are in memory at once, so
    the caller bounds them.
    """
    content = bytearray(nbytes)
    return bytes(memoryview(content)[: source.read_into(file, offset, memoryview(content))])
