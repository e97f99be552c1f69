"""What can be said about a plan beyond that it is one: whether its consumers and its base fit where
it is to be used.

A problem means that somebody would not get what they need; a warning is for a person to decide.
Whether the plan itself is consistent is not asked here: no other can be made or parsed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hotweights_planner.consumers import Groups
from hotweights_planner.manifest import Manifest
from hotweights_planner.plan import Plan

MOST_NAMED = 5  # an error is a line to read; how many more there are stands behind


@dataclass(frozen=True, slots=True)
class Report:
    """``problems`` and ``warnings`` are objects with an ``error`` or a ``warning`` for people;
    ``digest`` is the plan's, and the numbers count what they are named for.
    """

    digest: str
    buckets: int
    items: int
    missing_consumer_ranks: int
    buckets_with_out_of_range: int
    problems: tuple[dict[str, Any], ...]
    warnings: tuple[dict[str, Any], ...]

    def document(self) -> dict[str, Any]:
        """As it stands in a plan under ``verification``."""
        return asdict(self)


def verify(
    plan: Plan,
    base: Manifest | None = None,
    world_size: int | None = None,
    groups: Groups | None = None,
    require_consumers: bool = False,
    enforce_tp_superset: bool = False,
) -> Report:
    """Hold ``plan`` against what is known of the place where it is to be used; what is None is not
    looked at. Raises nothing: what is wrong stands in the report.
    """
    problems: list[dict[str, Any]] = []
    missing = outside_count = 0
    for bucket in plan.buckets:
        if bucket.consumers is None:
            missing += 1
            if require_consumers:
                problems.append({"bucket_id": bucket.bucket_id, "error": "has no consumer_ranks"})
            continue
        outside = [
            rank for rank in bucket.consumers if world_size is not None and rank >= world_size
        ]
        if outside:
            outside_count += 1
            text = f"names ranks {_few(outside)}, and there are only {world_size}"
            problems.append({"bucket_id": bucket.bucket_id, "error": text})
        if enforce_tp_superset:
            problems += [
                {
                    "bucket_id": bucket.bucket_id,
                    "error": f"goes to ranks {_few(part)} of group {name} and not to all",
                }
                for name, ranks in (groups or {}).items()
                if (part := sorted(set(ranks) & set(bucket.consumers))) and part != list(ranks)
            ]
    if base is not None:
        problems += _base_problems(plan, base)
    return Report(
        plan.digest,
        len(plan.buckets),
        plan.item_count,
        missing,
        outside_count,
        tuple(problems),
        _warnings(plan, base),
    )


def _base_problems(plan: Plan, base: Manifest) -> list[dict[str, Any]]:
    if plan.base_digest != base.digest:  # what follows would only repeat it, chunk by chunk
        text = (
            f"it starts from {plan.base_digest or 'nothing'}, and the previous manifest is "
            f"{base.digest}"
        )
        return [{"error": text}]
    present = {digest for tensor in base.tensors for digest in tensor.chunks}
    moved: set[str] = set().union(*(bucket.digests for bucket in plan.buckets))
    needed = {digest for tensor in plan.manifest.tensors for digest in tensor.chunks} - present
    problems: list[dict[str, Any]] = []
    if needed - moved:
        problems.append(
            {"error": f"{len(needed - moved)} chunks that the base lacks are in no bucket"}
        )
    if moved - needed:
        problems.append(
            {"error": f"{len(moved - needed)} chunks of its buckets are in the base already"}
        )
    return problems


def _warnings(plan: Plan, base: Manifest | None) -> tuple[dict[str, Any], ...]:
    warnings: list[dict[str, Any]] = []
    if plan.removed:
        text = f"{len(plan.removed)} tensors of {plan.base_version} are gone: {_few(plan.removed)}"
        warnings.append({"warning": text, "tensors": list(plan.removed)})
    if base is None:
        return tuple(warnings)
    before = {tensor.name: tensor for tensor in base.tensors}
    for tensor in plan.manifest.tensors:
        was = before.get(tensor.name)
        if was is not None and (was.dtype, was.shape) != (tensor.dtype, tensor.shape):
            same = " with the same bytes" if was.chunks == tensor.chunks else ""
            text = (
                f"tensor {tensor.name} was {was.dtype} {list(was.shape)} and is {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
            warnings.append({"warning": text + same, "tensors": [tensor.name]})
    if base.model != plan.model_id:
        text = f"the previous version is named {base.model} and this {plan.model_id}"
        warnings.append(
            {"warning": f"{text}; give `publish --model` one name for all versions of a model"}
        )
    return tuple(warnings)


def _few(names: list[int] | tuple[str, ...]) -> str:
    text = ", ".join(map(str, names[:MOST_NAMED]))
    return f"{text} and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else text
