"""Invalid objects are refused by the API server itself, with a message that says what to write
instead.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(120, func_only=True)]

Body = dict[str, Any]


def version(**spec: Any) -> Body:
    return {
        "apiVersion": "hotweights.dev/v1alpha1",
        "kind": "WeightVersion",
        "metadata": {"name": "v", "namespace": "default"},
        "spec": {"model": "tiny", "version": "v1", "source": {"uri": "file:///models/v1"}, **spec},
    }


def rollout(**spec: Any) -> Body:
    return {
        "apiVersion": "hotweights.dev/v1alpha1",
        "kind": "WeightRollout",
        "metadata": {"name": "r", "namespace": "default"},
        "spec": {
            "versionRef": {"name": "v"},
            "target": {"selector": {"matchLabels": {"app": "llm"}}},
            **spec,
        },
    }


INVALID: dict[str, tuple[Body, str]] = {
    "version is no label value": (version(version="v 1"), "at most 63 letters"),
    "version is too long": (version(version="v" * 64), "63"),
    "model is no label value": (version(model="-x"), "begins and ends with a letter or digit"),
    "source of an unknown kind": (
        version(source={"uri": "s3://bucket/x"}),
        "write file:///absolute/path",
    ),
    "relative source": (version(source={"uri": "file://models"}), "write file:///absolute/path"),
    "digest is none": (version(manifest={"digest": "abc"}), "64 hexadecimal digits"),
    "no source": ({**version(), "spec": {"model": "m", "version": "v"}}, "source"),
    "empty selector": (rollout(target={"selector": {}}), "write at least one label"),
    "no versionRef": ({**rollout(), "spec": {"target": rollout()["spec"]["target"]}}, "versionRef"),
    "budget of zero": (
        rollout(strategy={"type": "Rolling", "rolling": {"maxUnavailable": 0}}),
        "at least 1",
    ),
    "budget of nonsense": (
        rollout(strategy={"type": "Rolling", "rolling": {"maxUnavailable": "some"}}),
        "1% to 100%",
    ),
    "rolling without Rolling": (
        rollout(strategy={"type": "AllAtOnce", "rolling": {}}),
        "strategy.rolling goes with",
    ),
    "unknown strategy": (rollout(strategy={"type": "Canary"}), "AllAtOnce"),
    "unknown mode": (rollout(activation={"mode": "keep"}), "Keep"),
    "unknown probe": (rollout(activation={"probe": "Ran"}), "Golden"),
    "no origin readers": (rollout(staging={"originReaders": 0}), "greater than or equal to 1"),
    "unknown action": (rollout(failurePolicy={"action": "Rollback"}), "Abort"),
    "deadline of zero": (rollout(progressDeadlineSeconds=0), "greater than or equal to 1"),
}

VALID: dict[str, Body] = {
    "a version": version(),
    "a pinned version": version(manifest={"digest": "sha256:" + "0" * 64}),
    "a claim": version(source={"uri": "pvc://weights/v1"}),
    "a rollout": rollout(),
    "all at once": rollout(strategy={"type": "AllAtOnce"}),
    "a percentage": rollout(strategy={"type": "Rolling", "rolling": {"maxUnavailable": "25%"}}),
}


@pytest.mark.parametrize("name", INVALID)
def test_it_is_refused_and_says_what_to_write(kubectl: Any, name: str) -> None:
    body, hint = INVALID[name]
    with pytest.raises(Exception, match=r"(?i)invalid|required|unsupported") as caught:
        kubectl.apply(body)
    assert hint in str(caught.value)


@pytest.mark.parametrize("name", VALID)
def test_it_is_taken(kubectl: Any, name: str) -> None:
    kubectl("create", "--dry-run=server", "-f", "-", text=json.dumps(VALID[name]))


def test_a_version_is_immutable(kubectl: Any) -> None:
    kubectl.apply(version())
    with pytest.raises(Exception, match="a WeightVersion is immutable: create another one"):
        kubectl.apply(version(version="v2"))
    kubectl("delete", "wver", "v", "-n", "default")


def test_a_target_is_immutable_and_a_versionref_is_not(kubectl: Any) -> None:
    kubectl.apply(rollout())
    kubectl.apply(rollout(versionRef={"name": "w"}))
    other = {"selector": {"matchLabels": {"app": "other"}}}
    with pytest.raises(Exception, match="target is immutable: create another WeightRollout"):
        kubectl.apply(rollout(target=other))
    kubectl("delete", "wroll", "r", "-n", "default")


def test_what_was_just_applied_is_not_yet_current(kubectl: Any) -> None:
    kubectl.apply(rollout())
    path = "jsonpath={.status.observedGeneration}"
    assert kubectl("get", "wroll", "r", "-n", "default", "-o", path) == "-1"
    kubectl("delete", "wroll", "r", "-n", "default")


def test_explain_describes_every_field(kubectl: Any) -> None:
    text = kubectl("explain", "weightrollout.spec", "--recursive=false")
    assert "the only field that a release changes" in " ".join(text.split())
