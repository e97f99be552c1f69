"""Arguments in what a metric says."""

from __future__ import annotations

import pytest

from hotweights_crds.analysis import Metric
from hotweights_crds.weightrollout import VersionStatus
from hotweights_operator.decide.analysis import arguments
from tests.operator.worlds import rollout

NAMES = {"canary-version": "v2", "args.limit": "0.05", "args.host": "prometheus"}


def test_everything_that_a_metric_says_is_filled() -> None:
    metric = Metric.from_dict(
        {
            "name": "errors",
            "prometheus": {
                "address": "http://{{args.host}}:9090",
                "query": 'sum(rate(errors{version="{{ canary-version }}",job="a"}[1m]))',
            },
            "successCondition": "result < {{args.limit}}",
        }
    )
    found = arguments.filled(metric, NAMES)
    assert found.prometheus is not None
    assert found.prometheus.address == "http://prometheus:9090"
    assert found.prometheus.query == 'sum(rate(errors{version="v2",job="a"}[1m]))'
    assert found.success_condition == "result < 0.05"


def test_a_job_keeps_templates_of_its_own() -> None:
    script = 'echo {{canary-version}} {{ .Values.x }} {{"{{"}} ${HOME} {%if%}'
    spec = {"template": {"spec": {"containers": [{"name": "a", "args": [script], "tty": True}]}}}
    metric = Metric.from_dict({"name": "load", "job": {"spec": spec}})
    found = arguments.filled(metric, NAMES)
    assert found.job is not None
    (container,) = found.job.spec["template"]["spec"]["containers"]
    assert container == {
        "name": "a",
        "args": [script.replace("{{canary-version}}", "v2")],
        "tty": True,
    }


@pytest.mark.parametrize("name", ["canary-verson", "args.nothing", "limit"])
def test_what_stands_for_nothing_is_named(name: str) -> None:
    metric = Metric.from_dict({"name": "a", "http": {"url": f"http://a/{{{{{name}}}}}"}})
    with pytest.raises(arguments.UnknownArgument, match=rf"\{{\{{{name}\}}\}} stands for nothing"):
        arguments.filled(metric, NAMES)


def test_built_in_names_are_what_the_pods_labels_show() -> None:
    new = VersionStatus(name="n", version="v2", digest=f"sha256:{'ab' * 32}")
    found = arguments.built_in(rollout(), VersionStatus(), new)
    assert found == {
        "namespace": "models",
        "rollout": "llm",
        "stable-version": "",
        "stable-digest": "",
        "canary-version": "v2",
        "canary-digest": "ab" * 8,
    }
