"""How a WeightRollout moves its pods: how many at once, in which steps, and what happens when some
do not follow.

A kind of canary step is one entry of `STEP_KINDS` and one field of `CanaryStep`; what a step means
is the operator's (``decide/strategy/canary.py``).
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from hotweights_crds.analysis import AnalysisStep
from hotweights_crds.base import Model
from hotweights_crds.structural import IntOrPercent, atomic, cel

MAX_STEPS = 50
MAX_WINDOW = 3


class Rolling(Model):
    """Settings of the strategy Rolling."""

    max_unavailable: IntOrPercent = Field(
        default=1,
        description="How many of the selected pods may be unavailable at once, as a number or a "
        "percentage (rounded down, at least 1).",
        json_schema_extra=cel(
            "type(self) == int ? self > 0 : self.matches('^([1-9][0-9]?|100)%$')",
            "write a number of at least 1 or a percentage from 1% to 100%",
        ),
    )


class Pause(Model):
    """A step that waits."""

    duration_seconds: int | None = Field(
        default=None,
        description="How long to wait; without it: until somebody promotes.",
        ge=1,
        le=2592000,
    )


# the only place that lists what a step may be; each is a field of `CanaryStep`
STEP_KINDS = ("setReplicas", "pause", "analysis")


class CanaryStep(Model):
    """One step: exactly one of its fields is set."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            f"[{', '.join(f'has(self.{kind})' for kind in STEP_KINDS)}]"
            ".filter(present, present).size() == 1",
            f"a step is exactly one of {', '.join(STEP_KINDS)}",
        )
    )

    set_replicas: IntOrPercent | None = Field(
        default=None,
        description="How many of the selected pods may serve the new version from here on, as a "
        "number or a percentage (rounded up). The step ends when so many do and are Ready.",
        json_schema_extra=cel(
            "type(self) == int ? self >= 0 : self.matches('^(100|[1-9]?[0-9])%$')",
            "write a number of at least 0 or a percentage from 0% to 100%",
        ),
    )
    pause: Pause | None = Field(
        default=None,
        description="Waits for durationSeconds, or with {} until somebody promotes. Pods that go "
        "are replaced meanwhile.",
    )
    analysis: AnalysisStep | None = Field(
        default=None,
        description="Measures, and ends when all metrics are Successful. A failure does what "
        "failurePolicy.action says; what is inconclusive waits until somebody promotes.",
    )


class Canary(Model):
    """Steps in which a version goes to more and more pods."""

    steps: list[CanaryStep] = Field(
        description="In this order. After the last one all pods change. A way back, to what was "
        "complete before, takes no steps.",
        min_length=1,
        max_length=MAX_STEPS,
        json_schema_extra=atomic(),
    )


class Strategy(Model):
    """In which order pods change version."""

    type: Literal["Rolling", "AllAtOnce"] = Field(
        default="Rolling",
        description="Rolling: within a budget of unavailable pods. AllAtOnce: as soon as every pod "
        "is prepared. With a canary: the pods that its step allows.",
    )
    rolling: Rolling | None = Field(default=None, description="Only with type Rolling.")
    canary: Canary | None = Field(
        default=None, description="How many pods may change before somebody looks; none: all."
    )


class FailurePolicy(Model):
    """What happens when pods or nodes fail to follow."""

    max_failed: int = Field(
        default=0, description="How many pods may fail before the action is taken.", ge=0, le=100000
    )
    action: Literal["Pause", "Abort", "Rollback"] = Field(
        default="Pause",
        description="Pause: no further pod is activated until the version or the policy changes, or a "
        "retry is asked for. Abort: the revision is given up; every pod keeps what it serves. "
        "Rollback: all pods go back to what was complete last, also when the progress deadline "
        "passes; with nothing to go back to it is a Pause.",
    )


class RollbackWindow(Model):
    """How far one can go back without the network."""

    versions: int = Field(
        default=1,
        description="How many versions that were complete before stay staged on every node. Each "
        "costs its whole size; what was complete last stays for as long as the next one is not.",
        ge=0,
        le=MAX_WINDOW,
    )
