"""From pydantic's JSON schema to the structural schema that an API server takes.

The API server refuses references, nullable unions and much else that pydantic emits, and what it
does not refuse it may silently prune. So this translates the little that our models use and raises
`NotStructural` at everything else, at generation time, instead of leaving the surprise to ``kubectl
apply``. It is ``dict -> dict``; it knows nothing of our models.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, WithJsonSchema

IntOrPercent = Annotated[
    int | str, WithJsonSchema({"x-kubernetes-int-or-string": True, "maxLength": 8})
]
"""A count or a percentage, as in Deployments."""

# the words of pydantic that mean the same in a structural schema
_KEPT = {
    "type", "description", "enum", "default", "minimum", "maximum", "minLength", "maxLength", "pattern", "minItems",
    "maxItems", "maxProperties", "items", "properties", "required", "additionalProperties", "nullable",
}  # fmt: skip
_DROPPED = {"title"}  # pydantic makes one of every name: it says nothing more


class NotStructural(Exception):
    """A model uses something that a custom resource cannot express."""


def cel(rule: str, message: str) -> dict[str, Any]:
    """A validation rule for `Field(json_schema_extra=…)`; the message says what to write
    instead.
    """
    return {"x-kubernetes-validations": [{"rule": rule, "message": message}]}


def list_map(*keys: str) -> dict[str, Any]:
    """Marks a list whose items are merged by these keys under server-side apply."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


def atomic() -> dict[str, Any]:
    """Marks a list that is replaced as a whole under server-side apply."""
    return {"x-kubernetes-list-type": "atomic"}


def structural(model: type[BaseModel]) -> dict[str, Any]:
    """The structural schema of a model. Raises `NotStructural` naming the path that does not
    fit.
    """
    schema = model.model_json_schema(by_alias=True, mode="validation")
    return _convert(schema, schema.get("$defs", {}), model.__name__)


def _convert(node: dict[str, Any], definitions: dict[str, Any], path: str) -> dict[str, Any]:
    node = _resolve(node, definitions, path)
    out: dict[str, Any] = {}
    for key, value in node.items():
        if key.startswith("x-kubernetes-") or key in _KEPT:
            out[key] = value
        elif key == "const":
            out["enum"] = [value]
        elif key not in _DROPPED and key != "$defs":
            raise NotStructural(f"{path}: {key!r} has no place in a structural schema")
    if "properties" in out:
        out["properties"] = {
            k: _convert(v, definitions, f"{path}.{k}") for k, v in out["properties"].items()
        }
    if isinstance(out.get("items"), dict):
        out["items"] = _convert(out["items"], definitions, f"{path}[]")
    if isinstance(out.get("additionalProperties"), dict):
        out["additionalProperties"] = _convert(
            out["additionalProperties"], definitions, f"{path}{{}}"
        )
    if out.get("type") == "integer":
        out["format"] = "int64"
    # None stands for an absent member here, and null is not among the values that it takes
    if out.get("default") is None:
        out.pop("default", None)
    if "description" in out:  # a docstring's lines end where the source's do
        out["description"] = " ".join(out["description"].split())
    return out


def _resolve(node: dict[str, Any], definitions: dict[str, Any], path: str) -> dict[str, Any]:
    """The node with its reference and its "or null" taken out; what stands beside them wins."""
    if "anyOf" in node:
        rest = [option for option in node["anyOf"] if option.get("type") != "null"]
        # "or null" is no union: an optional member is left out where it is None
        if len(rest) != 1:
            raise NotStructural(
                f"{path}: a union of {len(rest)} types; use optional members and a CEL rule"
            )
        beside = {k: v for k, v in node.items() if k != "anyOf"}
        return {**_resolve(rest[0], definitions, path), **beside}
    if "$ref" in node:
        target = definitions[node["$ref"].rsplit("/", 1)[1]]
        beside = {k: v for k, v in node.items() if k != "$ref"}
        return {**_resolve(target, definitions, path), **beside}
    return node
