"""Demo and e2e on somebody else's cluster: what only its user can give is asked for first, and its
pods are reached through kubectl.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from e2e.harness import environment
from e2e.harness.environment import Environment, NotSet
from e2e.harness.kubectl import CommandFailed, Kubectl
from e2e.harness.reach import reach

POD = {"metadata": {"name": "llm-0", "namespace": "models"}}


def test_without_a_kubeconfig_the_cluster_is_ours() -> None:
    assert environment.somebody_elses({}) is None
    assert environment.somebody_elses({"KUBECONFIG": "", "HOTWEIGHTS_REGISTRY": "r"}) is None


def test_what_only_the_user_can_give_is_asked_for(tmp_path: Path) -> None:
    kubeconfig = tmp_path / "config"
    given = {
        "KUBECONFIG": str(kubeconfig),
        "HOTWEIGHTS_REGISTRY": "r.example.com/t",
        "HOTWEIGHTS_MODELS": "/srv/models",
    }
    with pytest.raises(NotSet, match="is no file"):
        environment.somebody_elses(given)
    kubeconfig.write_text("{}")
    assert environment.somebody_elses(given) == kubeconfig
    with pytest.raises(NotSet, match="--flatten"):
        environment.somebody_elses({**given, "KUBECONFIG": f"{kubeconfig}:{kubeconfig}"})
    with pytest.raises(NotSet, match=rf"HOTWEIGHTS_REGISTRY/hotweights:{environment.version()}"):
        environment.somebody_elses({**given, "HOTWEIGHTS_REGISTRY": ""})
    with pytest.raises(NotSet, match="absolute"):
        environment.somebody_elses({**given, "HOTWEIGHTS_MODELS": "models"})


def through(tmp_path: Path, script: str) -> Environment:
    """Somebody else's cluster, whose kubectl does this."""
    program = tmp_path / "kubectl"
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    return Environment(
        Kubectl(program, tmp_path / "config"), tmp_path / "helm", tmp_path, tmp_path, None
    )


def test_pods_are_reached_through_kubectl_whatever_it_goes_on_to_say(tmp_path: Path) -> None:
    says = (
        'echo "Forwarding from 127.0.0.1:4321 -> 8000"; yes "Handling connection for 4321" | head '
        '-100000; touch "$0.said"; exec sleep 60'
    )
    with reach(through(tmp_path, says), [POD], 8000) as addresses:
        assert addresses == ["127.0.0.1:4321"]
        # a pipe would be full, and it would wait for ever
        while not (tmp_path / "kubectl.said").exists():
            time.sleep(0.01)


def test_what_kubectl_complains_about_is_told(tmp_path: Path) -> None:
    refuses = through(tmp_path, 'echo "error: pod not found" >&2; exit 1')
    with (
        pytest.raises(CommandFailed, match="port-forward pod/llm-0 :8000: error: pod not found"),
        reach(refuses, [POD], 8000),
    ):
        pytest.fail("it was reached")
