"""Invalid objects are refused by `kubectl apply`, with a message that says what to write
instead.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator

import pytest
import yaml

from tests.helm.conftest import ROOT, Body, Helm, Kubectl, Refused, until

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(180, func_only=True)]

SAMPLES = ROOT / "config" / "samples"
VERSION: Body = yaml.safe_load((SAMPLES / "weightversion.yaml").read_text())
ROLLOUT: Body = yaml.safe_load((SAMPLES / "weightrollout.yaml").read_text())
LONG = "v" * 64


def changed(body: Body, path: str, value: object) -> Body:
    """The object with one field of its spec replaced; None removes it."""
    body = copy.deepcopy(body)
    *parents, last = path.split(".")
    place = body["spec"]
    for name in parents:
        place = place.setdefault(name, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return body


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            changed(VERSION, "source.uri", "s3://bucket/x"),
            "write file:///absolute/path or pvc://claim/path",
        ),
        (
            changed(VERSION, "source.uri", "/models/x"),
            "write file:///absolute/path or pvc://claim/path",
        ),
        (changed(VERSION, "version", "v1 beta"), "a version is a label value: at most 63 letters"),
        (changed(VERSION, "version", LONG), "spec.version: Too long: may not be more than 63"),
        (changed(VERSION, "model", "tiny/llama"), "a model name has at most 63 letters"),
        (changed(VERSION, "model", None), "spec.model: Required value"),
        (changed(VERSION, "manifest.digest", "abc"), "write sha256: and 64 hexadecimal digits"),
        (changed(VERSION, "sourceUri", "x"), 'unknown field "spec.sourceUri"'),
        (changed(ROLLOUT, "versionRef", None), "spec.versionRef: Required value"),
        (
            changed(ROLLOUT, "target.selector", {}),
            "an empty selector would select every pod: write at least one label",
        ),
        (
            changed(ROLLOUT, "target.selector.matchLabels", {}),
            "an empty selector would select every pod",
        ),
        (
            changed(ROLLOUT, "strategy.rolling.maxUnavailable", 0),
            "write a number of at least 1 or a percentage",
        ),
        (
            changed(ROLLOUT, "strategy.rolling.maxUnavailable", "half"),
            "write a number of at least 1 or a percentage",
        ),
        (
            changed(ROLLOUT, "strategy.type", "AllAtOnce"),
            "strategy.rolling goes with type Rolling: remove it or set type",
        ),
        (changed(ROLLOUT, "strategy.type", "Canary"), 'supported values: "Rolling", "AllAtOnce"'),
        (changed(ROLLOUT, "activation.mode", "keep"), 'supported values: "Keep", "Wait", "Abort"'),
        (
            changed(ROLLOUT, "activation.memory", "InPause"),
            "write an activation.maxPauseSeconds that is not above activation.commitTimeoutSeconds",
        ),
        (
            changed(ROLLOUT, "activation.maxPauseSeconds", 61),
            "that is not above activation.commitTimeoutSeconds",
        ),
        (
            changed(ROLLOUT, "failurePolicy.action", "Rollback"),
            'supported values: "Pause", "Abort"',
        ),
        (
            changed(ROLLOUT, "progressDeadlineSeconds", 0),
            "spec.progressDeadlineSeconds in body should be greater than or equal",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_new_objects(kubectl: Kubectl, body: Body, message: str) -> None:
    with pytest.raises(Refused) as refusal:
        kubectl("apply", "--dry-run=server", "-f", "-", text=json.dumps(body))
    assert message in str(refusal.value)


def refused(kubectl: Kubectl) -> bool:
    """Whether a version that is not pinned is."""
    try:
        kubectl.dry_run(VERSION)
    except Refused:
        return True
    return False


def test_a_version_without_digest_where_one_is_required(kubectl: Kubectl, helm: Helm) -> None:
    policy = [
        body
        for body in helm.template({"requireDigest": True})
        if body["metadata"]["name"] == "hotweights-digest"
    ]
    for body in policy:
        kubectl.create(body)
    try:
        until(lambda: refused(kubectl), "the policy is noticed")
        with pytest.raises(Refused, match="write the digest that `hotweights publish` prints"):
            kubectl.dry_run(VERSION)
        kubectl.dry_run(changed(VERSION, "manifest.digest", f"sha256:{'0' * 64}"))
    finally:
        for body in policy:
            kubectl("delete", body["kind"], body["metadata"]["name"])
        # other tests' versions are not pinned
        until(lambda: not refused(kubectl), "that the policy is gone is noticed")


@pytest.fixture
def existing(kubectl: Kubectl) -> Iterator[None]:
    names = ("-f", SAMPLES / "weightversion.yaml", "-f", SAMPLES / "weightrollout.yaml")
    kubectl("apply", *names)
    yield
    kubectl("delete", *names)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            changed(VERSION, "version", "v2"),
            "a WeightVersion is immutable: create another one and point the rollout at it",
        ),
        (changed(VERSION, "source.uri", "file:///models/other"), "a WeightVersion is immutable"),
        (changed(VERSION, "manifest.digest", f"sha256:{'0' * 64}"), "a WeightVersion is immutable"),
        (
            changed(ROLLOUT, "target.selector.matchLabels", {"app": "other"}),
            "create another WeightRollout for other pods",
        ),
    ],
    ids=["version", "source", "digest added", "target"],
)
def test_changes(kubectl: Kubectl, existing: None, body: Body, message: str) -> None:
    with pytest.raises(Refused) as refusal:
        kubectl("apply", "-f", "-", text=json.dumps(body))
    assert message in str(refusal.value)


def test_a_release_changes_the_version_and_nothing_else(kubectl: Kubectl, existing: None) -> None:
    assert "configured" in kubectl("apply", "-f", SAMPLES / "weightrollout-v0.yaml")
