"""Which releases of vLLM are supported, and what Hotweights takes from vLLM that is not the same in
all of them: one adapter for each generation of its API, behind one interface (`Api`).

What is the same in all of them is called where it is needed. A release is named by its first two
numbers. One that is not in `SUPPORTED` is refused in a sentence, and serves on without Hotweights:
how a model is finished after loading is mirrored from vLLM (`rank.shadow`), so each release is to
be compared and tried first (``make releases``; the table is in docs/vllm.md).

vLLM is imported where it is called: this module is read where there is none, too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any


class Api:
    """vLLM 0.31 and later. An older generation says what is otherwise in it."""

    scheduler_queues: tuple[str, ...] = ("waiting", "kv_holding_waiting")
    """The attributes of the scheduler that hold requests which are not running
    (``v1/core/sched/scheduler.py``).
    """
    has_weight_version = True
    """Whether an engine keeps a name for its weights (``EngineCore.set_weight_version``), which
    ``/weight_info`` gives.
    """

    def is_deferred_attention_layer(self, module: Any) -> bool:
        """Whether a layer is finished after all linear layers are (``model_loader/utils.py``:
        ``process_weights_after_loading``).
        """
        from vllm.model_executor.layers.attention import is_deferred_attention_layer

        return bool(is_deferred_attention_layer(module))


class Api028(Api):
    """vLLM 0.28 to 0.30."""

    scheduler_queues = ("waiting", "skipped_waiting")


class Api027(Api028):
    """vLLM 0.27: the question has no function of its own yet."""

    def is_deferred_attention_layer(self, module: Any) -> bool:
        from vllm.model_executor.layers.attention import MMEncoderAttention
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        return _finishes(module, (AttentionLayerBase, MMEncoderAttention))


class Api026(Api027):
    """vLLM 0.26: fewer kinds of attention wait, and weights have no name."""

    has_weight_version = False

    def is_deferred_attention_layer(self, module: Any) -> bool:
        from vllm.model_executor.layers.attention import (
            Attention,
            MLAAttention,
            MMEncoderAttention,
        )

        return _finishes(module, (Attention, MLAAttention, MMEncoderAttention))


SUPPORTED: Mapping[str, Api] = {
    "0.26": Api026(),
    "0.27": Api027(),
    "0.28": Api028(),
    "0.29": Api028(),
    "0.30": Api028(),
    "0.31": Api(),
    "0.32": Api(),
    "0.33": Api(),
}
OLDEST, *_, NEWEST = SUPPORTED


def release(version: str) -> str:
    """The first two numbers of ``vllm.__version__``; all of it where it has none (``dev``)."""
    found = re.match(r"\d+\.\d+", version)
    return found[0] if found else version


def refusal(version: str) -> str:
    """Why a vLLM of this version is not updated in place, with the remedy; empty for one that
    is.
    """
    if release(version) in SUPPORTED:
        return ""
    return (
        f"Hotweights does not know vLLM {version}: run one of {OLDEST} to {NEWEST}, or a Hotweights "
        "whose docs/vllm.md names this release"
    )


@functools.cache
def api() -> Api:
    """The adapter for the vLLM of this process. Raises RuntimeError for one that is not
    supported, which nobody asks who heard `refusal`.
    """
    import vllm

    problem = refusal(vllm.__version__)
    if problem:
        raise RuntimeError(problem)
    return SUPPORTED[release(vllm.__version__)]


def _finishes(module: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(module, kinds) and callable(
        getattr(module, "process_weights_after_loading", None)
    )
