"""What a model consists of: its tensors by full name, the groups of modules that are finished by
themselves, its vocabularies. Looked up in the modules of a skeleton; nothing here changes anything.

Of vLLM it knows the classes of ``layers/vocab_parallel_embedding.py``; which layers are attention is
asked of `releases`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from hotweights.adapters.vllm import releases
from hotweights.adapters.vllm.rank.shadow import skeleton

Modules = Sequence[tuple[str, torch.nn.Module]]


def tensors_of(
    modules: Iterable[tuple[str, torch.nn.Module]],
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Parameters and buffers: their module's name, their key in it, the tensor."""
    for prefix, module in modules:
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield prefix, key, tensor


def full_name(prefix: str, key: str) -> str:
    """A parameter's, buffer's or attribute's."""
    return f"{prefix}.{key}" if prefix else key


def groups_of(model: torch.nn.Module, modules: Modules) -> dict[str, str]:
    """Of each module, the group that is loaded and finished by itself: what is in one layer, or
    shares memory. Empty: this model has no such parts.
    """
    inside = skeleton.blocks(model)
    is_deferred = releases.api().is_deferred_attention_layer
    attention = [name for name, module in modules if is_deferred(module)]
    if hasattr(model, "process_weights_after_loading") or any(
        inside[name] == name for name in attention
    ):
        return {}  # finishing reaches over modules, and nobody says which
    joined: dict[str, str] = {}

    def group(name: str) -> str:
        while name in joined:
            name = joined[name]
        return name

    # tied modules, in whatever groups they are
    of_storage: dict[int, str] = {}
    for prefix, _, tensor in tensors_of(modules):
        mine = group(inside[prefix])
        other = group(of_storage.setdefault(skeleton.storage_of(tensor), mine))
        if mine != other:
            joined[mine] = other
    return {prefix: group(inside[prefix]) for prefix, _ in modules}


def vocabularies(
    modules: Modules, live: Mapping[str, torch.nn.Module], is_head: bool
) -> Iterator[str]:
    """Layers with a row for each token, by name; heads or embeddings. Quantized ones have no such
    weight.
    """
    for prefix, module in modules:
        if (
            isinstance(module, VocabParallelEmbedding)
            and isinstance(module, ParallelLMHead) is is_head
            and isinstance(getattr(live[prefix], "weight", None), torch.Tensor)
        ):
            yield prefix
