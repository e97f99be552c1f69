"""What an image's bytes amount to: one digest that ranks can compare, and every byte read once more
where that is asked for.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

from blake3 import blake3

from hotweights_planner.manifest import Chunk
from hotweights_storage.errors import ChecksumMismatch
from hotweights_storage.image import Image
from hotweights_storage.resolve import Progress


def verify_image(image: Image, progress: Progress = lambda _nbytes: None) -> None:
    """Read all of the finished image and compare every chunk again, on all processors.
    ``progress`` is told bytes, by one thread at a time. Raises `ChecksumMismatch`.
    """
    counting = threading.Lock()

    def check(chunk: Chunk) -> None:
        if blake3(_read(image, chunk)).hexdigest() != chunk.blake3:
            raise ChecksumMismatch("the image in memory", chunk)
        with counting:
            progress(chunk.nbytes)

    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="verify") as executor:
        checks = [
            executor.submit(check, chunk) for chunk in image.manifest.first_chunks(image.chunks)
        ]
        try:
            for done in checks:
                done.result()
        finally:
            executor.shutdown(cancel_futures=True)  # after a mismatch the rest is not of interest


def image_digest(image: Image) -> str:
    """Over every tensor's name, type, shape and bytes, in load order: of the verified chunks'
    digests, so it costs nothing.
    """
    state = blake3()
    for tensor in image.manifest.tensors:
        state.update(
            f"{tensor.name}\0{tensor.dtype}\0{','.join(map(str, tensor.shape))}\0".encode()
        )
        for digest in tensor.chunks:
            state.update(bytes.fromhex(digest))
    return f"blake3:{state.hexdigest()}"


def _read(image: Image, chunk: Chunk) -> bytes:
    found = image.range(chunk.blake3)
    # a missing chunk reads as nothing, whose hash is no chunk's: it is reported as a mismatch
    return b"" if found is None else os.pread(found.fd, found.nbytes, found.offset)
