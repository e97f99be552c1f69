"""What the API server would refuse, or silently prune, is found at generation."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from hotweights_crds.__main__ import generated
from hotweights_crds.base import Model
from hotweights_crds.structural import NotStructural, structural
from hotweights_crds.v1alpha1 import KINDS, Kind, definition

ROOT = Path(__file__).parents[2]


def fields(node: dict[str, Any], path: str) -> list[tuple[str, dict[str, Any]]]:
    """Every schema node under ``node`` with its path."""
    found = [(path, node)]
    for name, child in node.get("properties", {}).items():
        found += fields(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            found += fields(node[key], f"{path}[]")
    return found


def schema(kind: Kind) -> dict[str, Any]:
    properties = definition(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    return {
        "type": "object",
        "properties": {"spec": properties["spec"], "status": properties["status"]},
    }


def test_generated_files_are_current() -> None:
    stale = [str(path) for path, text in generated(ROOT).items() if path.read_text() != text]
    assert not stale, f"run `make generate`: {stale}"


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_every_field_is_explained(kind: Kind) -> None:
    bare = [
        p
        for p, n in fields(schema(kind), kind.kind)[1:]
        if p[-2:] != "[]" and not n.get("description")
    ]
    assert not bare


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_strings_and_lists_are_bounded_in_specs(kind: Kind) -> None:
    """Without bounds the API server refuses CEL rules for their estimated cost, and an object can
    grow past etcd's limit.
    """
    spec = schema(kind)["properties"]["spec"]
    unbounded = [
        p
        for p, n in fields(spec, "spec")
        if (n.get("type") == "string" and not {"maxLength", "enum"} & n.keys())
        or (n.get("type") == "array" and "maxItems" not in n)
    ]
    assert not unbounded


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_specs_hold_no_floats_and_nothing_is_nullable(kind: Kind) -> None:
    assert not [
        p
        for p, n in fields(schema(kind)["properties"]["spec"], "spec")
        if n.get("type") == "number"
    ]
    assert not [p for p, n in fields(schema(kind), kind.kind) if n.get("nullable")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_status_is_optional_and_starts_unobserved(kind: Kind) -> None:
    """kstatus takes an object without a status for finished; -1 says that nobody has looked yet."""
    status = schema(kind)["properties"]["status"]
    assert status["default"] == {"observedGeneration": -1}
    assert "required" not in status


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_columns_point_at_fields(kind: Kind) -> None:
    known = {p.removeprefix(kind.kind) for p, _ in fields(schema(kind), kind.kind)}
    for name, _, path, _ in kind.columns:
        if "[?" not in path and not path.startswith(".metadata"):
            assert path in known, f"column {name} points at {path}"


def test_a_union_is_refused() -> None:
    class Bad(Model):
        value: int | str = Field(description="Either.")

    with pytest.raises(NotStructural, match=r"Bad\.value"):
        structural(Bad)
