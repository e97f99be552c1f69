"""What an API server refuses of an object for its size: the bounds that the models carry, looked up
once for each model.

Models that are made by `model_copy` or `model_construct` are not validated by pydantic, so a list
that has grown too long is found here and not before. Only bounds of numbers, texts and lists are
looked at; types are mypy's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from annotated_types import Ge, Le, MaxLen

from hotweights_crds.base import Model

MAX_INTEGER = 2**63 - 1


@dataclass(frozen=True, slots=True)
class _Bound:
    name: str
    longest: int | None
    least: float | None
    most: float | None


@cache
def _bounds(model: type[Model]) -> tuple[_Bound, ...]:
    found = []
    for name, field in model.model_fields.items():
        longest = next(
            (item.max_length for item in field.metadata if isinstance(item, MaxLen)), None
        )
        least = next((item.ge for item in field.metadata if isinstance(item, Ge)), None)
        most = next((item.le for item in field.metadata if isinstance(item, Le)), None)
        found.append(_Bound(name, longest, least, most))  # type: ignore[arg-type]
    return tuple(found)


def excess(value: Model, path: str = "") -> str:
    """The first field beyond its bound and by how much; empty: it fits."""
    for bound in _bounds(type(value)):
        item: Any = getattr(value, bound.name)
        where = f"{path}.{bound.name}" if path else bound.name
        if bound.longest is not None and item is not None and len(item) > bound.longest:
            return f"{where} has {len(item)}, {bound.longest} are allowed"
        if isinstance(item, int) and not isinstance(item, bool) and _is_outside(item, bound):
            return f"{where} is {item}"
        if isinstance(item, Model):
            nested = [item]
        elif isinstance(item, list):
            nested = [entry for entry in item if isinstance(entry, Model)]
        else:
            continue
        for entry in nested:
            if found := excess(entry, where):
                return found
    return ""


def _is_outside(number: int, bound: _Bound) -> bool:
    if abs(number) > MAX_INTEGER:
        return True
    return (bound.least is not None and number < bound.least) or (
        bound.most is not None and number > bound.most
    )
