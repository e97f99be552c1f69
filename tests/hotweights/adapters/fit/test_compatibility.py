"""Which head a version may bring, where a cold load would decide anew whether it is tied."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from e2e.engine import images
from hotweights.adapters.vllm.rank.fit.compatibility import Compatibility
from hotweights.adapters.vllm.rank.fit.dry_load import Spec, Trace
from hotweights.adapters.vllm.rank.image import Image

NAMES = [
    # the embeddings, the head; as Llama, GPT-2, Falcon, Mamba 2 and LLaVA call them
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("wte.weight", "lm_head.weight"),
    ("transformer.word_embeddings.weight", "lm_head.weight"),
    ("backbone.embeddings.weight", "lm_head.weight"),
    ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
]
LAYER = "layers.0.weight"


class Loaders:
    """What is asked of a `Shadow`: a model with embeddings, a layer and a head. ``built_tied``: its
    constructor tied them; ``runs_tied``: the running model's share memory.
    """

    def __init__(self, embedding: str, *, built_tied: bool, runs_tied: bool) -> None:
        self._embedding, self._built_tied, self._runs_tied = embedding, built_tied, runs_tied
        self.asked: list[list[str]] = []

    def trace(self, specs: Mapping[str, Spec]) -> Trace:
        self.asked.append(list(specs))
        taken = [n for n in specs if not (self._built_tied and n.endswith("lm_head.weight"))]
        return Trace(
            copied={name: {name: 4} for name in taken},
            sources={name: frozenset({name}) for name in taken},
        )

    def embeddings(self) -> frozenset[str]:
        return frozenset({self._embedding})

    def tied(self) -> frozenset[str]:
        return self.embeddings() if self._runs_tied else frozenset()

    def groups(self) -> dict[str, str]:
        return {}

    def unexplained(self) -> frozenset[str]:
        return frozenset()


def ask(
    folder: Path, loaders: Loaders, boot: Mapping[str, int], tied: bool = True
) -> Compatibility:
    """An engine that booted from these tensors. Each is filled with one byte. ``tied``: so its
    configuration says.
    """
    header, data = {}, b""
    for name, byte in boot.items():
        header[name] = {"dtype": "F32", "shape": [4], "data_offsets": [len(data), len(data) + 16]}
        data += bytes([byte]) * 16
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    has_head = any(name.endswith("lm_head.weight") for name in boot)
    model = SimpleNamespace(
        model=str(folder),
        tokenizer=str(folder),
        revision=None,
        # as vLLM 0.32 leaves them
        hf_text_config=SimpleNamespace(tie_word_embeddings=tied and not has_head),
        word_embeddings_untied_by_checkpoint=tied and has_head,
    )
    load = SimpleNamespace(load_format="auto")
    return Compatibility(SimpleNamespace(model_config=model, load_config=load), loaders)


def version(**tensors: int) -> Image:
    built = images.build(
        [images.Tensor(n, "F32", [4], bytes([b]) * 16) for n, b in tensors.items()]
    )
    try:
        return Image.open(built.fds, built.digest)
    finally:
        built.close()


@pytest.mark.parametrize(("embedding", "head"), NAMES)
@pytest.mark.parametrize("built_tied", [True, False], ids=["built tied", "tied after loading"])
def test_a_tied_model_takes_no_head_but_its_embeddings(
    tmp_path: Path, embedding: str, head: str, built_tied: bool
) -> None:
    boot = {embedding: 1, LAYER: 1} | ({} if built_tied else {head: 1})
    loaders = Loaders(embedding, built_tied=built_tied, runs_tied=True)
    compatibility = ask(tmp_path, loaders, boot)
    assert compatibility.check(version(**{embedding: 2, LAYER: 2, head: 2})) is None
    misfit = compatibility.check(version(**{embedding: 2, LAYER: 2, head: 3}))
    assert misfit is not None
    assert misfit.reason == "UnknownTensor"
    assert misfit.message.startswith(f"{head} differs from {embedding}, but the running model")


@pytest.mark.parametrize(("embedding", "head"), NAMES)
@pytest.mark.parametrize("runs_tied", [True, False])
def test_a_version_without_the_head_that_the_engine_booted_with_is_tied(
    tmp_path: Path, embedding: str, head: str, runs_tied: bool
) -> None:
    loaders = Loaders(embedding, built_tied=False, runs_tied=runs_tied)
    compatibility = ask(tmp_path, loaders, {embedding: 1, LAYER: 1, head: 1 if runs_tied else 9})
    image = version(**{embedding: 2, LAYER: 2})
    assert compatibility.check(image) is None
    assert compatibility.filled(image.digest) == {embedding: 4, LAYER: 4, head: 4}


def test_a_model_with_a_head_of_its_own_takes_another_and_needs_one(tmp_path: Path) -> None:
    embedding, head = NAMES[0]
    loaders = Loaders(embedding, built_tied=False, runs_tied=False)
    compatibility = ask(tmp_path, loaders, {embedding: 1, LAYER: 1, head: 9}, tied=False)
    assert compatibility.check(version(**{embedding: 2, LAYER: 2, head: 3})) is None
    misfit: Any = compatibility.check(version(**{embedding: 2, LAYER: 2}))
    assert misfit.reason == "MissingTensor"


def test_loaders_are_asked_once_for_versions_of_the_same_tensors(tmp_path: Path) -> None:
    embedding, head = NAMES[0]
    loaders = Loaders(embedding, built_tied=False, runs_tied=False)
    compatibility = ask(tmp_path, loaders, {embedding: 1, LAYER: 1, head: 9})
    loaders.asked.clear()  # of what it booted from
    first, second = (version(**{embedding: n, LAYER: n, head: n}) for n in (2, 3))
    for image in (first, second):
        assert compatibility.check(image) is None
        assert compatibility.filled(image.digest) == {embedding: 4, LAYER: 4, head: 4}
    assert loaders.asked == [[embedding, LAYER, head]]
    # in another order one tensor may be written over another
    turned = version(**{LAYER: 2, embedding: 2, head: 2})
    assert compatibility.check(turned) is None
    assert loaders.asked[1:] == [[LAYER, embedding, head]]
