"""What docs/install.md says of a version every hour, with a real kubectl and a real API server."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hotweights_crds.base import API_VERSION
from tests.helm.conftest import Body, Kubectl

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(180, func_only=True)]

NAMESPACE = "hotweights-samples"
PROGRAM = "from hotweights.cli import main; main()"
EMPTY: Body = {"apiVersion": "v1", "kind": "List", "items": []}
KINDS = "weightversions,weightrollouts"


def version(name: str) -> Body:
    return {
        "apiVersion": API_VERSION,
        "kind": "WeightVersion",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"model": "hourly", "version": name, "source": {"uri": f"file:///models/{name}"}},
    }


def prune(listed: str, keep: int) -> str:
    command = [sys.executable, "-c", PROGRAM, "prune-versions", "--keep", str(keep)]
    done = subprocess.run(
        command, input=listed, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_no_rollout_uses_is_deleted_and_nothing_else(kubectl: Kubectl) -> None:
    rollout = {
        "apiVersion": API_VERSION,
        "kind": "WeightRollout",
        "metadata": {"name": "hourly", "namespace": NAMESPACE},
        "spec": {
            "versionRef": {"name": "hour-1"},
            "target": {"selector": {"matchLabels": {"app": "hourly"}}},
        },
    }
    items = [rollout, *(version(f"hour-{number}") for number in (1, 2, 3))]
    kubectl("create", "--filename", "-", text=json.dumps({**EMPTY, "items": items}))
    served = {"name": "hour-1", "version": "hour-1", "digest": "sha256:" + "1" * 64}
    complete = {"status": {"target": served, "stable": served}}
    words = ("patch", "weightrollout", "hourly", "--namespace", NAMESPACE, "--type=merge")
    kubectl(*words, "--subresource=status", "--patch", json.dumps(complete))
    listed = kubectl("get", KINDS, "--namespace", NAMESPACE, "--output", "json")
    kubectl("delete", "--filename", "-", text=prune(listed, keep=1))
    left = kubectl.get("weightversions", "--namespace", NAMESPACE)["items"]
    assert [item["metadata"]["name"] for item in left] == ["hour-1", "hour-3"]
    # where there is nothing to delete, that is no failure
    kubectl("delete", "--filename", "-", text=json.dumps(EMPTY))
    kubectl("delete", KINDS, "--all", "--wait=false", "--namespace", NAMESPACE)
