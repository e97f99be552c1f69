"""New weights for a model that lives in this process: what `vllm_extension` and `vllm_auto` are made of.

``names`` says what a version's tensors are called here, ``buffers`` takes a version that somebody streams in, ``plain`` and ``fused``
know the model (any torch module; one of vLLM's), ``staged`` brings a version from the coordinator's plan into memory. Torch is imported
where a model is, vLLM where its model is, and neither before.
"""
