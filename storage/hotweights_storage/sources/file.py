"""Checkpoints in folders of this node: ``file:///path`` and ``pvc://claim/path``.

The installation says which roots may be read and which namespaces may name them; everything else is
refused, also through links. How a folder is read, says `folder`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from hotweights_common.reasons import Reason
from hotweights_storage.errors import SourceRefused, SourceUnavailable
from hotweights_storage.sources.base import Root
from hotweights_storage.sources.folder import FileSource
from hotweights_storage.sources.safe_open import Escapes, open_beneath


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
