"""A version that somebody streams in: a buffer for every tensor, or for each of its shards, and the
hash of what lies in it.

Shards of a tensor are its bytes in order, number 0 first. A shard counts once its hash was
compared; a tensor once its shards add up to it and, where the manifest has its chunks, every chunk
is the manifest's. Memory is pinned where there is a CUDA device to copy to.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from blake3 import blake3

from hotweights.adapters.inprocess.errors import NotApplied
from hotweights.adapters.inprocess.torch_model import torch_dtype
from hotweights.adapters.vllm.rank.fit.dry_load import Spec
from hotweights.adapters.vllm.rank.table import ITEM_BYTES, torch_shape
from hotweights_common.reasons import Reason
from hotweights_planner.manifest import Manifest

_HASHES: dict[str, Callable[[memoryview], str]] = {
    "blake3": lambda data: blake3(data).hexdigest(),
    "sha256": lambda data: hashlib.sha256(data).hexdigest(),
}


class Buffers:
    """One version on its way in. Not for several threads at a time, but buffers may be filled by
    any.
    """

    def __init__(
        self, specs: Mapping[str, Spec], manifest: Manifest | None, *, pinned: bool, verify: bool
    ) -> None:
        """With ``verify``, a shard without a hash is not taken unless the manifest has its tensor's
        chunks.
        """
        self.specs = dict(specs)
        self._chunks = (
            {} if manifest is None else {tensor.name: tensor.chunks for tensor in manifest.tensors}
        )
        self._chunk_nbytes = 0 if manifest is None else manifest.chunk_bytes
        self._pinned = pinned
        self._verify = verify
        self._shards: dict[str, dict[int, torch.Tensor]] = {}
        self._final: set[tuple[str, int]] = set()

    def request(self, tensor: str, shard_rank: int, nbytes: int) -> torch.Tensor:
        """Writable bytes (a ``uint8`` tensor of ``nbytes``, one dimension, in host memory); the
        same ones when asked again, and then they count as not yet filled. Raises `NotApplied`.
        """
        whole = self._nbytes(tensor)
        if shard_rank < 0 or nbytes < 0 or nbytes > whole:
            raise NotApplied(
                Reason.BAD_SHARD,
                f"{tensor}: shard {shard_rank} of {nbytes} bytes does not lie in its {whole} bytes",
            )
        shards = self._shards.setdefault(tensor, {})
        held = shards.get(shard_rank)
        others = sum(shard.numel() for rank, shard in shards.items() if rank != shard_rank)
        if others + nbytes > whole:
            raise NotApplied(
                Reason.BAD_SHARD,
                f"{tensor}: its shards come to {others + nbytes} bytes; it has {whole}",
            )
        if held is None or held.numel() != nbytes:
            held = shards[shard_rank] = torch.empty(
                nbytes, dtype=torch.uint8, pin_memory=self._pinned
            )
        self._final.discard((tensor, shard_rank))
        return held

    def finalize(self, tensor: str, shard_rank: int, hash_: str | None) -> None:
        """The shard is filled; its bytes must have this hash (``blake3:`` or ``sha256:`` and
        hexadecimal digits; digits alone are BLAKE3's). Raises `NotApplied`.
        """
        shard = self._shards.get(tensor, {}).get(shard_rank)
        if shard is None:
            raise NotApplied(
                Reason.NO_BUFFER, f"{tensor}: no buffer was requested for shard {shard_rank}"
            )
        if hash_:
            kind, _, expected = hash_.rpartition(":")
            digest = _HASHES.get(kind or "blake3")
            if digest is None:
                raise NotApplied(
                    Reason.BAD_HASH,
                    f"{tensor}: no hash is called {kind!r}; write blake3:… or sha256:…",
                )
            if digest(_view(shard)) != expected.lower():
                raise NotApplied(
                    Reason.CHECKSUM_MISMATCH,
                    # 24 characters: the kind, and digits enough to find it in a log
                    f"{tensor}: shard {shard_rank} does not have {hash_[:24]}…; send it again",
                )
        elif self._verify and tensor not in self._chunks:
            raise NotApplied(
                Reason.NO_HASH,
                f"{tensor}: shard {shard_rank} came without its hash; give it, or set verify=False",
            )
        self._final.add((tensor, shard_rank))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, whole. Raises `NotApplied` naming the first that is not."""
        for name, spec in self.specs.items():
            shards = self._shards.get(name, {})
            waiting = [rank for rank in sorted(shards) if (name, rank) not in self._final]
            if waiting:
                raise NotApplied(Reason.INCOMPLETE, f"{name}: shard {waiting[0]} was not finalized")
            ordered = [shards[rank] for rank in sorted(shards)]
            here, whole = sum(shard.numel() for shard in ordered), self._nbytes(name)
            if here != whole or sorted(shards) != list(range(len(shards))):
                raise NotApplied(
                    Reason.INCOMPLETE,
                    f"{name}: {here} of {whole} bytes have come, in shards {sorted(shards)}",
                )
            flat = (
                ordered[0]
                if len(ordered) == 1
                # the empty one: an empty tensor may have no shard, and cat takes no empty list
                else torch.cat([torch.empty(0, dtype=torch.uint8), *ordered])
            )
            self._check_chunks(name, flat)
            yield name, flat.view(torch_dtype(spec.dtype)).view(torch_shape(spec.dtype, spec.shape))

    def _check_chunks(self, name: str, flat: torch.Tensor) -> None:
        view = _view(flat)
        for number, expected in enumerate(self._chunks.get(name, ())):
            chunk = view[number * self._chunk_nbytes : (number + 1) * self._chunk_nbytes]
            # 16 digits are enough to find it in the manifest
            if blake3(chunk).hexdigest() != expected:
                raise NotApplied(
                    Reason.CHECKSUM_MISMATCH,
                    f"{name}: chunk {number} is not the manifest's {expected[:16]}…",
                )

    def _nbytes(self, tensor: str) -> int:
        spec = self.specs.get(tensor)
        if spec is None:
            raise NotApplied(
                Reason.UNKNOWN_TENSOR,
                f"{tensor} is not in the manifest that begin_update was given",
            )
        return math.prod(torch_shape(spec.dtype, spec.shape)) * ITEM_BYTES[spec.dtype]


def _view(flat: torch.Tensor) -> memoryview:
    return memoryview(flat.numpy())


def specs_of(manifest: Mapping[str, Any]) -> dict[str, Spec]:
    """Names, dtypes and shapes of a manifest's object, or of one that has nothing else. Raises
    `NotApplied`; KeyError, TypeError or ValueError for an object that is no such thing.
    """
    specs: dict[str, Spec] = {}
    for item in manifest["tensors"]:
        name, dtype, shape = item["name"], item["dtype"], tuple(int(size) for size in item["shape"])
        if dtype not in ITEM_BYTES:
            raise NotApplied(
                Reason.DTYPE_MISMATCH,
                f"{name}: unknown dtype {dtype!r}; dtypes are named as in safetensors: BF16, F32",
            )
        if name in specs:
            raise NotApplied(Reason.BAD_MANIFEST, f"{name} stands twice in the manifest")
        specs[name] = Spec(dtype, shape)
    return specs
