"""Any torch module: which tensors it has, whether a version fits them, and the switch, all of it or
nothing.

A version names every parameter and every persistent buffer, as a state dict does, with the very
shape and dtype; tied ones may come under any of their names, with the same bytes. The switch keeps
the previous values until the new ones were read back and found equal byte for byte (equal numbers
would not do: NaN differs from itself, -0 equals 0). Who runs the module in other threads holds the
lock that the caller holds here; this module knows no thread and no source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from hotweights.adapters.inprocess.errors import NotApplied, Torn
from hotweights.adapters.vllm.rank.fit.dry_load import Spec
from hotweights.adapters.vllm.rank.table import TORCH_NAMES, torch_shape
from hotweights_common.reasons import Reason

if TYPE_CHECKING:
    from hotweights.adapters.inprocess.version import Version


class TorchModel:
    """A module, and the version that is at hand for it. One thread at a time."""

    def __init__(self, module: torch.nn.Module) -> None:
        """Raises `NotApplied` for a module without tensors. Tensors are taken as they are now: a
        module that gets others has to be bound again.
        """
        self._targets = dict(_targets(module))
        self._moves: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        if not self._targets:
            raise NotApplied(
                Reason.NO_TENSORS,
                f"{type(module).__name__} has no parameters and no buffers to update",
            )

    def check(self, version: Version) -> None:
        """Every name, shape and dtype of a version against the module. Raises `NotApplied`, which
        names the tensor.
        """
        for name, spec in version.specs.items():
            target = self._targets.get(name)
            if target is None:
                raise NotApplied(
                    Reason.UNKNOWN_TENSOR,
                    f"{name} is not in the module; leave it out, or rename it with name_map",
                )
            _check(name, spec, target)
        filled = {_place(self._targets[name]) for name in version.specs}
        for name, target in self._targets.items():
            if _place(target) not in filled:
                raise NotApplied(
                    Reason.MISSING_TENSOR,
                    f"{name} is missing in the version; the module would keep its old value",
                )

    def prepare(self, version: Version) -> int:
        """Take a version that was checked; gives its bytes. The tensors must live until the
        switch. Raises `NotApplied` where tied tensors differ.
        """
        moves: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        first: dict[Any, tuple[str, torch.Tensor]] = {}
        for name, new in version.tensors():
            target = self._targets[name]
            other, bytes_of_other = first.setdefault(_place(target), (name, new))
            if not same_bytes(bytes_of_other, new):
                raise NotApplied(
                    Reason.TIED_TENSORS_DIFFER,
                    f"{name} and {other} are one tensor in the module, but differ in the version",
                )
            moves.append((name, target, new))
        self._moves = moves
        return sum(new.nbytes for _, _, new in moves)

    def discard(self) -> None:
        """Let go of a version that is not to be installed."""
        self._moves = []

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def switch(self) -> int:
        """Copy in place, read back, compare; on any error everything is as before. Gives the bytes
        of the version. Raises as `install`; the caller holds the lock of whoever runs the module.
        """
        moves, self._moves = self._moves, []
        install(moves)
        return sum(new.nbytes for _, _, new in moves)


def install(moves: Iterable[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
    """Copy each new tensor over its target, all or none. Raises `NotApplied`; `Torn` if there was
    no way back. Needs host memory for all of the old values. Where it waits for devices, all copies
    have been sent off before.
    """
    listed = list(moves)
    # on the host: next to the model a device may have no room for a second one
    before = [(name, target, target.detach().to("cpu", copy=True)) for name, target, _ in listed]
    try:
        for name, target, new in listed:
            _copy(name, target, new)
        _wait_for_devices(target for _, target, _ in listed)
        for name, target, new in listed:
            # after all copies: a later one may have written over an earlier one's target
            if not same_bytes(target, new):
                raise NotApplied(
                    Reason.READ_BACK_DIFFERS,
                    f"{name} was copied, but reads otherwise; do tensors of the module overlap?",
                )
    except BaseException:  # Ctrl-C too: half a version must not stay
        _restore(before)
        raise


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes, wherever they are."""
    return bool(torch.equal(_bytes(first), _bytes(second)))


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that safetensors calls so. Raises `NotApplied` where this torch has none."""
    dtype = getattr(torch, TORCH_NAMES.get(name, ""), None)
    if dtype is None:
        raise NotApplied(Reason.DTYPE_MISMATCH, f"torch {torch.__version__} has no {name}")
    return dtype


def _targets(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a state dict would hold, under every name that it has."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        kept = {k: b for k, b in part._buffers.items() if k not in part._non_persistent_buffers_set}
        for key, tensor in (*part._parameters.items(), *kept.items()):
            if tensor is not None:
                yield (f"{prefix}.{key}" if prefix else key), tensor


def _check(name: str, spec: Spec, target: torch.Tensor) -> None:
    if target.is_meta:
        raise NotApplied(
            Reason.NO_MEMORY,
            f"{name} is on the meta device in the module: it has no memory to copy into",
        )
    if tuple(target.shape) != torch_shape(spec.dtype, spec.shape):
        raise NotApplied(
            Reason.SHAPE_MISMATCH,
            f"{name} has shape {list(spec.shape)} in the version and {list(target.shape)} in "
            "the module",
        )
    if target.dtype != torch_dtype(spec.dtype):
        raise NotApplied(
            Reason.DTYPE_MISMATCH,
            f"{name} is {spec.dtype} in the version and {target.dtype} in the module",
        )
    if any(
        stride == 0 and size > 1 for stride, size in zip(target.stride(), target.shape, strict=True)
    ):
        raise NotApplied(
            Reason.SHARED_MEMORY,
            f"{name} is an expanded view in the module: its elements share memory",
        )


def _place(tensor: torch.Tensor) -> Any:
    """Equal for tensors that are the same memory, seen the same way. Empty ones have none: each is
    its own.
    """
    if not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)


def _copy(name: str, target: torch.Tensor, new: torch.Tensor) -> None:
    try:
        target.copy_(new, non_blocking=True)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise NotApplied(
            Reason.COPY_FAILED,
            f"{name} could not be copied ({error}); the previous values are back",
        ) from error


def _restore(before: Iterable[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
    listed = list(before)
    try:
        for _, target, old in listed:
            target.copy_(old)
        _wait_for_devices(target for _, target, _ in listed)
        differing = next((name for name, target, old in listed if not same_bytes(target, old)), "")
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise Torn(
            f"the previous values could not be put back ({error}): load the model anew"
        ) from error
    if differing:
        raise Torn(f"{differing} could not be put back: load the model anew")


def _wait_for_devices(tensors: Iterable[torch.Tensor]) -> None:
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        torch.cuda.synchronize(device)
