"""What stands in a repository is what the cluster has: Argo CD and its like find no difference that
nobody made, in what the chart renders and in what users write.
"""

from __future__ import annotations

import pytest
import yaml

from tests.drift import drift
from tests.helm.conftest import ROOT, SOURCE, Body, Helm, Kubectl
from tests.helm.test_chart import POLICIES

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(60, func_only=True)]

YOUNG = ("CustomResourceDefinition", "MutatingAdmissionPolicy", "ValidatingAdmissionPolicy")
"""Kinds of which tools may not know which defaults they have; those of our own are another one."""
SAMPLES = [ROOT / "config" / "samples" / name for name in ("vllm.yaml", "weightrollout.yaml")]


def live(kubectl: Kubectl, body: Body) -> Body:
    """The object as it is now."""
    namespace = body["metadata"].get("namespace", "")
    group, _, _ = body["apiVersion"].rpartition("/")
    kind = f"{body['kind']}.{group}" if group else body["kind"]
    return kubectl.get(kind, body["metadata"]["name"], *(["-n", namespace] if namespace else []))


def test_the_chart_s_objects_are_as_they_are_rendered(helm: Helm, kubectl: Kubectl) -> None:
    rendered = helm.template({"sources": [SOURCE]}, *POLICIES)
    young = [body for body in rendered if body["kind"].startswith(YOUNG)]
    assert len(young) > len(YOUNG)
    for body in young:
        assert list(drift(body, live(kubectl, body))) == [], body["metadata"]["name"]
    text = yaml.safe_dump_all(rendered)
    kubectl("diff", "-f", "-", text=text)  # which fails where there is a difference
    tool = ("--server-side", "--field-manager=argocd-controller", "--force-conflicts")
    kubectl("diff", *tool, "-f", "-", text=text)


def test_rendering_again_gives_the_same(helm: Helm) -> None:
    """No moment, nothing drawn, nothing looked up in the cluster."""
    values = {"sources": [SOURCE]}
    assert helm.template(values, *POLICIES) == helm.template(values, *POLICIES)


def test_what_users_write_stays_as_they_wrote_it(kubectl: Kubectl) -> None:
    """Pods are injected, and nothing that they are made from."""
    for path in SAMPLES:
        kubectl("apply", "-f", path)
    try:
        for _ in range(100):
            pods = kubectl.get("pods", "-n", "hotweights-samples", "-l", "app=tiny-llama")["items"]
            if pods:
                break
        gates = {gate["conditionType"] for pod in pods for gate in pod["spec"]["readinessGates"]}
        assert gates == {"hotweights.dev/weights"}
        for path in SAMPLES:
            kubectl("diff", "-f", path)
            for body in yaml.safe_load_all(path.read_text()):
                if body["apiVersion"].startswith("hotweights.dev/"):
                    assert list(drift(body, live(kubectl, body))) == []
    finally:
        for path in SAMPLES:
            kubectl("delete", "--wait=false", "-f", path)
