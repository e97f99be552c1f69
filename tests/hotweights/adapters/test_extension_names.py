"""What a version's tensors are called in a model: as they are, by a table, by a function; never two
by one name.
"""

from __future__ import annotations

from typing import Any

import pytest

from hotweights.adapters.inprocess.errors import NotApplied
from hotweights.adapters.inprocess.names import NameMap, renamed

TENSORS = [{"name": name, "dtype": "F32", "shape": (2,)} for name in ("a/w", "a/b", "c")]
PLAN: dict[str, Any] = {
    "buckets": [
        {
            "bucket_id": 0,
            "items": [{"key": "a/w:0", "tensor": "a/w"}, {"key": "a/w:1+4", "tensor": "a/w"}],
        }
    ]
}


def names(name_map: NameMap) -> list[str]:
    return list(renamed(name_map, lambda: PLAN, TENSORS).values())


def slashes(plan: dict[str, Any]) -> dict[str, str]:
    return {it["key"]: it["tensor"].replace("/", ".") for b in plan["buckets"] for it in b["items"]}


def test_without_a_map_names_stay() -> None:
    assert names(None) == ["a/w", "a/b", "c"]


def test_a_function_sees_every_tensor_also_those_that_do_not_move() -> None:
    assert names(slashes) == ["a.w", "a.b", "c"]
    assert PLAN["buckets"][0]["items"][0]["key"] == "a/w:0"
    assert len(PLAN["buckets"]) == 1


def test_keys_are_tensors_or_items_and_what_is_left_out_keeps_its_name() -> None:
    assert names({"a/w": "x"}) == ["x", "a/b", "c"]
    assert names({"a/w:0": "x", "a/w:1+4": "x", "unknown:0": "y"}) == ["x", "a/b", "c"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"a/w": "c"}, "a/w and c are both called c"),
        ({"a/w": "x", "a/b": "x"}, "both called x"),
        ({"a/w:0": "x", "a/w:1+4": "y"}, "gives a/w two names"),
        ({"a/w": ""}, "a name is a text"),
        ({"a/w": 3}, "a name is a text"),
        (lambda plan: None, "give a dict"),
    ],
)
def test_a_map_that_cannot_be_meant_is_refused(given: Any, text: str) -> None:
    with pytest.raises(NotApplied, match=text) as caught:
        names(given)
    assert caught.value.reason == "BadNameMap"
