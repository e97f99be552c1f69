"""Conditions as Kubernetes means them.

A condition's ``lastTransitionTime`` changes only with its status, a reason is one CamelCase word,
and every condition says which generation it speaks of, so that ``kubectl wait`` and kstatus never
take yesterday's answer for today's. `upsert` keeps those rules in one place; it is pure, the time
comes from the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from hotweights_crds.base import Model

ConditionStatus = Literal["True", "False", "Unknown"]
MAX_MESSAGE = 1024  # meta/v1 allows 32 KiB, but a status has several conditions


class Condition(Model):
    """One observation about the object, as in meta/v1."""

    type: str = Field(description="What is observed, in CamelCase.", max_length=64)
    status: ConditionStatus = Field(description="True, False or Unknown.")
    observed_generation: int = Field(
        default=0, description="The generation that this was observed at.", ge=0
    )
    last_transition_time: str = Field(
        description="When the status last changed (RFC 3339).", max_length=32
    )
    reason: str = Field(description="One CamelCase word for programs.", max_length=64)
    message: str = Field(default="", description="A sentence for people.", max_length=MAX_MESSAGE)


def upsert(conditions: Sequence[Condition], new: Condition) -> list[Condition]:
    """The list with ``new`` in place of its type; an unchanged status keeps its transition time, as
    with SetStatusCondition of apimachinery. The message is cut to `MAX_MESSAGE` characters.
    """
    clipped = new.model_copy(update={"message": new.message[:MAX_MESSAGE]})
    old = find(conditions, new.type)
    if old is None:
        return [*conditions, clipped]
    if old.status == new.status:
        clipped = clipped.model_copy(update={"last_transition_time": old.last_transition_time})
    return [clipped if c.type == new.type else c for c in conditions]


def find(conditions: Sequence[Condition], type_: str) -> Condition | None:
    """The condition of that type, if there is one."""
    return next((c for c in conditions if c.type == type_), None)


def is_true(conditions: Sequence[Condition], type_: str) -> bool:
    """Whether the condition exists and is True."""
    found = find(conditions, type_)
    return found is not None and found.status == "True"
