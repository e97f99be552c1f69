"""The architectures of the zoo, as data: what `transformers` calls a configuration, the settings
that make it tiny, and what is particular about it. Another one is another entry.

Tiny means two layers (four where a model has two kinds of them), a width of 256, and one token for
each byte. Heads are 64 wide, because attention on CPUs refuses what is no multiple of 32; DeepSeek's
are as wide as its only kernel there takes. ``eos_token_id`` and the vocabulary are those of the
tokenizer that `localvllm` writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCABULARY = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 0}
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
PLAIN = VOCABULARY | SIZES
GROUPED = PLAIN | {"num_key_value_heads": 2}  # two heads of queries share one of keys
EXPERTS = GROUPED | {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
GPT = {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512}
LATENT = {
    # vLLM's kernel for it on CPUs takes these widths alone (``backends/mla/cpu_mla.py``)
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


@dataclass(frozen=True, slots=True)
class Architecture:
    name: str
    config_class: str
    """Of `transformers`."""
    settings: Mapping[str, Any]
    kind: str
    """What is particular about it: why it is in the zoo."""
    scale: float = 5.0
    """`localvllm.models.Model.scale`."""
    arguments: tuple[str, ...] = ()
    """Further arguments of vLLM."""
    refused: str = ""
    """A part of the sentence with which an engine of it is refused; empty: it is to be updated."""
    digest: str = field(init=False)
    """Of what its checkpoints are written from: another setting is another checkpoint."""

    def __post_init__(self) -> None:
        recipe = json.dumps([self.config_class, self.settings, self.scale], sort_keys=True)
        object.__setattr__(self, "digest", hashlib.sha256(recipe.encode()).hexdigest()[:8])


ZOO = (
    Architecture("qwen3", "Qwen3Config", GROUPED | {"head_dim": 64}, "norms of queries and keys"),
    Architecture("mistral", "MistralConfig", GROUPED | {"sliding_window": 32}, "sliding window"),
    Architecture(
        "gemma2",
        "Gemma2Config",
        GROUPED | {"head_dim": 64, "sliding_window": 32, "query_pre_attn_scalar": 64},
        "tied, capped logits, both windows",
    ),
    Architecture(
        "gemma3",
        "Gemma3TextConfig",
        GROUPED | {"head_dim": 64, "sliding_window": 32, "query_pre_attn_scalar": 64},
        "tied, both windows, two rotary tables",
    ),
    Architecture("phi", "PhiConfig", PLAIN, "Transformers' own modules, biases"),
    Architecture("phi3", "Phi3Config", GROUPED, "fused in the checkpoint"),
    Architecture(
        "mixtral",
        "MixtralConfig",
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
        "experts",
    ),
    Architecture(
        "qwen2-moe",
        "Qwen2MoeConfig",
        EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 128},
        "experts and a shared one",
    ),
    Architecture("gpt-neox", "GPTNeoXConfig", PLAIN, "Transformers' own modules, fused by head"),
    Architecture(
        "falcon",
        "FalconConfig",
        VOCABULARY | {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
        "one head of keys, tied",
    ),
    Architecture(
        "bloom",
        "BloomConfig",
        VOCABULARY | {"hidden_size": 256, "n_layer": 2, "n_head": 4},
        "ALiBi, tied",
    ),
    Architecture("stablelm", "StableLmConfig", GROUPED, "partial rotary"),
    Architecture("olmo2", "Olmo2Config", GROUPED, "Transformers' own modules, norms after"),
    Architecture("granite", "GraniteConfig", GROUPED, "multipliers"),
    Architecture(
        "granite-moe",
        "GraniteMoeConfig",
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
        "experts, fused in the checkpoint",
    ),
    Architecture("cohere", "CohereConfig", GROUPED | {"logit_scale": 1.0}, "tied, one norm"),
    Architecture("starcoder2", "Starcoder2Config", GROUPED, "Transformers' own modules, tied"),
    Architecture("glm4", "Glm4Config", GROUPED | {"head_dim": 64}, "four norms, fused"),
    Architecture(
        "gpt-oss",
        "GptOssConfig",
        GROUPED
        | {
            "head_dim": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 32,
        },
        "sinks, experts with biases",
    ),
    Architecture(
        "llama4",
        "Llama4TextConfig",
        GROUPED
        | {
            "head_dim": 64,
            "intermediate_size_mlp": 512,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 64,
        },
        "experts and a shared one, chunked attention",
    ),
    Architecture(
        "mamba2",
        "Mamba2Config",
        VOCABULARY
        | {
            "hidden_size": 256,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 64,
            "state_size": 64,
            "n_groups": 1,
        },
        "state spaces, no attention",
    ),
    Architecture(
        "gptj",
        "GPTJConfig",
        VOCABULARY | GPT | {"rotary_dim": 32},
        "attention and MLP in parallel",
    ),
    Architecture(
        "gpt-bigcode",
        "GPTBigCodeConfig",
        VOCABULARY | GPT,
        "Transformers' own modules, one head of keys",
    ),
    Architecture("nemotron", "NemotronConfig", GROUPED | {"head_dim": 64}, "norms of 1 + weight"),
    Architecture(
        "olmoe",
        "OlmoeConfig",
        GROUPED | {"num_experts": 4, "num_experts_per_tok": 2},
        "experts, norms over all heads",
    ),
    Architecture("deepseek-v2", "DeepseekV2Config", PLAIN | LATENT, "latent attention, experts"),
    Architecture(
        "deepseek-v3",
        "DeepseekV3Config",
        PLAIN | LATENT | {"q_lora_rank": 128, "topk_method": "noaux_tc"},
        "latent attention twice, experts with a bias of their router",
    ),
    Architecture(
        "jamba",
        "JambaConfig",
        GROUPED
        | {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 16,
            "mamba_dt_rank": 16,
            "use_mamba_kernels": False,
        },
        "hybrid: attention, state spaces, experts",
    ),
    Architecture(
        "qwen3-next",
        "Qwen3NextConfig",
        EXPERTS
        | {
            "head_dim": 64,
            "num_experts": 4,
            "shared_expert_intermediate_size": 128,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
        "hybrid: attention, gated delta nets, experts",
    ),
    Architecture(
        "falcon-h1",
        "FalconH1Config",
        GROUPED
        | {
            "head_dim": 64,
            "mamba_d_ssm": 512,
            "mamba_n_heads": 8,
            "mamba_d_head": 64,
            "mamba_d_state": 64,
            "mamba_n_groups": 1,
        },
        "hybrid: attention and state spaces in each layer",
    ),
    Architecture(
        "llava",
        "LlavaConfig",
        {
            "text_config": GROUPED | {"model_type": "llama"},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "image_token_index": 255,
        },
        "sees: a tower and a projector before the language model",
        arguments=("--limit-mm-per-prompt", '{"image": 0}'),
    ),
    Architecture(
        "bert",
        "BertConfig",
        PLAIN,
        "pooling",
        arguments=("--runner", "pooling"),
        refused="it answers no tokens",
    ),
)
"""In the order in which they are tried."""

LEFT_OUT = {
    "mpt": "vLLM has dropped it after 0.28.0",
}
"""Names that somebody may look for, and why they are not tried."""
