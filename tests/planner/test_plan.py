"""Plans: every missing byte once, in order and in bounds; one spelling; and nothing unchecked out
of foreign bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotweights_planner.consumers import GroupMap
from hotweights_planner.errors import BadPlan
from hotweights_planner.header import TensorEntry
from hotweights_planner.manifest import Manifest, build
from hotweights_planner.plan import Plan, parse
from hotweights_planner.plan import build as plan
from hotweights_planner.verification import verify

PAGE = 4096
CHUNK = 4 * PAGE
SOURCE = "file:///models/a%20b/next"

Contents = list[tuple[int, list[int]]]


def make(
    tensors: Contents, version: str = "v1", model: str = "m", dtype: str = "U8", first: int = 0
) -> Manifest:
    """Tensors of whole chunks, named by the numbers given, and a rest whose digest is its size."""
    entries, digests, offset = [], {}, 64
    for index, (rest, contents) in enumerate(tensors, first):
        nbytes = CHUNK * len(contents) + rest
        shape = (nbytes,) if dtype == "U8" else (nbytes // 2,)
        entries.append(
            TensorEntry(f"model.layers.{index // 2}.ä{index}", dtype, shape, nbytes, offset)
        )
        offset += nbytes
        digests[entries[-1].name] = [f"{content:064x}" for content in contents] + (
            [f"f{rest:063x}"] if rest else []
        )
    return build(model, version, {"a b.safetensors": entries}, digests, chunk_nbytes=CHUNK)


def chunks_of(manifest: Manifest) -> set[str]:
    return {chunk.blake3 for chunk in manifest.chunks()}


TENSORS = st.lists(
    st.tuples(st.integers(0, CHUNK - 1), st.lists(st.integers(0, 30), max_size=6)),
    min_size=1,
    max_size=8,
)
BUCKETS = st.sampled_from([PAGE, PAGE + 1, CHUNK - 5, CHUNK, 3 * CHUNK, 1 << 20])
RANKS = st.lists(st.integers(0, 7), min_size=1, max_size=3).map(
    lambda ranks: tuple(sorted(set(ranks)))
)
GROUP_MAPS = st.none() | st.lists(
    st.tuples(st.sampled_from(["*ä0", "*ä1", "*ä?", "model.layers.1.*", "*"]), RANKS), max_size=3
)


@given(TENSORS, st.none() | TENSORS, BUCKETS, GROUP_MAPS)
def test_every_missing_byte_moves_once_to_whoever_needs_it(
    after: Contents, before: Contents | None, bucket_nbytes: int, group_map: GroupMap | None
) -> None:
    following = make(after)
    base = make(before, "v0") if before is not None else None
    made = plan(following, base, SOURCE, bucket_nbytes, group_map)
    assert parse(made.canonical) == made
    assert parse(made.text(verify(made, base).document())).digest == made.digest

    missing = chunks_of(following) - (chunks_of(base) if base else set())
    moved: dict[str, int] = {}
    for bucket in made.buckets:
        assert 0 < bucket.nbytes <= bucket_nbytes
        assert bucket.items[0].offset == 0
        assert all(
            left.offset + left.nbytes == right.offset for left, right in pairwise(bucket.items)
        )
        assert bucket.items[-1].offset + bucket.items[-1].nbytes == bucket.nbytes
        for item in bucket.items:
            assert item.chunk_offset == moved.get(item.chunk.blake3, 0)
            moved[item.chunk.blake3] = item.chunk_offset + item.nbytes
    assert moved == {
        chunk.blake3: chunk.nbytes for chunk in following.chunks() if chunk.blake3 in missing
    }
    whole = [chunk.blake3 for chunks in made.chunks_in_order() for chunk in chunks]
    assert whole == [chunk.blake3 for chunk in following.first_chunks(missing)]
    assert made.total_nbytes == sum(moved.values())
    assert made.unchanged_nbytes == sum(
        c.nbytes for c in following.chunks() if c.blake3 not in missing
    )
    keys = [item.key for bucket in made.buckets for item in bucket.items]
    assert len(set(keys)) == len(keys)
    check_consumers(made, group_map)


def check_consumers(made: Plan, group_map: GroupMap | None) -> None:
    """Every rank that needs a tensor gets each of its chunks."""
    served = {
        item.chunk.blake3: bucket.consumers for bucket in made.buckets for item in bucket.items
    }
    if not group_map:
        assert set(served.values()) <= {None}
        return
    names = {"*ä0": "ä0", "*ä1": "ä1"}
    for tensor in made.manifest.tensors:
        last = tensor.name.rpartition(".")[2]
        matching = [
            ranks
            for pattern, ranks in group_map
            if pattern == "*"
            or names.get(pattern) == last
            or (pattern == "*ä?" and len(last) == 2)
            or (pattern == "model.layers.1.*" and tensor.name.startswith("model.layers.1."))
        ]
        for digest in set(tensor.chunks) & served.keys():
            ranks = served[digest]
            assert ranks is None or (matching and set(matching[0]) <= set(ranks))


def test_the_json_says_what_the_contract_says() -> None:
    following = make([(5, [1, 2]), (0, [3])])
    base = make([(0, [2]), (0, [9]), (7, [])], "v0")
    made = plan(following, base, SOURCE, CHUNK // 2, [("*ä1", (0,))])
    document = json.loads(made.canonical)
    assert document == made.document()
    buckets = document.pop("buckets")
    assert document == {
        "plan_version": "1",
        "model_id": "m",
        "version": "v1",
        "base_version": "v0",
        "manifest_digest": following.digest,
        "base_digest": base.digest,
        "source": SOURCE,
        "bucket_bytes": CHUNK // 2,
        "total_bytes": 2 * CHUNK + 5,
        "unchanged_bytes": CHUNK,
        "removed": ["model.layers.1.ä2"],
        "manifest": json.loads(following.canonical),
    }
    assert [bucket["bucket_id"] for bucket in buckets] == list(range(len(buckets)))
    assert [bucket.get("consumer_ranks") for bucket in buckets] == [None, None, None, [0], [0]]
    assert buckets[1]["items"] == [
        {
            "key": f"model.layers.0.ä0:0+{CHUNK // 2}",
            "tensor": "model.layers.0.ä0",
            "shard_rank": 0,
            "nbytes": CHUNK // 2,
            "hash": f"blake3:{1:064x}",
            "uri": SOURCE + "/a%20b.safetensors",
            "file_offset": 64 + CHUNK // 2,
            "dtype": "U8",
            "shape": [2 * CHUNK + 5],
            "offset": 0,
            "tensor_offset": CHUNK // 2,
            "chunk_offset": CHUNK // 2,
            "chunk_nbytes": CHUNK,
        }
    ]
    (rest,) = buckets[2]["items"]
    assert (rest["key"], rest["tensor_offset"], rest["nbytes"]) == (
        "model.layers.0.ä0:2",
        2 * CHUNK,
        5,
    )
    assert "chunk_offset" not in rest
    assert (
        made.canonical
        == json.dumps(
            json.loads(made.canonical), sort_keys=True, separators=(",", ":"), ensure_ascii=False
        ).encode()
    )


def test_other_spellings_are_the_same_plan() -> None:
    made = plan(make([(5, [1])]), None, SOURCE)
    again = parse(json.dumps(made.document(), indent=2).encode())
    assert again.digest == made.digest
    assert again.canonical == made.canonical


def test_a_plan_without_anything_to_move() -> None:
    base, following = make([(5, [1])], "v0"), make([(5, [1])])
    made = plan(following, base, SOURCE)
    assert (made.buckets, made.total_nbytes, made.unchanged_nbytes) == ((), 0, CHUNK + 5)
    assert parse(made.canonical) == made


def test_another_model_is_refused_unless_it_was_renamed() -> None:
    base, following = make([(5, [1])], "v0", model="other"), make([(5, [1])])
    with pytest.raises(BadPlan, match=r"of another model, other \(v0\)"):
        plan(following, base, SOURCE)
    made = plan(following, base, SOURCE, renamed=True)
    assert "is named other" in verify(made, base).warnings[0]["warning"]


@pytest.mark.parametrize(
    ("source", "bucket_nbytes", "text"),
    [
        ("/models/a", 1 << 20, "is no URI"),
        ("file:///a b", 1 << 20, "not percent-encoded"),
        ("file:///ä", 1 << 20, "not percent-encoded"),
        ("file:///" + 5000 * "a", 1 << 20, "not percent-encoded"),
        (SOURCE, 0, "a bucket has"),
        (SOURCE, 1 << 41, "a bucket has"),
    ],
)
def test_what_nobody_could_use_is_not_made(source: str, bucket_nbytes: int, text: str) -> None:
    with pytest.raises(BadPlan, match=text):
        plan(make([(5, [1])]), None, source, bucket_nbytes)


def test_what_changed_without_moving_is_told() -> None:
    base = make([(0, [1]), (0, [2])], "v0")
    following = make([(0, [1])], dtype="BF16")
    made = plan(following, base, SOURCE)
    report = verify(made, base)
    assert not report.problems
    assert [warning["warning"] for warning in report.warnings] == [
        "1 tensors of v0 are gone: model.layers.0.ä1",
        f"tensor model.layers.0.ä0 was U8 [{CHUNK}] and is BF16 [{CHUNK // 2}] with the same bytes",
    ]


def test_a_plan_is_held_against_ranks_and_base() -> None:
    following = make([(0, [1]), (0, [2]), (0, [3])])
    made = plan(following, None, SOURCE, group_map=[("*ä0", (0,)), ("*ä1", (0, 1))])
    assert not verify(made).problems
    errors = [problem["error"] for problem in verify(made, world_size=1).problems]
    assert errors == ["names ranks 1, and there are only 1"]
    assert [p["bucket_id"] for p in verify(made, require_consumers=True).problems] == [2]
    groups = {"0": (0, 1), "1": (2, 3)}
    problems = verify(made, groups=groups, enforce_tp_superset=True).problems
    assert [(problem["bucket_id"], problem["error"]) for problem in problems] == [
        (0, "goes to ranks 0 of group 0 and not to all")
    ]
    assert "starts from nothing" in verify(made, base=make([(0, [1])], "v0")).problems[0]["error"]


def test_a_plan_that_leaves_out_what_the_base_lacks_is_found_out() -> None:
    base, following = make([(0, [1])], "v0"), make([(0, [1, 2])])
    document = plan(following, base, SOURCE).document()
    document |= {"buckets": [], "total_bytes": 0, "unchanged_bytes": 2 * CHUNK}
    problems = verify(parse(json.dumps(document).encode()), base).problems
    assert problems == ({"error": "1 chunks that the base lacks are in no bucket"},)
    nothing = make([(0, [7])], "v0")
    document = plan(following, nothing, SOURCE).document() | {"base_digest": base.digest}
    problems = verify(parse(json.dumps(document).encode()), base).problems
    assert problems == ({"error": "1 chunks of its buckets are in the base already"},)


def good() -> dict[str, Any]:
    base = make([(0, [9]), (0, [9]), (0, [9])], "v0")
    made = plan(make([(5, [1, 2, 3]), (0, [4])]), base, SOURCE, 2 * CHUNK, [("*ä1", (0, 1))])
    return made.document()


def item(document: dict[str, Any], bucket: int = 0, index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = document["buckets"][bucket]["items"][index]
    return found


BREAK: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("plan_version is '2'", lambda d: d.update(plan_version="2")),
    ("lacks source", lambda d: d.pop("source")),
    ("unknown field 'more'", lambda d: d.update(more=1)),
    ("digest is sha256:.* expected", lambda d: d.update(manifest_digest="sha256:" + 64 * "0")),
    ("digest is sha256:.* expected", lambda d: d["manifest"].update(version="v2")),
    ("manifest", lambda d: d.update(manifest=[])),
    ("model_id is 'x'", lambda d: d.update(model_id="x")),
    ("version is 'x'", lambda d: d.update(version="x")),
    ("belong together", lambda d: d.update(base_version=None)),
    ("base_digest no digest", lambda d: d.update(base_digest="md5:1")),
    ("base_version is no version", lambda d: d.update(base_version="a b")),
    ("removed is not a list", lambda d: d.update(removed="x")),
    ("removed names a tensor twice", lambda d: d.update(removed=["x", "x"])),
    ("or one that its manifest has", lambda d: d.update(removed=["model.layers.0.ä0"])),
    ("looks like a path", lambda d: d.update(removed=["../x"])),
    ("has no base, and removes", lambda d: d.update(base_version=None, base_digest=None)),
    ("a bucket has", lambda d: d.update(bucket_bytes=1)),
    ("a bucket has", lambda d: d.update(bucket_bytes=float(2 * CHUNK))),
    ("items, and its chunks", lambda d: d.update(bucket_bytes=PAGE)),
    ("total_bytes is 1", lambda d: d.update(total_bytes=1)),
    ("unchanged_bytes is 1", lambda d: d.update(unchanged_bytes=1)),
    ("buckets is not a list", lambda d: d.update(buckets={})),
    ("no list of items", lambda d: d.update(buckets=[{}])),
    ("without a hash", lambda d: item(d).pop("hash")),
    ("without a hash", lambda d: item(d).update(hash=7)),
    ("not in its manifest", lambda d: item(d).update(hash="blake3:" + 64 * "e")),
    ("items, and its chunks", lambda d: d["buckets"][0]["items"].append(item(d))),
    ("consumer_ranks of bucket 2", lambda d: d["buckets"][2].update(consumer_ranks=[1, 0])),
    ("consumer_ranks of bucket 2", lambda d: d["buckets"][2].update(consumer_ranks=[])),
    ("buckets\\[0\\].items\\[0\\].offset is 1", lambda d: item(d).update(offset=1)),
    ("buckets\\[0\\].items\\[1\\].file_offset is 0", lambda d: item(d, 0, 1).update(file_offset=0)),
    ("buckets\\[0\\].items\\[0\\].nbytes", lambda d: item(d).update(nbytes=-1)),
    ("uri is 'file:///etc/passwd'", lambda d: item(d).update(uri="file:///etc/passwd")),
    ("key is", lambda d: item(d).update(key=item(d, 0, 1)["key"])),
    ("'chunk_offset' should not be there", lambda d: item(d).update(chunk_offset=0)),
    ("'dtype' is missing", lambda d: item(d).pop("dtype")),
    ("size is 7", lambda d: d["buckets"][1].update(size=7)),
    ("bucket_id is 2", lambda d: d["buckets"].reverse()),
    ("not percent-encoded", lambda d: d.update(source="file:///a b")),
    ("not an object", lambda d: d.update(verification=[])),
    (
        "not the plan that its verification speaks of",
        lambda d: d.update(verification={"digest": "sha256:0"}),
    ),
]


@pytest.mark.parametrize(("text", "spoil"), BREAK, ids=[text for text, _ in BREAK])
def test_whatever_is_wrong_is_named(text: str, spoil: Callable[[dict[str, Any]], object]) -> None:
    document = good()
    assert parse(json.dumps(document).encode())
    spoil(document)
    with pytest.raises(BadPlan, match=text) as refused:
        parse(json.dumps(document).encode(), "p.json")
    assert str(refused.value).startswith("p.json")
    assert "\n" not in str(refused.value)


def test_from_nothing_means_everything() -> None:
    document = good() | {"base_version": None, "base_digest": None, "removed": []}
    document["buckets"] = [document["buckets"][2] | {"bucket_id": 0}]
    with pytest.raises(BadPlan, match="it has no base"):
        parse(json.dumps(document).encode())


LEAVES: st.SearchStrategy[Any] = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        1.0,
        10**30,
        "",
        "x",
        "\ud800",
        "sha256:" + 64 * "0",
        [],
        {},
        [[]],
        {"digest": 1},
        [0, 1],
    ]
)


@given(st.data())
def test_a_changed_field_is_refused_or_changes_nothing(data: st.DataObject) -> None:
    document = good()
    digest = parse(json.dumps(document).encode()).digest
    at: Any = document
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(at[key], (dict, list)) and at[key] and data.draw(st.booleans()):
            at = at[key]
            continue
        if data.draw(st.booleans()):
            del at[key]
        else:
            at[key] = data.draw(LEAVES)
        break
    try:
        found = parse(json.dumps(document).encode())
    except BadPlan:
        return
    if found.digest != digest:  # another, equally good plan: from elsewhere, to other ranks
        assert key in {"source", "base_digest", "base_version", "removed", "consumer_ranks", 0, 1}
    assert parse(found.canonical) == found


@given(st.data())
def test_bytes_that_were_damaged_are_refused_in_words(data: st.DataObject) -> None:
    text = bytearray(plan(make([(5, [1, 2])]), None, SOURCE).canonical)
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    text = text[: data.draw(st.just(len(text)) | st.integers(0, len(text)))]
    try:
        found = parse(bytes(text))
    except BadPlan:
        return
    assert parse(found.canonical) == found


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"\xff",
        b"{",
        b'{"plan_version":"1"',
        100_000 * b"[",
        b"1" * 5000,
        b'{"plan_version":1e999}',
        b"NaN",
    ],
)
def test_garbage_is_refused_in_words(text: bytes) -> None:
    with pytest.raises(BadPlan):
        parse(text)


def test_a_manifest_that_is_nested_without_end_is_refused() -> None:
    text = json.dumps(good() | {"manifest": "X"}).replace('"X"', 900 * "[" + 900 * "]").encode()
    with pytest.raises(BadPlan):
        parse(text)
