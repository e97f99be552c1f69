"""Checkpoint folders as people have them, and what becomes of each: a table, which the tests of
storage read without vLLM, and those of `e2e/engine` beside one.

Each shape stands for reports of users of vLLM, transformers and safetensors; docs/troubleshooting.md
tells the same to people.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_NBITS = {"U8": 8, "BF16": 16, "F32": 32, "C64": 64, "F8_E4M3FNUZ": 8, "F4": 4, "F6_E2M3": 6}


@dataclass(frozen=True)
class Shape:
    """One folder. Either ``tensors`` of it are the version, with ``told`` in the notes, or it is
    ``refused`` with these words.
    """

    name: str
    kind: str
    build: Callable[[Path], None]
    tensors: str = ""  # a letter each
    told: str = ""
    refused: str = ""
    ignore: tuple[str, ...] = ()
    lenient: bool = False
    root: str = ""  # what the installation lets be read, from the folder; '': links lead anywhere
    vllm: str | None = None
    """What a cold vLLM reads where that is something else; '': it refuses the folder. vLLM has no
    ``ignore``.
    """


def weights(path: Path, names: str, dtype: str = "F32", shape: tuple[int, ...] = (2, 2)) -> None:
    """A file of tensors, one for each letter, with numbers that are not zero."""
    count = 1
    for size in shape:
        count *= size
    nbytes = count * _NBITS[dtype] // 8
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [at * nbytes, (at + 1) * nbytes]}
        for at, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    data = b"".join(bytes([1 + ord(name) % 64]) * nbytes for name in names)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def index(path: Path, **file_of: str) -> None:
    """An index that names these files for these tensors."""
    path.write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


def _single(folder: Path) -> None:
    weights(folder / ONE, "ab")


def _sharded(folder: Path) -> None:
    weights(folder / A, "ab")
    weights(folder / B, "c")
    index(folder / INDEX, a=A, b=A, c=B)


def _with(build: Callable[[Path], None], *more: Callable[[Path], object]) -> Callable[[Path], None]:
    def built(folder: Path) -> None:
        for step in (build, *more):
            step(folder)

    return built


def _mistral(folder: Path) -> None:
    weights(folder / "consolidated.safetensors", "xyz")
    index(
        folder / "consolidated.safetensors.index.json",
        **dict.fromkeys("xyz", "consolidated.safetensors"),
    )


def _two_strange_indices(folder: Path) -> None:
    weights(folder / "a.safetensors", "a")
    for name in ("a", "b"):
        index(folder / f"{name}.safetensors.index.json", a="a.safetensors")


def _strange_index(folder: Path) -> None:
    weights(folder / "a.safetensors", "a")
    index(folder / "unet.safetensors.index.json", a="a.safetensors")


def _links(folder: Path) -> None:
    (folder / "latest").symlink_to("checkpoint-500")
    (folder / ".#config.json").symlink_to("me@host.1:2")
    (folder / "README.md").symlink_to("../../README.md")
    (folder / "model.lock").symlink_to("/nowhere/lock")
    (folder / "checkpoint-400").mkdir()


def _hub_cache(folder: Path) -> None:
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    weights(blobs / "0a", "ab")
    (blobs / "0b").write_text("{}")
    (folder / ONE).symlink_to("../blobs/0a")
    (folder / "config.json").symlink_to("../blobs/0b")


def _cut(folder: Path) -> None:
    _sharded(folder)
    (folder / B).write_bytes((folder / B).read_bytes()[:-1])


def _longer(folder: Path) -> None:
    _single(folder)
    (folder / ONE).write_bytes((folder / ONE).read_bytes() + b"x")


def _sharded_state(folder: Path) -> None:
    for rank in (0, 1):
        weights(folder / f"model-rank-{rank}-part-0.safetensors", "ab")


def _file(name: str, content: bytes = b"?") -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return build


def _dangling(name: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / name).symlink_to("nowhere")

    return build


def _typed(dtype: str, shape: tuple[int, ...] = (4, 8)) -> Callable[[Path], None]:
    return lambda folder: weights(folder / ONE, "a", dtype, shape)


_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
_fp16 = _with(_single, lambda folder: weights(folder / "model.fp16.safetensors", "ab"))
_wrong_index = _with(_sharded, lambda folder: index(folder / INDEX, a=A, b=A, c=B, d=B))
_short_index = _with(_sharded, lambda folder: index(folder / INDEX, a=A, c=B))
_lora = _with(_single, lambda folder: weights(folder / "adapter_model.safetensors", "l"))
_no_tokenizer = _with(_single, _dangling("tokenizer.json"))

SHAPES = (
    # Indices
    Shape("one file", "index", _single, "ab"),
    Shape("shards", "index", _sharded, "abc"),
    Shape(
        "the authors' layout beside the shards, each with an index", "index",
        _with(_sharded, _mistral), "abc", told="A vLLM with --load-format auto boots from these",
        vllm="xyz",
    ),
    Shape(
        "the authors' layout, when the other is ignored", "index", _with(_sharded, _mistral), "xyz",
        ignore=("model*.safetensors*",),
    ),
    Shape("the authors' layout alone", "index", _mistral, "xyz"),
    Shape(
        "a variant with its index beside the usual one", "index",
        _with(
            _sharded,
            lambda folder: weights(folder / "model.fp16-00001-of-00001.safetensors", "abc"),
            lambda folder: index(
                folder / "model.fp16.safetensors.index.json",
                **dict.fromkeys("abc", "model.fp16-00001-of-00001.safetensors"),
            ),
        ),
        "abc", told="model.fp16-00001-of-00001.safetensors left out",
    ),
    Shape(
        "two indices, none the usual", "index", _two_strange_indices,
        refused="two indices, a.safetensors.index.json and b.*--ignore b.safetensors.index.json",
        vllm="a",
    ),
    Shape(
        "two indices, one ignored", "index", _two_strange_indices, "a", ignore=("b.*",),
    ),
    Shape("an index of another name", "index", _strange_index, "a"),
    Shape(
        "an index of another name, and a file that it does not name", "index",
        _with(_strange_index, lambda folder: weights(folder / "b.safetensors", "b")),
        refused="does not name b.safetensors.*goes by model.safetensors.index.json alone.*--ignore",
        vllm="ab",
    ),
    Shape(
        "an index with a tensor that no shard has", "index", _wrong_index,
        refused="has a tensor 'd'; it does not; mend the index, or .*--lenient", vllm="abc",
    ),
    Shape(
        "the same, leniently", "index", _wrong_index, "abc", lenient=True,
        told="'d'; it does not; what the files hold counts",
    ),
    Shape(
        "an index without a tensor of its shard", "index", _short_index,
        refused="does not name tensor b of model-00001", vllm="abc",
    ),
    Shape(
        "that one, leniently", "index", _short_index, "abc", lenient=True,
        told="does not name tensor b",
    ),
    # More files than count
    Shape(
        "MTP layers that the index does not name", "left out",
        _with(_sharded, lambda folder: weights(folder / "mtp.safetensors", "m")), "abc",
        told="mtp.safetensors left out: model.safetensors.index.json does not name it",
    ),
    Shape(
        "a shard of an earlier, longer save", "left out",
        _with(_sharded, lambda folder: weights(folder / "model-00003-of-00003.safetensors", "d")),
        "abc", told="model-00003-of-00003.safetensors left out",
    ),
    Shape(
        "an adapter beside the model", "left out", _lora, "ab",
        told="adapter_model.safetensors left out: an adapter is no part of the model", vllm="abl",
    ),
    Shape(
        "a variant without an index", "left out", _fp16, vllm="abab",
        refused="tensor a is in model.fp16.safetensors and in .*; keep one of them, or --ignore model.fp16",
    ),
    Shape(
        "a variant that is ignored", "left out", _fp16, "ab", ignore=("*.fp16.*",),
    ),
    Shape(
        "a pattern that fits nothing", "left out", _single, refused="'mpt.*' fits no file",
        ignore=("mpt*",), vllm="ab",
    ),
    Shape(
        "what a Mac leaves, and optimizer states", "left out",
        _with(_single, _file("._model.safetensors"), _file("optimizer.pt"), _file(".DS_Store")),
        "ab",
    ),
    # Links, and what is not there
    Shape("links that lead nowhere, beside the weights", "links", _with(_single, _links), "ab"),
    Shape(
        "links that lead out of the root, beside the weights", "links", _with(_single, _links),
        "ab", root=".",
    ),
    Shape("a Hub cache", "links", _hub_cache, "ab", root=".."),
    Shape(
        "a Hub cache of which only the snapshot is mounted", "links", _hub_cache, root=".",
        vllm="ab",
        refused="config.json: a link leads out of the allowed root|model.safetensors: a link leads",
    ),
    Shape(
        "weights that are a dangling link", "links",
        _with(_single, _dangling("more.safetensors")), vllm="",
        refused="more.safetensors: does not exist on this node.*needs that one mounted",
    ),
    Shape(
        "a tokenizer that is a dangling link", "links", _no_tokenizer,
        refused="tokenizer.json: does not exist.*publish --ignore tokenizer.json", vllm="ab",
    ),
    Shape(
        "a dangling link that is ignored", "links", _no_tokenizer, "ab", ignore=("tokenizer.json",)
    ),
    Shape(
        "a dangling link that the index does not name", "links",
        _with(_sharded, _dangling("mtp.safetensors")), "abc", told="mtp.safetensors left out",
    ),
    # Saves and copies that broke off
    Shape(
        "a shard is missing, and so is the index", "half written",
        lambda folder: weights(folder / A, "ab"),
        refused="shard 2 of 2 of model is not in the folder; copy", vllm="ab",
    ),
    Shape(
        "a shard is missing that the index names", "half written",
        _with(_sharded, lambda folder: (folder / B).unlink()), vllm="",
        refused="names 'model-00002.*', which is not in the folder; copy the missing", lenient=True,
    ),
    Shape("a shard was cut", "half written", _cut, refused="truncated or out of range", vllm=""),
    Shape(
        "an empty file", "half written", _with(_single, _file("b.safetensors", b"")),
        refused="b.safetensors: truncated: 0 bytes", vllm="",
    ),
    Shape(
        "more bytes than tensors", "half written",
        _longer,
        refused="1 bytes after the last tensor", vllm="",
    ),
    Shape(
        "a pointer of Git LFS", "half written", _file(ONE, _POINTER),
        refused="a pointer of Git LFS, not the file; git lfs pull", vllm="",
    ),
    # Other formats
    Shape(
        "vLLM's sharded_state", "format",
        _sharded_state,
        refused="one rank's piece .*sharded_state.*publish the checkpoint that it was made from",
        vllm="abab",
    ),
    Shape(
        "only an adapter", "format",
        lambda folder: weights(folder / "adapter_model.safetensors", "l"), vllm="l",
        refused="only an adapter, .*merge it into its base",
    ),
    Shape("pickles", "format", _file("pytorch_model.bin"), refused="pickles .*runs code", vllm=""),
    Shape("torch's distributed checkpoint", "format", _file("__0_0.distcp"), refused="gather it",
          vllm=""),
    Shape("GGUF", "format", _file("model.gguf"), refused="GGUF", vllm=""),
    Shape("no weights at all", "format", _file("config.json"), refused="no .safetensors file",
          vllm=""),
    # Types and shapes of tensors
    Shape("float8 of AMD", "tensors", _typed("F8_E4M3FNUZ"), "a"),
    Shape("packed float4", "tensors", _typed("F4"), "a"),
    Shape("float4 that torch cannot pack", "tensors", _typed("F4", (8, 3)), vllm="",
          refused="no whole number of bytes"),
    Shape("float6", "tensors", _typed("F6_E2M3"), vllm="",
          refused="F6_E2M3, which neither torch nor vLLM can load; store it packed as U8"),
    Shape("complex numbers", "tensors", _typed("C64"), "a"),
    Shape("twenty dimensions", "tensors", _typed("BF16", (1,) * 20), "a"),
    Shape("a tensor without elements", "tensors", _typed("F32", (0, 4)), "a"),
)  # fmt: skip
