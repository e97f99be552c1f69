"""The engines' socket of a process whose engines call tensors otherwise than the version does: the
table that goes out says their names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from hotweights_agent.engines.socket_auth import Authenticator
from hotweights_agent.engines.socket_server import EngineServer, PinnedImage
from hotweights_agent.session.messages import Message
from hotweights_storage.slab import Slab, sealed_memfd
from hotweights_transports.handoff import frames


class RenamingServer(EngineServer):
    """``called`` gives the engines' names by the version's; it was asked before, so that it does
    not refuse here.
    """

    def __init__(
        self,
        folder: Path,
        authenticator: Authenticator,
        tell: Callable[[Message], Awaitable[None]],
        *,
        agent: str,
        called: Callable[[str], dict[str, str]],
    ) -> None:
        super().__init__(folder, authenticator, tell, agent=agent)
        self._called = called

    def send_prepare(self, number: int, prepare: frames.Prepare, image: PinnedImage) -> None:
        """As the node's, with another table. The image is released also when it raises."""
        try:
            renamed = _Renamed(image, self._called(prepare.digest))
        except Exception:
            image.release()
            raise
        super().send_prepare(number, prepare, renamed)


class _Renamed:
    """An image whose table was written anew; the slabs are the image's."""

    def __init__(self, image: PinnedImage, called: dict[str, str]) -> None:
        self._image = image
        table = json.loads(_read(image.fds[0]))
        for tensor in table["tensors"]:
            tensor["name"] = called[tensor["name"]]
        self._table: Slab = sealed_memfd(json.dumps(table, separators=(",", ":")).encode())

    @property
    def fds(self) -> tuple[int, ...]:
        """The table first, then the slabs."""
        return (self._table.fd, *self._image.fds[1:])

    def release(self) -> None:
        """Let go of the table and the image: their descriptors may be closed."""
        self._table.release()
        self._image.release()


def _read(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)
