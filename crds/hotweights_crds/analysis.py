"""What is measured of a canary and what counts as good: WeightAnalysisTemplate, the same written
inline in a step, and what a WeightRollout remembers of it.

A condition is a few comparisons of ``result`` with literals, so little that one regular expression
is its whole grammar: the API server refuses what the operator could not read. A kind of measurement
is one entry of `PROVIDERS` and one field of `Metric`; how it is measured is the operator's
(``runtime/measure``).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from hotweights_crds.base import Model
from hotweights_crds.structural import atomic, cel, list_map

MAX_METRICS = 10
MAX_MEASUREMENTS = 5
"""Of each metric, the newest: what the status keeps."""
MAX_ARGS = 20

NAME_PATTERN = "^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$"

_NUMBER = r"-?[0-9]+([.][0-9]+)?([eE][-+]?[0-9]+)?"
_ARGUMENT = r"\{\{ ?args[.][a-z0-9][-a-z0-9]* ?\}\}"
_COMPARISON = (
    rf'result *((<=|>=|==|!=|<|>) *({_NUMBER}|{_ARGUMENT})|(==|!=) *(true|false|"[^"\\]*"))'
)
CONDITION_PATTERN = rf"^ *{_COMPARISON} *((&&|\|\|) *{_COMPARISON} *)*$"
"""A condition as it is written, arguments included; for RE2 and for Python."""

PATH_PATTERN = r"^[A-Za-z0-9_-]+([.][A-Za-z0-9_-]+)*$"
"""Names and list indices with dots between them: ``data.items.0.p99``."""

Arguments = Annotated[
    dict[str, str],
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MAX_ARGS,
            "additionalProperties": {"type": "string", "maxLength": 1024},
        }
    ),
]
JobSpec = Annotated[
    dict[str, Any],
    WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True}),
]


def _condition(what: str) -> Any:
    return Field(
        default=None,
        description=f'{what}, as comparisons of `result` with a number, a "text", true or false, '
        "joined by && and ||, of which && binds tighter: `result >= 0.99 && result <= 1.2`.",
        min_length=1,
        max_length=256,
        json_schema_extra=cel(
            f"self.matches(r'{CONDITION_PATTERN}')",
            "compare result with numbers, texts in double quotes, true or false, and join "
            "comparisons by && and ||, without parentheses: result < 0.05",
        ),
    )


def _url(what: str, most: int) -> Any:
    return Field(
        description=what,
        min_length=1,
        max_length=most,
        json_schema_extra=cel(
            "self.startsWith('http://') || self.startsWith('https://')",
            "write http:// or https:// and a host",
        ),
    )


def _timeout() -> Any:
    return Field(default=10, description="How long one measurement may take.", ge=1, le=60)


class PrometheusQuery(Model):
    """An instant query that gives one number."""

    address: str = _url("Base URL of the Prometheus, or of what answers as one.", 1024)
    query: str = Field(
        description="PromQL that gives a scalar, or a vector of one element at most.",
        min_length=1,
        max_length=4096,
    )
    timeout_seconds: int = _timeout()


class HttpGet(Model):
    """A GET request that gives JSON."""

    url: str = _url("What is asked for; redirects are not followed.", 2048)
    json_path: str | None = Field(
        default=None,
        description="Where the result stands: names and list indices with dots between them, as "
        "`data.items.0.p99`; without it the whole answer is the result.",
        max_length=256,
        json_schema_extra=cel(
            f"self.matches('{PATH_PATTERN}')",
            "write names and list indices with dots between them, as data.items.0.p99",
        ),
    )
    timeout_seconds: int = _timeout()


class JobRun(Model):
    """A Job whose end is the result: Complete is a success, Failed a failure."""

    spec: JobSpec = Field(
        description="The spec of a batch/v1 Job of the rollout's namespace, which the rollout owns."
    )
    timeout_seconds: int = Field(
        default=3600,
        description="The Job's activeDeadlineSeconds at most. A Job that is not over by then is an "
        "error.",
        ge=10,
        le=86400,
    )


class GoldenProbe(Model):
    """What the engines' probes have shown already: of the pods that could compare the version's
    golden tokens with what they answered, the share in which they were the same.
    """


# the only place that lists what measures; each is a field of `Metric`
PROVIDERS = ("prometheus", "http", "job", "goldenProbe")


class Metric(Model):
    """One thing that is measured, again and again: with exactly one of the providers."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                {
                    "rule": f"[{', '.join(f'has(self.{name})' for name in PROVIDERS)}]"
                    ".filter(present, present).size() == 1",
                    "message": f"a metric has exactly one of {', '.join(PROVIDERS)}",
                },
                {
                    "rule": "has(self.job) ? !has(self.successCondition) && "
                    "!has(self.failureCondition) : has(self.goldenProbe) || "
                    "has(self.successCondition) || has(self.failureCondition)",
                    "message": "write a successCondition, a failureCondition or both; with job "
                    "neither, since Complete is its success",
                },
                {
                    "rule": "self.failureLimit < self.count && self.inconclusiveLimit < self.count",
                    "message": "a limit of count or more is never exceeded: raise count or lower "
                    "the limit",
                },
            ]
        }
    )

    name: str = Field(
        description="How the status calls it.",
        max_length=32,
        json_schema_extra=cel(
            f"self.matches('{NAME_PATTERN}')",
            "a metric's name has at most 32 small letters, digits or '-', and begins and ends with "
            "a letter or digit",
        ),
    )
    prometheus: PrometheusQuery | None = Field(default=None, description="Asks a Prometheus.")
    http: HttpGet | None = Field(default=None, description="Asks anything that answers JSON.")
    job: JobRun | None = Field(
        default=None, description="Runs a Job; the installation must allow it."
    )
    golden_probe: GoldenProbe | None = Field(
        default=None,
        description="{}: asks nobody. Its successCondition is `result >= 1` unless you write one.",
    )
    success_condition: str | None = _condition("When a measurement is a success")
    failure_condition: str | None = _condition("When it is a failure")
    interval_seconds: int = Field(
        default=60,
        description="From the end of one measurement to the beginning of the next.",
        ge=1,
        le=86400,
    )
    count: int = Field(
        default=1,
        description="After so many measurements, those without a result not counted, the metric is "
        "Successful if no limit was exceeded.",
        ge=1,
        le=1000,
    )
    initial_delay_seconds: int = Field(
        default=0,
        description="From the beginning of the step to the first measurement: as long as the query "
        "looks back, else it measures what was before.",
        ge=0,
        le=86400,
    )
    failure_limit: int = Field(
        default=0, description="With more failures than that the metric is Failed.", ge=0, le=1000
    )
    inconclusive_limit: int = Field(
        default=0,
        description="With more inconclusive measurements than that the metric is Inconclusive.",
        ge=0,
        le=1000,
    )
    consecutive_error_limit: int = Field(
        default=4,
        description="With more errors than that, one after the other, the metric is Error.",
        ge=0,
        le=1000,
    )
    on_no_data: Literal["Error", "Success", "Inconclusive"] = Field(
        default="Error",
        description="What a measurement without a value is: NaN, a query that finds nothing, a "
        "jsonPath that leads nowhere, or null.",
    )


def _metrics(description: str, **more: Any) -> Any:
    return Field(
        description=description,
        min_length=1,
        max_length=MAX_METRICS,
        json_schema_extra=list_map("name"),
        **more,
    )


class WeightAnalysisTemplateSpec(Model):
    """What steps of a canary measure when they name this template."""

    args: Arguments = Field(
        default_factory=dict,
        description="Arguments and what they are where a step says nothing else: {{args.name}} in "
        "addresses, queries, conditions and Jobs stands for one.",
    )
    metrics: list[Metric] = _metrics("All of them have to be Successful.")


class WeightAnalysisTemplateStatus(Model):
    """Nothing is observed of a template: it is read when a step needs it."""

    observed_generation: int = Field(
        default=0, description="The generation that this status speaks of."
    )


class AnalysisStep(Model):
    """What a step of a canary measures: a template's metrics, or its own."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            "has(self.templateName) != has(self.metrics)",
            "write templateName or metrics, and not both",
        )
    )

    template_name: str | None = Field(
        default=None,
        description="A WeightAnalysisTemplate of the rollout's namespace.",
        min_length=1,
        max_length=253,
    )
    args: Arguments = Field(
        default_factory=dict, description="Arguments, before those of the template."
    )
    metrics: list[Metric] | None = _metrics("The step's own metrics.", default=None)


# -- what a rollout remembers -------------------------------------------------------------------

Verdict = Literal["Successful", "Failed", "Inconclusive", "Error"]
AnalysisPhase = Literal["", "Waiting", "Running", "Successful", "Failed", "Inconclusive", "Error"]


class Measurement(Model):
    """One measurement."""

    number: int = Field(description="The how manieth of its metric, from 1.")
    phase: Verdict = Field(description="What it was.")
    value: str = Field(default="", description="The result.", max_length=64)
    message: str = Field(default="", description="Why, where it was no success.", max_length=256)
    at: str = Field(default="", description="When it was known (RFC 3339).", max_length=32)


class MetricStatus(Model):
    """What came of one metric."""

    name: str = Field(description="Its name.", max_length=32)
    phase: Literal["Running", "Successful", "Failed", "Inconclusive", "Error"] = Field(
        default="Running", description="Running: it is measured on."
    )
    successful: int = Field(default=0, description="Measurements that were a success.")
    failed: int = Field(default=0, description="Those that were a failure.")
    inconclusive: int = Field(default=0, description="Those that were neither.")
    errors: int = Field(default=0, description="Those without a result.")
    consecutive_errors: int = Field(default=0, description="Of them the last in a row.")
    measurements: list[Measurement] = Field(
        default_factory=list,
        description="The last ones, the newest first.",
        max_length=MAX_MEASUREMENTS,
        json_schema_extra=atomic(),
    )


class AnalysisStatus(Model):
    """The analysis of the canary's step, or of the last one that had any."""

    phase: AnalysisPhase = Field(
        default="",
        description="Empty: none was begun. Waiting: it cannot be measured, and the message says "
        "what to do.",
    )
    message: str = Field(
        default="",
        description="The metric and the value that decided, or what it waits for.",
        max_length=512,
    )
    revision: int = Field(default=0, description="The revision that it is of.")
    step: int = Field(default=0, description="The index of the step that it is of.")
    started_at: str = Field(default="", description="When it began (RFC 3339).", max_length=32)
    metrics: list[MetricStatus] = Field(
        default_factory=list,
        description="What came of each metric.",
        max_length=MAX_METRICS,
        json_schema_extra=list_map("name"),
    )
