"""Configurations that another trainer spelled otherwise, and those that are others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hotweights.adapters.vllm.rank.fit.config_meaning import differences, summary

VISION = {"model_type": "siglip", "torch_dtype": "float16", "depth": 4}
QUANTIZATION = {
    "torch_dtype": "int8",
    "ignore": ["lm_head"],
    "dynamic": {"-:gate": 4, "+:.*": 8},
}
CONFIG: dict[str, Any] = {
    "_name_or_path": "/home/a/base",
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "vision_config": VISION | {"transformers_version": "4.44.0"},
    "quantization_config": QUANTIZATION,
}


def changed(**values: Any) -> dict[str, Any]:
    found = CONFIG | values
    return {key: value for key, value in found.items() if value is not ...}


@pytest.mark.parametrize(
    "new",
    [
        changed(transformers_version="5.19.0"),
        changed(transformers_version=..., _name_or_path=..., _commit_hash="abc"),
        changed(torch_dtype=..., dtype="bfloat16"),
        changed(dtype="bfloat16"),
        changed(dtype=None),
        changed(vision_config={"model_type": "siglip", "dtype": "float16", "depth": 4}),
        dict(reversed(CONFIG.items())),
    ],
    ids=str,
)
def test_the_same_in_other_words(new: dict[str, Any]) -> None:
    assert differences(json.dumps(CONFIG, indent=2), json.dumps(new)) == []
    assert differences(json.dumps(new), json.dumps(CONFIG)) == []


@pytest.mark.parametrize(
    ("new", "found"),
    [
        (changed(rope_theta=500000.0), "rope_theta: 10000 → 500000.0"),
        (changed(rope_theta=10000.0), "rope_theta: 10000 → 10000.0"),
        (
            changed(quantization_config=dict(reversed(QUANTIZATION.items()))),
            "quantization_config: the keys have another order",
        ),
        (
            changed(quantization_config=QUANTIZATION | {"dynamic": {"+:.*": 8, "-:gate": 4}}),
            "quantization_config.dynamic: the keys have another order",
        ),
        (changed(torch_dtype="float16"), 'dtype: "bfloat16" → "float16"'),
        (changed(dtype="float16"), 'dtype: "bfloat16" → "float16"'),
        (changed(torch_dtype=...), 'dtype: "bfloat16" → absent'),
        (changed(sliding_window=None), "sliding_window: absent → null"),
        (changed(tie_word_embeddings=0), "tie_word_embeddings: false → 0"),
        (changed(architectures=["A", "B"]), 'architectures: ["LlamaForCausalLM"] → ["A", "B"]'),
        (changed(vision_config=VISION | {"depth": 5}), "vision_config.depth: 4 → 5"),
        (
            changed(
                quantization_config={
                    "dtype" if key == "torch_dtype" else key: value
                    for key, value in QUANTIZATION.items()
                }
            ),
            'quantization_config.dtype: absent → "int8"',
        ),
        (changed(model_type="x" * 90), f'model_type: "llama" → "{"x" * 38}…'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_another_is_named(new: dict[str, Any], found: str) -> None:
    assert found in (differences(json.dumps(CONFIG), json.dumps(new)) or [])


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("4.44.0", "4.57.1", True),
        ("4.44.0", "5.19.0", False),
        ("5.0.0", "5.19.0", True),
        ("4.44.0", "", False),
    ],
)
def test_mistral_s_tokenizer_asks_which_transformers_it_was(old: str, new: str, same: bool) -> None:
    spelled = [
        json.dumps(changed(model_type="mistral", transformers_version=version or ...))
        for version in (old, new)
    ]
    assert (differences(*spelled) == []) is same


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "[" * 100_000, '{"a": NaN'])
def test_of_what_is_no_configuration_nothing_is_said(text: str) -> None:
    assert differences(json.dumps(CONFIG), text) is None
    assert differences(text, json.dumps(CONFIG)) is None


def test_the_first_few_are_shown() -> None:
    found = differences("{}", json.dumps(dict.fromkeys("edcba", 1)))
    assert found is not None
    assert summary(found) == "a: absent → 1, b: absent → 1, c: absent → 1, and 2 more"
