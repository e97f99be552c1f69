"""torch's default dtype, for one thread.

A cold load has the model's dtype as the default of the whole process (vLLM 0.32,
``model_loader/base_loader.py``): what a loader or a layer's post-processing makes without naming a
dtype is of that. Beside a model that serves it must not be set, because the steps of the model
would make their tensors of it too. So it is given to each function that makes a tensor, on the
thread that loads.

Not covered: what torch itself promotes, an integer divided by an integer for instance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# they make the default's, whatever they are given
_ALWAYS = frozenset(
    {
        torch.empty, torch.empty_strided, torch.empty_permuted, torch.zeros, torch.ones,
        torch.rand, torch.randn, torch.eye, torch.linspace, torch.logspace,
    }
)  # fmt: skip
# they make the default's of Python's floats, and of nothing
_OF_FLOATS = frozenset({torch.tensor, torch.as_tensor, torch.asarray, torch.full, torch.arange})
_OPTIONS = frozenset({"device", "layout", "requires_grad", "pin_memory", "copy", "names"})


class _DefaultDtype(TorchFunctionMode):  # type: ignore[misc]
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_named = kwargs.get("dtype") is not None or kwargs.get("out") is not None
        if not is_named and (func in _ALWAYS or (func in _OF_FLOATS and _floats(args, kwargs))):
            kwargs = {**kwargs, "dtype": self._dtype}
        return func(*args, **kwargs)


def _floats(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether these are Python's own numbers, and the default is what torch makes of them."""
    values = [value for key, value in kwargs.items() if key not in _OPTIONS]
    # exactly of these types: another tensor says a dtype, and numpy's float64 is a float, too
    kinds = {type(leaf) for leaf in tree_leaves((args, values))}
    return kinds <= {bool, int, float} and (float in kinds or not kinds)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Of the thread that runs this, until it ends."""
    with _DefaultDtype(dtype):
        yield
