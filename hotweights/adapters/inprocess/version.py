"""A version at hand: its tensors under the names that the model knows them by, wherever their bytes
lie.

It looks like a mapped image (`hotweights.adapters.vllm.rank.image.Image`) to those who ask what
fits, so that there is one set of rules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch

from hotweights.adapters.inprocess.torch_model import same_bytes
from hotweights.adapters.vllm.rank.fit.dry_load import Spec
from hotweights.adapters.vllm.rank.table import Table, TensorEntry


class Version:
    """Made once, never changed; whoever made it keeps the bytes alive through the tensors."""

    def __init__(
        self,
        digest: str,
        version: str,
        specs: Mapping[str, Spec],
        tensors: Iterable[tuple[str, torch.Tensor]],
    ) -> None:
        """``digest`` tells one from another; ``specs`` and ``tensors`` have the same names, the
        model's.
        """
        self.digest = digest
        self.specs = dict(specs)
        self._tensors = dict(tensors)
        # no extents and no addresses: nobody asks for them who asks what fits
        entries = tuple(
            TensorEntry(name, spec.dtype, spec.shape, self._tensors[name].nbytes, (), 0, "")
            for name, spec in specs.items()
        )
        self.table = Table(digest, version, entries, (), {}, {}, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; one that has two names counts twice."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def tensors(self, only: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, in load order. ``only``: those of these names."""
        for name, tensor in self._tensors.items():
            if only is None or name in only:
                yield name, tensor

    def shared(self) -> frozenset[str]:
        """The tensors that loaders may not write into: all of them are somebody else's."""
        return frozenset(self._tensors)

    def restore(self) -> None:
        """Nothing was written into them: loaders are given copies (`shared`)."""

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors are there and equal."""
        if first not in self._tensors or second not in self._tensors:
            return False
        return same_bytes(self._tensors[first], self._tensors[second])
