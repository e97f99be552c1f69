"""What stands in a repository is what the cluster has: Argo CD and its like find no difference that
nobody made, in what the chart renders and in what users write.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from tests.drift import drift
from tests.helm.conftest import ROOT, SOURCE, Body, Helm, Kubectl, Refused, until
from tests.helm.test_chart import POLICIES

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(300, func_only=True)]

YOUNG = ("CustomResourceDefinition", "MutatingAdmissionPolicy", "ValidatingAdmissionPolicy")
"""Kinds of which tools may not know which defaults they have; those of our own are another one."""
SAMPLES = [ROOT / "config" / "samples" / name for name in ("vllm.yaml", "weightrollout.yaml")]


def live(kubectl: Kubectl, written: Iterable[Body]) -> list[tuple[Body, Body]]:
    """Each object as it was written, and as it is now."""
    bodies = list(written)
    answer = json.loads(kubectl("get", "-f", "-", "-o", "json", text=yaml.safe_dump_all(bodies)))
    return list(zip(bodies, answer["items"], strict=True))


def undiffered(kubectl: Kubectl, *words: str | Path, text: str = "") -> None:
    """No difference is left: while a controller goes on writing a status, kubectl may see one
    between its two looks at the object.
    """

    def none() -> bool:
        try:
            kubectl("diff", *words, text=text)
        except Refused:
            return False
        return True

    until(none, "kubectl finds no difference")


def test_the_chart_s_objects_are_as_they_are_rendered(helm: Helm, kubectl: Kubectl) -> None:
    rendered = helm.template({"sources": [SOURCE]}, *POLICIES)
    young = [body for body in rendered if body["kind"].startswith(YOUNG)]
    assert len(young) > len(YOUNG)
    for body, found in live(kubectl, young):
        assert list(drift(body, found)) == [], body["metadata"]["name"]
    tool = ("--server-side", "--field-manager=argocd-controller", "--force-conflicts")
    undiffered(kubectl, *tool, "-f", "-", text=yaml.safe_dump_all(rendered))


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

        def pods() -> list[Body]:
            words = ("pods", "-n", "hotweights-samples", "-l", "app=tiny-llama")
            found: list[Body] = kubectl.get(*words)["items"]
            return found

        until(lambda: bool(pods()), "the Deployment has pods")
        gates = {gate["conditionType"] for pod in pods() for gate in pod["spec"]["readinessGates"]}
        assert gates == {"hotweights.dev/weights"}
        undiffered(kubectl, *files)
        ((rollout, found),) = live(kubectl, [b for b in written if b["kind"] == "WeightRollout"])
        assert list(drift(rollout, found)) == []
    finally:
        kubectl("delete", "--wait=false", *files)
