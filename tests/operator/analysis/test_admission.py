"""What cannot be measured, or can never fail, is refused by the API server itself, with a message
that says what to write instead.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(120, func_only=True)]

Body = dict[str, Any]

QUERY = {"address": "http://prometheus.monitoring:9090", "query": "vector(1)"}
GOOD = {"name": "errors", "prometheus": QUERY, "successCondition": "result < 0.05"}


def template(*metrics: Body, **spec: Any) -> Body:
    return {
        "apiVersion": "hotweights.dev/v1alpha1",
        "kind": "WeightAnalysisTemplate",
        "metadata": {"name": "t", "namespace": "default"},
        "spec": {"metrics": list(metrics), **spec},
    }


def rollout(step: Body) -> Body:
    return {
        "apiVersion": "hotweights.dev/v1alpha1",
        "kind": "WeightRollout",
        "metadata": {"name": "r", "namespace": "default"},
        "spec": {
            "versionRef": {"name": "v"},
            "target": {"selector": {"matchLabels": {"app": "llm"}}},
            "strategy": {"canary": {"steps": [{"setReplicas": 1}, {"analysis": step}]}},
        },
    }


def metric(**fields: Any) -> Body:
    return {key: value for key, value in {**GOOD, **fields}.items() if value is not None}


JOB = {"spec": {"template": {"spec": {"restartPolicy": "Never", "containers": []}}}}

INVALID: dict[str, tuple[Body, str]] = {
    "no metrics": (template(), "at least 1"),
    "two of one name": (template(GOOD, GOOD), "Duplicate value"),
    "no provider": (template(metric(prometheus=None)), "exactly one of prometheus, http"),
    "two providers": (template(metric(goldenProbe={})), "exactly one of prometheus, http"),
    "no condition": (template(metric(successCondition=None)), "successCondition, a failure"),
    "a job's condition": (template(metric(prometheus=None, job=JOB)), "Complete is its success"),
    "a function": (template(metric(successCondition="len(result) > 1")), "compare result with"),
    "an import": (template(metric(successCondition="__import__('os')")), "compare result with"),
    "parentheses": (template(metric(successCondition="(result < 1)")), "without parentheses"),
    "an order of texts": (template(metric(successCondition='result < "b"')), "compare result"),
    "it can never fail": (template(metric(count=2, failureLimit=2)), "is never exceeded"),
    "no host": (
        template(metric(prometheus={**QUERY, "address": "file:///etc/passwd"})),
        "write http:// or https://",
    ),
    "a path that is none": (
        template(metric(prometheus=None, http={"url": "http://a", "jsonPath": "a[0].b"})),
        "as data.items.0.p99",
    ),
    "a name that is none": (template(metric(name="Errors")), "small letters"),
    "no template and no metrics": (rollout({}), "templateName or metrics"),
    "template and metrics": (
        rollout({"templateName": "t", "metrics": [GOOD]}),
        "templateName or metrics",
    ),
    "an inline metric without a provider": (
        rollout({"metrics": [metric(prometheus=None)]}),
        "exactly one of prometheus",
    ),
}

VALID: dict[str, Body] = {
    "PromQL": template(GOOD),
    "an argument in a condition": template(
        metric(successCondition="result < {{args.limit}}"), args={"limit": "0.05"}
    ),
    "HTTP": template(
        metric(
            prometheus=None,
            http={"url": "https://a/b", "jsonPath": "data.items.0.p99"},
            successCondition='result == "ok" || result == true',
            failureCondition="result >= 1e3 && result != -4.5",
        )
    ),
    "a Job": template(metric(prometheus=None, successCondition=None, job=JOB)),
    "the golden probe": template({"name": "golden", "goldenProbe": {}}),
    "a step that names a template": rollout({"templateName": "t", "args": {"limit": "0.1"}}),
    "a step with metrics of its own": rollout({"metrics": [GOOD]}),
}


@pytest.mark.parametrize("name", INVALID)
def test_it_is_refused_and_says_what_to_write(kubectl: Any, name: str) -> None:
    body, hint = INVALID[name]
    with pytest.raises(Exception, match=r"(?i)invalid|required|unsupported") as caught:
        kubectl("create", "--dry-run=server", "-f", "-", text=json.dumps(body))
    assert hint in str(caught.value)


@pytest.mark.parametrize("name", VALID)
def test_it_is_taken(kubectl: Any, name: str) -> None:
    kubectl("create", "--dry-run=server", "-f", "-", text=json.dumps(VALID[name]))


def test_a_job_s_spec_is_kept_as_it_is(kubectl: Any) -> None:
    body = VALID["a Job"]
    kubectl.apply(body)
    kept = json.loads(kubectl("get", "wat", "t", "-n", "default", "-o", "json"))
    assert kept["spec"]["metrics"][0]["job"]["spec"] == JOB["spec"]
    kubectl("delete", "wat", "t", "-n", "default")


def test_explain_describes_a_condition(kubectl: Any) -> None:
    text = kubectl("explain", "weightanalysistemplate.spec.metrics.successCondition")
    assert "result >= 0.99 && result <= 1.2" in " ".join(text.split())
