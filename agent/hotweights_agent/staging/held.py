"""One version of the store's table, and how its memory goes.

Freeing is a matter of seconds: the kernel gives pages back in whoever closes the last descriptor,
some 0.2 s of processor time for each GiB. So it is done by a thread of its own, slab by slab, and
never by the agent's event loop, which has engines and peers to answer meanwhile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

from hotweights_planner.layout import Place
from hotweights_planner.manifest import Manifest
from hotweights_storage.image import Image, ImageBuilder
from hotweights_storage.slab import Slab

# 64 GiB a minute and more: whoever waits longer for memory is told that there is none
FREEING_SECONDS = 60.0


@dataclasses.dataclass(slots=True, eq=False)
class Held:
    """A version of the table. `builder` while it arrives, then `image`. The store's lock guards
    it.
    """

    manifest: Manifest
    builder: ImageBuilder
    leaves: frozenset[Slab] = frozenset()  # that older versions are to move out of
    image: Image | None = None
    pins: int = 0
    dropped: bool = False  # out of the table
    aside: bool = False  # and yet not to be closed: it was given up, and may be of use

    @property
    def slabs(self) -> tuple[Slab, ...]:
        """Whose memory it keeps."""
        return self.builder.slabs if self.image is None else self.image.slabs

    @property
    def made(self) -> tuple[Slab, ...]:
        """Those of them that it fills."""
        return self.builder.made

    def chunks(self) -> Mapping[str, Place[Slab]]:
        """What of it can be read, by digest."""
        return self.builder.verified() if self.image is None else self.image.chunks

    def expects(self, blake3: str) -> bool:
        """Whether a chunk, or its configuration, may still come to it before it is sealed."""
        file = self.manifest.config_file
        return self.builder.awaits(blake3) or (file is not None and file.blake3 == blake3)

    @property
    def promised_nbytes(self) -> int:
        """What it is still to take."""
        return 0 if self.image is not None or self.dropped else self.builder.promised_nbytes

    @property
    def unused(self) -> bool:
        """Whether it is to be closed now."""
        return self.dropped and not self.aside and self.pins == 0

    def close(self) -> None:
        """Give its memory back; takes long."""
        if self.image is not None:
            self.image.close()
        else:
            self.builder.close()


def stored_nbytes(held: Iterable[Held]) -> int:
    """Memory that versions take, in bytes; what they share counts once."""
    slabs = {slab for one in held for slab in one.slabs}
    return sum(slab.stored_nbytes for slab in slabs)


class Freeing:
    """Closes what nobody uses any more, one after the other, and whatever else is no work for an
    event loop. Any thread may call it.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="freeing")
        self._last: Future[None] | None = None

    def close(self, held: Held) -> None:
        """Soon."""
        self.run(held.close)

    def run(self, work: Callable[[], None]) -> None:
        """Soon, after what was asked before."""
        self._last = self._thread.submit(work)

    def settle(self, timeout_seconds: float = FREEING_SECONDS) -> bool:
        """Wait until what was to be closed so far is closed; False when that takes longer."""
        last = self._last
        return last is None or not wait([last], timeout_seconds).not_done
