"""What a version's tensors are called in this model: as they are, by a dictionary, or by a function
of the plan.

The function is given the plan as an object in which every tensor of the version has at least one
item, also those that the plan does not move: what it leaves out keeps its name. Keys of the map are
tensors' names or items' keys (``<tensor>:<number>``). Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hotweights.adapters.inprocess.errors import NotApplied
from hotweights_common.reasons import Reason

NameMap = Mapping[str, str] | Callable[[dict[str, Any]], Mapping[str, str]] | None


def renamed(
    name_map: NameMap, plan: Callable[[], Mapping[str, Any]], tensors: Iterable[Mapping[str, Any]]
) -> dict[str, str]:
    """The name in the model, by the name in the version. Raises `NotApplied` where two tensors
    would become one.

    ``plan`` makes the plan's object, if anybody wants it.
    """
    listed = list(tensors)
    names = [str(tensor["name"]) for tensor in listed]
    if name_map is None:
        return {name: name for name in names}
    given = name_map(_whole(plan(), listed)) if callable(name_map) else name_map
    by_tensor = _by_tensor(given, set(names))
    result = {name: by_tensor.get(name, name) for name in names}
    _check_single(result)
    return result


def _whole(plan: Mapping[str, Any], tensors: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The plan, with an item for every tensor that it does not move."""
    moved = {item["tensor"] for bucket in plan.get("buckets", ()) for item in bucket["items"]}
    rest = [
        {
            "key": f"{tensor['name']}:0", "tensor": tensor["name"], "shard_rank": 0, "nbytes": 0,
            "dtype": tensor["dtype"], "shape": list(tensor["shape"]),
        }
        for tensor in tensors
        if tensor["name"] not in moved
    ]  # fmt: skip
    buckets = list(plan.get("buckets", ()))
    if rest:
        buckets.append({"bucket_id": len(buckets), "size": 0, "items": rest})
    return {**plan, "buckets": buckets}


def _by_tensor(given: Mapping[str, str], names: set[str]) -> dict[str, str]:
    if not isinstance(given, Mapping):
        raise NotApplied(
            Reason.BAD_NAME_MAP,
            f"the name map is a {type(given).__name__}; give a dict, or a function that returns "
            "one",
        )
    found: dict[str, str] = {}
    for key, name in given.items():
        tensor = key if key in names else key.rpartition(":")[0]
        if not isinstance(name, str) or not name:
            raise NotApplied(
                Reason.BAD_NAME_MAP, f"the name map gives {key} the name {name!r}; a name is a text"
            )
        if tensor in names and found.setdefault(tensor, name) != name:
            raise NotApplied(
                Reason.BAD_NAME_MAP,
                f"the name map gives {tensor} two names: {found[tensor]} and {name}",
            )
    return found


def _check_single(result: Mapping[str, str]) -> None:
    origin: dict[str, str] = {}
    for name, target in result.items():
        if origin.setdefault(target, name) != name:
            raise NotApplied(
                Reason.BAD_NAME_MAP,
                f"{origin[target]} and {name} are both called {target} by the name map",
            )
