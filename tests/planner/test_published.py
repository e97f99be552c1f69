"""Manifests that say where their weights are: the same version, whatever the source, and nothing
else gets in that way.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotweights_planner.errors import BadManifest
from hotweights_planner.header import TensorEntry
from hotweights_planner.manifest import Manifest, Probe, build
from hotweights_planner.published import parse_published, published_text


def make(name: str = "w") -> Manifest:
    probes = (Probe(prompt_token_ids=(1,), token_ids=(2,), engine=',"source":"x","tensors":'),)
    return build(
        "m",
        "v1",
        {"a.safetensors": [TensorEntry(name, "U8", (1,), 1, 64)]},
        {name: [64 * "0"]},
        (),
        probes,
    )


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.sampled_from(["w", ',"source":"y","tensors":']),
)
def test_the_source_comes_back_and_is_no_part_of_the_identity(source: str, name: str) -> None:
    manifest = make(name)
    text = published_text(manifest, source)
    found = parse_published(text)
    assert found.source == source
    assert found.manifest.canonical == manifest.canonical
    assert json.loads(text) == json.loads(manifest.canonical) | {"source": source}
    assert parse_published(manifest.canonical) == (manifest, None)


@given(st.data())
def test_damaged_bytes_are_refused_in_words(data: st.DataObject) -> None:
    text = bytearray(published_text(make(), "file:///a"))
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = parse_published(bytes(text))
    except BadManifest:
        return
    assert parse_published(found.manifest.canonical).manifest == found.manifest


@pytest.mark.parametrize(
    "text", [b"", b" \n", b"{", b'{"source":1}', b'{"a":1,"source":"\\ud8","tensors":[]}']
)
def test_garbage_is_refused_in_words(text: bytes) -> None:
    with pytest.raises(BadManifest):
        parse_published(text, "m.json")


def test_a_source_that_stands_twice_is_refused() -> None:
    text = published_text(make(), "file:///a").replace(
        b',"tensors":[{', b',"source":"b","tensors":[{'
    )
    with pytest.raises(BadManifest):
        parse_published(text)
