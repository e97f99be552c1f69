"""A version's ``config.json``, brought beside its weights so that engines can say what differs in it
from what they booted with.

It is asked for like a chunk, by its BLAKE3 and of the same sources: parents that have it give it on,
others do not know it, and the origin has it. A version is whole without it: then engines compare its
digest alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from hotweights_agent.staging.chunk_sources import ChunkSource
from hotweights_storage.errors import TransferError
from hotweights_storage.image import ImageBuilder, is_config
from hotweights_transports.peers.base import PeerError, Want

log = logging.getLogger(__name__)

SECONDS_EACH = 5.0
"""For each source. It is a few kilobytes, and the whole version, which is there, waits for it; a
parent that is as far as we are has it when it has sealed its image.
"""


def bring_config(
    builder: ImageBuilder, sources: Sequence[ChunkSource], cancel: threading.Event
) -> None:
    """Ask one source after the other, until one has it. Never raises for a source: what it says was
    reason enough to pass over the file, and no more.
    """
    file = builder.manifest.config_file
    if file is None or builder.config:
        return

    def deliver(_want: Want, data: memoryview) -> None:
        if is_config(builder.manifest, bytes(data)):
            builder.config = bytes(data)

    for source in sources:
        if builder.config or cancel.is_set():
            return
        enough = threading.Event()
        timer = threading.Timer(SECONDS_EACH, enough.set)
        timer.daemon = True
        timer.start()
        try:
            source.fetch(iter([Want(file.blake3, file.nbytes)]), deliver, enough)
        except (PeerError, TransferError) as error:
            log.info("%s gives no %s: %s", source.name, file.name, error)
        finally:
            timer.cancel()
