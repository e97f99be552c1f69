"""Manifests: one spelling, one digest, and nothing unchecked out of foreign bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotweights_common.sanitize import is_digest
from hotweights_planner.errors import BadManifest
from hotweights_planner.header import TensorEntry
from hotweights_planner.manifest import (
    CHUNK_NBYTES,
    Manifest,
    Probe,
    SideFile,
    build,
    digest_of,
    parse,
)


def hexadecimal(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make(
    sizes: dict[str, int], probes: tuple[Probe, ...] | None = None, chunk_nbytes: int = CHUNK_NBYTES
) -> Manifest:
    entries, offset = [], 100
    for name, nbytes in sizes.items():
        entries.append(TensorEntry(name, "U8", (nbytes,), nbytes, offset))
        offset += nbytes
    digests = {
        name: [hexadecimal(f"{name}{number}") for number in range(-(-nbytes // chunk_nbytes))]
        for name, nbytes in sizes.items()
    }
    files = (SideFile(name="config.json", nbytes=2, blake3=hexadecimal("config")),)
    return build("demo", "v1", {"model.safetensors": entries}, digests, files, probes, chunk_nbytes)


PROBE = Probe(prompt_token_ids=(1, 2), token_ids=(3,), engine="vllm 0.32.0 cpu float32")


def test_the_canonical_bytes_are_what_json_would_write() -> None:
    manifest = make({"ä.weight": CHUNK_NBYTES + 1, "empty": 0, "b": 7}, (PROBE,))
    plain = json.loads(manifest.canonical)
    assert (
        manifest.canonical
        == json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    )
    assert set(plain) == {"format", "model", "version", "chunkBytes", "tensors", "files", "probes"}
    assert plain["probes"] == [
        {"promptTokenIds": [1, 2], "tokenIds": [3], "engine": "vllm 0.32.0 cpu float32"}
    ]
    assert manifest.digest == "sha256:" + hashlib.sha256(manifest.canonical).hexdigest()
    assert is_digest(manifest.digest)
    assert not is_digest(manifest.digest + "\n")


def test_probes_are_absent_rather_than_empty() -> None:
    assert "probes" not in json.loads(make({"a": 1}).canonical)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_.é]{0,12}", fullmatch=True),
        st.integers(0, 20_000),
        min_size=1,
        max_size=8,
    )
)
def test_a_manifest_survives_the_way_through_bytes(sizes: dict[str, int]) -> None:
    manifest = make(sizes, chunk_nbytes=4096)
    again = parse(manifest.canonical, digest=manifest.digest)
    assert again == manifest
    assert again.digest == manifest.digest
    chunks = list(again.chunks())
    assert sum(chunk.nbytes for chunk in chunks) == sum(sizes.values()) == again.nbytes
    assert len(chunks) == again.chunk_count
    assert all(0 < chunk.nbytes <= 4096 for chunk in chunks)
    assert list(again.first_chunks(chunk.blake3 for chunk in chunks)) == chunks


Edit = Callable[[dict[str, Any]], object]


def _set(path: str, value: object) -> Edit:
    *steps, last = [int(step) if step.isdigit() else step for step in path.split("/")]

    def edit(document: Any) -> None:
        for step in steps:
            document = document[step]
        document[last] = value

    return edit


TENSOR = {
    "name": "z",
    "dtype": "U8",
    "shape": [0],
    "nbytes": 0,
    "file": "other.safetensors",
    "offset": 0,
    "chunks": [],
}


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (_set("format", "hotweights/manifest/v2"), "format"),
        (_set("more", 1), "more: Extra inputs"),
        (_set("version", "no label!"), "version"),
        (_set("version", "a" * 64), "version"),
        (_set("version", "v1\n"), "version"),
        (_set("model", 1), "model"),
        (_set("chunkBytes", 0), "chunkBytes"),
        (_set("chunkBytes", 5000), "chunkBytes"),
        (_set("chunkBytes", 1 << 40), "chunkBytes"),
        (_set("tensors", []), "no tensors"),
        (_set("tensors/0/nbytes", 7), r"\[5000\] is 5000 bytes, nbytes says 7"),
        (_set("tensors/0/nbytes", -1), "nbytes"),
        (_set("tensors/0/nbytes", 5000.0), "nbytes"),
        (_set("tensors/0/nbytes", 1 << 70), "nbytes"),
        (_set("tensors/0/offset", True), "offset"),
        (_set("tensors/0/offset", (1 << 63) - 1), "ends beyond"),
        (_set("tensors/0/shape", [5000] + [1] * 40), "shape"),
        (_set("tensors/0/dtype", "F33"), "unknown dtype 'F33'"),
        (_set("tensors/0/name", "../x"), "looks like a path"),
        (_set("tensors/0/name", "x\x1b[2J"), "unprintable"),
        (_set("tensors/1/name", "a"), "tensor a stands twice"),
        (_set("tensors/1/offset", 0), "before 5100"),
        (_set("tensors/0/file", "../model.safetensors"), "not a plain name"),
        (_set("tensors/0/file", ""), "not a plain name"),
        (_set("tensors/0/file", "x" * 256), "not a plain name"),
        (lambda d: d["tensors"].insert(1, TENSOR), "do not stand together"),
        (_set("tensors/0/chunks", []), "0 chunks, 5000 bytes make 2"),
        (_set("tensors/0/chunks/0", "a" * 63), "not 64 hexadecimal"),
        (_set("tensors/0/chunks/0", "A" * 64), "not 64 hexadecimal"),
        (_set("tensors/0/chunks", ["a" * 60, "a" * 68]), "not 64 hexadecimal"),
        (_set("tensors/0/chunks/0", "é" * 64), "not 64 hexadecimal"),
        (_set("tensors/0/chunks", [hexadecimal("x")] * 2), "two sizes"),
        (_set("tensors/1/chunks/0", hexadecimal("a1")), "two sizes"),
        (_set("files/0/name", "a/b"), "not a plain name"),
        (_set("files/0/nbytes", 1 << 40), "nbytes"),
        (_set("files/0/blake3", "00"), "blake3"),
        (lambda d: d["files"].append(d["files"][0]), "same name"),
        (_set("probes", None), "canonical"),
        (
            _set("probes", [{"promptTokenIds": [], "tokenIds": [1], "engine": "e"}]),
            "promptTokenIds",
        ),
        (
            _set("probes", [{"promptTokenIds": [-1], "tokenIds": [1], "engine": "e"}]),
            "promptTokenIds",
        ),
    ],
)
def test_foreign_bytes_are_refused(edit: Edit, what: str) -> None:
    document = json.loads(make({"a": 5000, "b": 10}, chunk_nbytes=4096).canonical)
    edit(document)
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    with pytest.raises(BadManifest, match=what):
        parse(text)


def test_there_is_one_spelling() -> None:
    text = make({"a": 1}).canonical
    for other in (
        b" " + text,
        text + b"\n",
        text.replace(b'"format"', b'"format":"x","format"'),
        json.dumps(json.loads(text)).encode(),
    ):
        with pytest.raises(BadManifest):
            parse(other)


def test_another_digest_than_the_expected_is_refused() -> None:
    text = make({"a": 1}).canonical
    with pytest.raises(BadManifest, match="fetch it again"):
        parse(text, digest=digest_of(text + b" "))


def test_an_endless_manifest_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotweights_planner.manifest.MAX_MANIFEST_NBYTES", 10)
    with pytest.raises(BadManifest, match="at most 10"):
        parse(b"[" * 11)


@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(BadManifest):
        parse(noise)


@given(st.data())
def test_damage_is_refused_or_means_another_version(data: st.DataObject) -> None:
    manifest = make({"a": 5000, "b": 10}, (PROBE,), chunk_nbytes=4096)
    damaged = bytearray(manifest.canonical)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = parse(bytes(damaged))
    except BadManifest:
        return
    assert (found.digest == manifest.digest) == (bytes(damaged) == manifest.canonical)
