"""What goes wrong while bytes move, and how it says so.

    TransferError
    ├── SourceRefused       SourceNotAllowed | BadURI | UnknownScheme: a setting or the URI must change
    ├── SourceUnavailable   SourceNotFound | SourceUnreadable | SourceChanged | SourceTruncated:
    │                       may be there later
    ├── ChecksumMismatch    the bytes are not what the manifest says
    ├── NoCapacity          they would not fit, or memory ran out while they came
    ├── Incomplete          an image that is not whole was to be used
    └── Cancelled           Cancelled | DeadlineExceeded: somebody no longer wants them

``reason`` is the CamelCase word that ends up in conditions; the text names the thing and what to do
about it.
"""

from __future__ import annotations

from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason
from hotweights_planner.manifest import Chunk


class TransferError(HotweightsError):
    """Bytes did not arrive; ``reason`` says why in one word, if it is another than the class's."""

    reason = Reason.TRANSFER_FAILED


class SourceRefused(TransferError):
    """The source may not be read, or its URI cannot be understood; trying again changes nothing."""

    reason = Reason.SOURCE_NOT_ALLOWED


class SourceUnavailable(TransferError):
    """The source is not there, or does not answer; it may later."""

    reason = Reason.SOURCE_NOT_FOUND


class ChecksumMismatch(TransferError):
    """A chunk's bytes are not the manifest's: the text says where they lie, so that the source can
    be repaired.
    """

    reason = Reason.CHECKSUM_MISMATCH

    def __init__(self, source: str, chunk: Chunk) -> None:
        self.chunk = chunk
        end = chunk.offset + chunk.nbytes
        super().__init__(
            f"{source}: {chunk.file}: chunk {chunk.number} of tensor {chunk.tensor} (bytes "
            f"{chunk.offset} to {end}) does not have BLAKE3 {chunk.blake3[:16]}…; copy the file "
            "again, or publish the checkpoint anew if it was meant to change"
        )


class NoCapacity(TransferError):
    """There is not enough memory for it."""

    reason = Reason.INSUFFICIENT_MEMORY


class Incomplete(TransferError):
    """An image was to be finished before all its chunks were verified."""

    reason = Reason.INCOMPLETE


class Cancelled(TransferError):
    """Whoever asked for the bytes has taken it back, or its deadline has passed."""

    reason = Reason.CANCELLED
