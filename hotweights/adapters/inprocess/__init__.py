"""New weights for a model that lives in this process: what `vllm_extension` and `vllm_auto` are
made of.

``names`` says what a version's tensors are called here, ``buffers`` takes a version that somebody
streams in, ``torch_model`` and ``vllm_model`` know the model (any torch module; one of vLLM's),
``peer_sources`` brings a version from the coordinator's plan into memory. Torch is imported where a
model is, vLLM where its model is, and neither before.
"""
