"""Runs inside vLLM's environment: writes the checkpoints that the JSON argument lists. See
`models.py`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

BYTES, BOS, EOS = 256, 256, 257


def write_tokenizer(folder: Path) -> None:
    """One token per byte, so that any text is a valid prompt of any of these models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)} | {
        "<s>": BOS,
        "</s>": EOS,
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)


def build(arch: str, layers: int, hidden: int) -> Any:
    common: dict[str, Any] = {"vocab_size": BYTES + 2, "bos_token_id": BOS, "eos_token_id": EOS}
    heads = hidden // 64
    modern = common | {
        "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads // 2, "max_position_embeddings": 512,
    }  # fmt: skip
    if arch == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**modern))
    if arch == "qwen2":
        return transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**modern, tie_word_embeddings=True)
        )
    if arch == "gpt2":
        config = transformers.GPT2Config(
            **common, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=512
        )
        return transformers.GPT2LMHeadModel(config)
    if arch == "opt":
        return transformers.OPTForCausalLM(transformers.OPTConfig(
            **common, hidden_size=hidden, ffn_dim=2 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
            max_position_embeddings=512, word_embed_proj_dim=hidden, pad_token_id=1,
        ))  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **modern, moe_intermediate_size=128, num_experts=8, num_experts_per_tok=2, head_dim=64, decoder_sparse_step=1,
    ))  # fmt: skip


def build_from(config_class: str, settings: dict[str, Any]) -> Any:
    """Of any class of a configuration that `transformers` has; one that answers text, if it can."""
    config = getattr(transformers, config_class)(**settings)
    for auto in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModel,
    ):
        if type(config) in auto._model_mapping:
            return auto.from_config(config)
    raise ValueError(f"{config_class}: transformers {transformers.__version__} has no model for it")


def write(
    dir: str,
    arch: str,
    seed: int,
    shards: int,
    dtype: str,
    layers: int,
    hidden: int,
    config_class: str,
    settings: dict[str, Any],
    scale: float,
) -> None:
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = build_from(config_class, settings) if config_class else build(arch, layers, hidden)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
            if parameter.ndim == 1:  # norms and biases start out equal in every seed
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model = model.to(getattr(torch, dtype))
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    partial = Path(f"{dir}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    limit = nbytes if shards == 1 else int(nbytes / shards * 1.05)
    model.save_pretrained(partial, max_shard_size=limit + 1)
    write_tokenizer(partial)
    partial.rename(dir)


failed = 0
for entry in json.loads(sys.argv[1]):
    try:
        write(**entry)
    except Exception as error:  # noqa: BLE001 - any model's constructor may raise anything; the others are written
        failed += 1
        print(f"{entry['dir']}: {type(error).__name__}: {error}", file=sys.stderr)
sys.exit(1 if failed else 0)
