"""Memory of the host that a GPU fetches from at the link's rate, as much as is needed and given
back when it is not.

torch's own (``pin_memory=True``) is made in powers of two, up to twice of what was asked for, and
kept for later. Here a block is locked (``cudaHostRegister``) and unlocked with its last tensor.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

from hotweights.adapters.vllm.rank.room import NoRoom, gib

_ALIGNED_NBYTES = 256  # where a tensor may begin: a multiple of every item's size


class _Block(mmap.mmap):
    """Anonymous memory. Torch's tensors over it hold it; it is unmapped after `__del__`."""

    address = 0  # of what is locked; 0: nothing is

    def lock(self, address: int) -> None:
        """Raises `NoRoom`."""
        code = int(torch.cuda.cudart().cudaHostRegister(address, len(self), 0))
        if code:
            raise NoRoom(
                f"the host did not lock {gib(len(self))} for a GPU (cudaHostRegister: error {code}): "
                "let the container lock more memory, or ask for another way by "
                "spec.activation.memory; what is served stays"
            )
        self.address = address

    def __del__(self) -> None:
        if self.address:
            torch.cuda.cudart().cudaHostUnregister(self.address)


def copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each of them on the host, with its shape and strides; locked if they are on a GPU. Raises
    `NoRoom`.
    """
    ends: list[int] = [0]
    for tensor in tensors:
        ends.append(ends[-1] + -(-_span_nbytes(tensor) // _ALIGNED_NBYTES) * _ALIGNED_NBYTES)
    if not ends[-1]:
        return [tensor.cpu() for tensor in tensors]  # they have no bytes
    block = _Block(-1, ends[-1], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(block, dtype=torch.uint8)
    if any(tensor.is_cuda for tensor in tensors):
        block.lock(memory.data_ptr())
    found = []
    for tensor, begin in zip(tensors, ends[:-1], strict=True):
        piece = memory[begin : begin + _span_nbytes(tensor)].view(tensor.dtype)
        found.append(piece.as_strided(tensor.shape, tensor.stride(), piece.storage_offset()))
        found[-1].copy_(tensor)
    return found


def _span_nbytes(tensor: torch.Tensor) -> int:
    """From its first item to the end of its last."""
    if not math.prod(tensor.shape):
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return int((1 + sum((n - 1) * step for n, step in steps)) * tensor.element_size())
