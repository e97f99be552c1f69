"""Group maps and tensor-parallel groups as people write them; group 0 and rank 0 are like any
other.
"""

from __future__ import annotations

import pytest

from hotweights_planner.consumers import (
    check_groups,
    consumers_by_digest,
    contiguous_groups,
    parse_group_map,
    parse_groups,
)
from hotweights_planner.errors import BadGroups
from hotweights_planner.header import TensorEntry
from hotweights_planner.manifest import build


def test_a_group_may_be_named_by_its_number_or_its_name() -> None:
    groups = parse_groups('{"0": [1, 0], "left": [2]}', "groups")
    assert groups == {"0": (0, 1), "left": (2,)}
    found = parse_group_map(b'{"a.*": 0, "b.*": "left", "c.*": [3, 0, 3]}', "map", groups)
    assert found == [("a.*", (0, 1)), ("b.*", (2,)), ("c.*", (0, 3))]


def test_a_chunk_of_several_tensors_goes_wherever_one_of_them_is_needed() -> None:
    names = {"a.x": ["1", "2"], "b.x": ["1", "3"], "c.x": ["3"], "free": ["4", "5"], "a.y": ["4"]}
    entries, offset = [], 0
    for name, contents in names.items():
        entries.append(
            TensorEntry(name, "U8", (4096 * len(contents),), 4096 * len(contents), offset)
        )
        offset += 4096 * len(contents)
    digests = {name: [64 * content for content in contents] for name, contents in names.items()}
    manifest = build("m", "v1", {"a.safetensors": entries}, digests, chunk_nbytes=4096)
    found = consumers_by_digest(manifest, [("a.*", (0,)), ("b.*", (1, 2)), ("?.x", (3,))])
    assert found == {64 * "1": (0, 1, 2), 64 * "2": (0,), 64 * "3": (1, 2, 3)}


def test_groups_of_neighbours() -> None:
    assert contiguous_groups(4, 2) == {"0": (0, 1), "1": (2, 3)}
    with pytest.raises(BadGroups, match="5 ranks cannot be divided into groups of 2"):
        contiguous_groups(5, 2)


def test_what_is_wrong_with_groups_is_named() -> None:
    assert check_groups({"0": (0, 1), "1": (2, 3)}, 4).problems == ()
    report = check_groups({"0": (0, 1), "1": (1, 9)}, 3)
    assert report.problems == (
        "group 1 has ranks [9], and there are only 3",
        "rank 1 is in the groups 0 and 1",
        "in no group: ranks [2]",
    )
    assert check_groups({"0": (0, 1), "1": (2,)}, 3).warnings == (
        "the groups have different sizes: [1, 2]",
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"a": []}', "no list of ranks"),
        ('{"a": [true]}', "no list of ranks"),
        ('{"a": [-1]}', "no list of ranks"),
        ('{"a": [[]]}', "no list of ranks"),
        ('{"a": null}', "no list of ranks"),
        ('{"a": 1}', "there is no tensor-parallel group 1"),
    ],
)
def test_a_map_that_says_nothing_is_refused(text: str, what: str) -> None:
    with pytest.raises(BadGroups, match=what):
        parse_group_map(text, "map", {"0": (0,)})
