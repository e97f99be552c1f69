"""What stands in a repository is what the cluster has: Argo CD and its like find no difference that
nobody made, in what the chart renders and in what users write.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
import yaml

from tests.drift import drift
from tests.helm.conftest import ROOT, SOURCE, Body, Helm, Kubectl
from tests.helm.test_chart import POLICIES

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(120, func_only=True)]

YOUNG = ("CustomResourceDefinition", "MutatingAdmissionPolicy", "ValidatingAdmissionPolicy")
"""Kinds of which tools may not know which defaults they have; those of our own are another one."""
SAMPLES = [ROOT / "config" / "samples" / name for name in ("vllm.yaml", "weightrollout.yaml")]


def live(kubectl: Kubectl, written: Iterable[Body]) -> list[tuple[Body, Body]]:
    """Each object as it was written, and as it is now."""
    bodies = list(written)
    answer = json.loads(kubectl("get", "-f", "-", "-o", "json", text=yaml.safe_dump_all(bodies)))
    return list(zip(bodies, answer["items"], strict=True))


def test_the_chart_s_objects_are_as_they_are_rendered(helm: Helm, kubectl: Kubectl) -> None:
    rendered = helm.template({"sources": [SOURCE]}, *POLICIES)
    young = [body for body in rendered if body["kind"].startswith(YOUNG)]
    assert len(young) > len(YOUNG)
    for body, found in live(kubectl, young):
        assert list(drift(body, found)) == [], body["metadata"]["name"]
    tool = ("--server-side", "--field-manager=argocd-controller", "--force-conflicts")
    # fails where there is a difference
    kubectl("diff", *tool, "-f", "-", text=yaml.safe_dump_all(rendered))


def test_rendering_again_gives_the_same(helm: Helm) -> None:
    """No moment, nothing drawn, nothing looked up in the cluster."""
    values = {"sources": [SOURCE]}
    assert helm.template(values, *POLICIES) == helm.template(values, *POLICIES)


def test_what_users_write_stays_as_they_wrote_it(kubectl: Kubectl) -> None:
    """Pods are injected, and nothing that they are made from."""
    files = [f"--filename={path}" for path in SAMPLES]
    written = [b for path in SAMPLES for b in yaml.safe_load_all(path.read_text())]
    kubectl("apply", *files)
    try:
        for _ in range(100):
            pods = kubectl.get("pods", "-n", "hotweights-samples", "-l", "app=tiny-llama")["items"]
            if pods:
                break
        gates = {gate["conditionType"] for pod in pods for gate in pod["spec"]["readinessGates"]}
        assert gates == {"hotweights.dev/weights"}
        kubectl("diff", *files)
        ((rollout, found),) = live(kubectl, [b for b in written if b["kind"] == "WeightRollout"])
        assert list(drift(rollout, found)) == []
    finally:
        kubectl("delete", "--wait=false", *files)
