"""Which engines of a vLLM that we know cannot be updated while they run, or not in every part, and
why: said in the hello, at once, instead of waiting for what never comes.
"""

from __future__ import annotations

from typing import Any

from hotweights.adapters.vllm import plugin


def unsuitable(vllm_config: Any, api_servers: int = 1) -> str:
    """One sentence with the remedy; empty for an engine that can be updated. ``api_servers`` are
    the processes with the engine's port, as far as the caller knows.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    if api_servers > 1:
        return "Hotweights needs one API server per engine: set --api-server-count 1"
    if getattr(parallel, "data_parallel_size", 1) > 1:
        # all ranks of all pods would have to switch in one pause: experts may lie across them
        return (
            "Hotweights does not update engines with data parallelism, in one pod or across pods: "
            "run independent replicas (--data-parallel-size 1)"
        )
    if getattr(parallel, "enable_eplb", False):
        return (
            "Hotweights does not update engines that move experts between ranks: start them "
            "without --enable-eplb"
        )
    if getattr(parallel, "nnodes", 1) > 1 or parallel.distributed_executor_backend == "ray":
        return (
            "Hotweights does not update engines that are spread over several nodes: an agent hands "
            "memory to the processes of its own node alone"
        )
    if getattr(model, "runner_type", "generate") != "generate":
        return (
            f"Hotweights cannot prove a switch of a {model.runner_type} model: it answers no "
            "tokens that a probe could compare"
        )
    if connector := _cannot_forget(vllm_config):
        return (
            f"the KV connector {connector} cannot forget what older weights computed (it has no "
            "reset_cache): remove --kv-transfer-config, or take another connector"
        )
    config = vllm_config.weight_transfer_config
    if config is None or config.backend != plugin.BACKEND:
        backend = None if config is None else config.backend
        return (
            f"the engine has --weight-transfer-config backend {backend!r}: remove the argument, "
            "or opt the pod out"
        )
    return ""


# vLLM's SpeculativeMethod (config/speculative.py, 0.32): these guess without weights of their own
_WITHOUT_WEIGHTS = frozenset({"ngram", "ngram_gpu", "suffix", "extract_hidden_states"})


def caveat(vllm_config: Any) -> str:
    """What a new version leaves as it was, in one sentence with the remedy; empty: nothing."""
    speculation = getattr(vllm_config, "speculative_config", None)
    method = str(getattr(speculation, "method", "") or "")
    if speculation is None or method in _WITHOUT_WEIGHTS:
        return ""
    return (
        f"its draft model ({method or 'of an unknown method'}) keeps the weights that it booted "
        "with: answers are the version's, but fewer of its guesses may be accepted; restart the "
        "pod to load a draft model that fits"
    )


def _cannot_forget(vllm_config: Any) -> str:
    """The name of a KV connector that keeps vLLM's own ``reset_cache``, which does nothing."""
    config = vllm_config.kv_transfer_config
    if config is None or not config.kv_connector:
        return ""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    found = KVConnectorFactory.get_connector_class(config)
    nothing = getattr(KVConnectorBase_V1, "reset_cache", None)
    return str(config.kv_connector) if getattr(found, "reset_cache", None) is nothing else ""
