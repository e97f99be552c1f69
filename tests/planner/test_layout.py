"""Layouts: every chunk has one place on a page, nothing overlaps, and what is there stays where it
is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotweights.adapters.vllm.rank.image import _runs
from hotweights.adapters.vllm.rank.table import parse_table
from hotweights_planner.buckets import buckets, layer_of
from hotweights_planner.delta import delta
from hotweights_planner.errors import BadManifest
from hotweights_planner.header import TensorEntry
from hotweights_planner.layout import Layout, NewSlab, Place, lay_out, table_json
from hotweights_planner.manifest import Chunk, Manifest, build

PAGE = 4096
SLAB = 5 * PAGE


def make(tensors: list[tuple[int, list[int]]], version: str = "v1") -> Manifest:
    """Tensors of whole chunks, named by the numbers given, and a rest whose digest is its size."""
    entries, digests, offset = [], {}, 64
    for index, (rest, contents) in enumerate(tensors):
        nbytes = PAGE * len(contents) + rest
        entries.append(
            TensorEntry(f"model.layers.{index // 2}.t{index}", "U8", (nbytes,), nbytes, offset)
        )
        offset += nbytes
        digests[entries[-1].name] = [f"{content:064x}" for content in contents] + (
            [f"f{rest:063x}"] if rest else []
        )
    return build("m", version, {"a.safetensors": entries}, digests, chunk_nbytes=PAGE)


TENSORS = st.lists(
    st.tuples(st.integers(0, PAGE - 1), st.lists(st.integers(0, 30), max_size=8)),
    min_size=1,
    max_size=8,
)


def check(
    manifest: Manifest, layout: Layout[Hashable], present: dict[str, Place[Hashable]]
) -> None:
    for tensor, extents in zip(manifest.tensors, layout.extents, strict=True):
        assert sum(nbytes for _, _, nbytes in extents) == tensor.nbytes
        assert all(offset % PAGE == 0 for _, offset, _ in extents)
        assert all(
            nbytes % PAGE == 0 for _, _, nbytes in extents[:-1]
        )  # or it would not be contiguous in virtual memory
        assert not any(a[0] == b[0] and a[1] + a[2] == b[1] for a, b in pairwise(extents))
    fresh = sorted(layout.places[digest] for digest in layout.missing)
    assert not any(a[0] == b[0] and a[1] + a[2] > b[1] for a, b in pairwise(fresh))
    for index, offset, nbytes in fresh:
        slab = layout.slabs[index]
        assert isinstance(slab, NewSlab)
        assert offset + nbytes <= slab.nbytes <= SLAB
    distinct = {chunk.blake3 for chunk in manifest.chunks()}
    assert set(layout.places) == distinct
    assert set(layout.missing) == distinct - present.keys()
    found = delta(manifest, present)
    assert found.missing == layout.missing
    assert found.missing_nbytes == sum(
        chunk.nbytes for chunk in manifest.first_chunks(layout.missing)
    )
    assert found.reused_nbytes == manifest.nbytes - found.missing_nbytes
    for digest in distinct & present.keys():
        index, offset, _ = layout.places[digest]
        assert (layout.slabs[index], offset) == (present[digest].slab, present[digest].offset)
    assert len(
        set(layout.slabs) - {slab for slab in layout.slabs if isinstance(slab, NewSlab)}
    ) == sum(not isinstance(slab, NewSlab) for slab in layout.slabs)


def engine_mappings(layout: Layout[Hashable]) -> int:
    """How many an engine makes of it."""
    tensors = []
    for at, extents in enumerate(layout.extents):
        nbytes = sum(extent[2] for extent in extents)
        tensors.append(
            {"name": f"t{at}", "dtype": "U8", "shape": [nbytes], "nbytes": nbytes, "extents": extents}
        )  # fmt: skip
    table = json.dumps({"digest": "d", "version": "v", "tensors": tensors}).encode()
    return len(list(_runs(parse_table(table, [1 << 30] * len(layout.slabs)).entries)))


@given(TENSORS, TENSORS)
def test_an_image_and_its_successor(
    first: list[tuple[int, list[int]]], second: list[tuple[int, list[int]]]
) -> None:
    manifest = make(first)
    layout: Layout[Hashable] = lay_out(manifest, {}, SLAB)
    check(manifest, layout, {})
    present: dict[str, Place[Hashable]] = {
        digest: Place(("slab", index), offset, nbytes)
        for digest, (index, offset, nbytes) in layout.places.items()
    }
    following = make(second, "v2")
    check(following, lay_out(following, present, SLAB), present)
    for made in (layout, lay_out(following, present, SLAB)):
        assert made.mapping_count == engine_mappings(made)
    same: Layout[Hashable] = lay_out(manifest, present, SLAB)
    assert same.new_nbytes == 0
    assert not same.missing


def test_neighbours_become_one_extent_and_equal_chunks_share_one() -> None:
    layout: Layout[str] = lay_out(make([(5, [1, 2, 3]), (0, [2, 3]), (0, [2, 2])]), {}, 10 * PAGE)
    assert layout.extents[0] == ((0, 0, 3 * PAGE + 5),)
    assert layout.extents[1] == ((0, PAGE, 2 * PAGE),)
    assert layout.extents[2] == ((0, PAGE, PAGE), (0, PAGE, PAGE))
    assert layout.slabs == (NewSlab(4 * PAGE),)


def test_only_what_changed_takes_memory() -> None:
    old = make([(0, [1, 2, 3, 4])])
    layout: Layout[str] = lay_out(old, {}, SLAB)
    present = {
        digest: Place("old", offset, nbytes)
        for digest, (_, offset, nbytes) in layout.places.items()
    }
    new = make([(0, [1, 9, 3, 4])], "v2")
    following = lay_out(new, present, SLAB)
    assert following.slabs == ("old", NewSlab(PAGE))
    assert following.extents == (((0, 0, PAGE), (1, 0, PAGE), (0, 2 * PAGE, 2 * PAGE)),)
    assert delta(new, present).missing_nbytes == PAGE
    assert delta(new, present).reused_nbytes == 3 * PAGE


def test_the_table_speaks_as_the_contract_says() -> None:
    manifest = make([(5, [1])])
    table = json.loads(table_json(manifest, lay_out(manifest, {})))
    assert table == {
        "digest": manifest.digest,
        "version": "v1",
        "probes": [],
        "files": [],
        "tensors": [
            {
                "name": "model.layers.0.t0",
                "dtype": "U8",
                "shape": [PAGE + 5],
                "nbytes": PAGE + 5,
                "content": hashlib.sha256("".join(manifest.tensors[0].chunks).encode()).hexdigest(),
                "extents": [[0, 0, PAGE + 5]],
            }
        ],
    }


def test_a_held_chunk_of_another_size_is_refused() -> None:
    manifest = make([(0, [1])])
    with pytest.raises(BadManifest, match="4096 bytes here and 7 elsewhere"):
        lay_out(manifest, {f"{1:064x}": Place("old", 0, 7)})
    with pytest.raises(ValueError, match="no page"):
        lay_out(manifest, {f"{1:064x}": Place("old", 100, PAGE)})
    with pytest.raises(ValueError, match="make it larger"):
        lay_out(manifest, {}, 100)


@given(TENSORS, st.integers(PAGE, 10 * PAGE))
def test_buckets_hold_everything_in_order(
    tensors: list[tuple[int, list[int]]], bucket_nbytes: int
) -> None:
    chunks = list(make(tensors).chunks())
    made = list(buckets(chunks, bucket_nbytes))
    assert [chunk for bucket in made for chunk in bucket.chunks] == chunks
    for bucket in made:
        assert bucket.nbytes == sum(chunk.nbytes for chunk in bucket.chunks) <= bucket_nbytes
        assert list(bucket.layers) == list(
            dict.fromkeys(layer_of(chunk.tensor) for chunk in bucket.chunks)
        )
        size = {
            layer: sum(c.nbytes for c in chunks if layer_of(c.tensor) == layer)
            for layer in bucket.layers
        }
        assert (
            len(bucket.layers) == 1
            or all(  # layers are mixed only where they are whole, or end here
                sum(c.nbytes for c in bucket.chunks if layer_of(c.tensor) == layer) == size[layer]
                for layer in bucket.layers[1:]
            )
        )


def test_a_bucket_smaller_than_a_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk 0 of tensor t has 9 bytes, a bucket 8"):
        list(buckets([Chunk("", 9, "f", 0, "t", 0)], 8))


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [
        ("model.layers.12.mlp.up_proj.weight", "model.layers.12"),
        ("transformer.h.0.attn.bias", "transformer.h.0"),
        ("model.layers.3.mlp.experts.7.w1.weight", "model.layers.3"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head", "lm_head"),
    ],
)
def test_layers_are_read_off_the_names(tensor: str, layer: str) -> None:
    assert layer_of(tensor) == layer
