"""Pods come, go and die while a rollout runs and after it; what they serve is always what was
decided.
"""

from __future__ import annotations

import time

import pytest

from e2e.cluster.conftest import PROMPT, TOKENS, answers
from e2e.harness import samples
from e2e.harness.environment import RELEASE, SAMPLES, SYSTEM, Environment, install
from e2e.harness.kubectl import eventually, run
from e2e.harness.reach import reach
from e2e.harness.sabotage import kill_container
from e2e.harness.shown import DIGEST, READY, watch_shown
from e2e.harness.traffic import complete_ids

LABEL = "app=tiny-llama"
START_SECONDS = 900


def first_answer(environment: Environment, pod: str) -> list[int]:
    """What a pod answers the first time that its port answers at all."""

    def ask() -> list[int] | None:
        body = environment.in_samples.get("pod", pod)
        if not body.get("status", {}).get("podIP"):
            return None
        with reach(environment, [body], 8000) as (address,):
            try:
                return complete_ids(address, PROMPT, TOKENS, timeout_seconds=10)
            except OSError:
                return None

    found: list[int] = eventually(f"an answer of {pod}", ask, START_SECONDS, every_seconds=0.2)
    return found


def new_pod(environment: Environment, known: set[str]) -> str:
    """The name of the pod that was not there before."""
    found: str = eventually(
        "a new pod",
        lambda: next(
            (
                p["metadata"]["name"]
                for p in environment.in_samples.pods(LABEL)
                if p["metadata"]["name"] not in known
            ),
            "",
        ),
    )
    return found


@pytest.fixture
def two_pods_after(environment: Environment) -> object:
    """Scale back to two when the test is over."""
    yield
    samples.scale(environment, 2)


@pytest.mark.usefixtures("two_pods_after")
def test_a_pod_that_scales_up_after_the_rollout_serves_its_version_at_once(
    environment: Environment, cold: dict[str, list[int]]
) -> None:
    environment.in_samples.apply(SAMPLES / "weightrollout.yaml")
    samples.until_ready(environment)
    known = {pod["metadata"]["name"] for pod in environment.in_samples.pods(LABEL)}
    samples.scale(environment, 3)
    pod = new_pod(environment, known)
    assert first_answer(environment, pod) == cold["v1"]
    environment.in_samples(
        "wait", "--for=condition=Ready", f"pod/{pod}", "--timeout=180s", timeout_seconds=190
    )
    assert samples.version_of(environment, pod) == "v1"


@pytest.mark.usefixtures("two_pods_after")
def test_two_pods_on_one_node_follow_one_after_the_other(
    environment: Environment, cold: dict[str, list[int]]
) -> None:
    """And a pod that appears in the middle of it serves the version that the rollout leads to."""
    kubectl = environment.in_samples
    known = {pod["metadata"]["name"] for pod in kubectl.pods(LABEL)}
    samples.scale(environment, 3)
    pod = new_pod(environment, known)
    kubectl.apply(SAMPLES / "weightrollout.yaml")
    assert first_answer(environment, pod) == cold["v1"]
    samples.until_ready(environment, timeout_seconds=START_SECONDS)
    nodes = [p["spec"]["nodeName"] for p in kubectl.pods(LABEL)]
    assert max(nodes.count(node) for node in nodes) == 2
    with watch_shown(kubectl, LABEL, DIGEST) as labels, watch_shown(kubectl, LABEL, READY) as ready:
        kubectl.apply(SAMPLES / "weightrollout-v0.yaml")
        samples.until_ready(environment)
        eventually("every change was heard", lambda: len(labels.lacked) == 3)
    assert labels.most_lacking == 1, "with maxUnavailable 1 no two pods change at once"
    assert ready.lacked == set(), "a pause of a moment takes nobody out of a Service"
    assert answers(environment) == [cold["v0"]] * 3


def test_a_killed_container_comes_back_on_the_new_version(
    environment: Environment, cold: dict[str, list[int]]
) -> None:
    kubectl = environment.in_samples
    kubectl.apply(SAMPLES / "weightrollout.yaml")
    samples.until_ready(environment)
    pod = kubectl.pods(LABEL)[0]
    kill_container(environment, pod, "vllm")
    eventually(
        "the kill seen",
        lambda: (
            kubectl.pods(LABEL)[0]["status"]["containerStatuses"][0]["restartCount"]
            > pod["status"]["containerStatuses"][0]["restartCount"]
        ),
    )
    assert first_answer(environment, pod["metadata"]["name"]) == cold["v1"]
    samples.until_ready(environment)


def test_uninstalled_pods_go_on_serving(
    environment: Environment, cold: dict[str, list[int]]
) -> None:
    """Running pods notice nothing; a new one is an ordinary vLLM pod, because the policy that made
    it more is gone.
    """
    kubectl = environment.in_samples
    kubectl.apply(SAMPLES / "weightrollout.yaml")
    samples.until_ready(environment)
    run(
        environment.helm,
        "--kubeconfig",
        kubectl.kubeconfig,
        "uninstall",
        RELEASE,
        "--namespace",
        SYSTEM,
        "--wait",
        timeout_seconds=330,
    )
    try:
        assert answers(environment) == [cold["v1"]] * 2
        time.sleep(5)
        assert answers(environment) == [cold["v1"]] * 2
        assert kubectl("get", "weightrollout", "tiny-llama", "--output", "name").strip(), (
            "the objects outlive the installation"
        )
        known = {pod["metadata"]["name"] for pod in kubectl.pods(LABEL)}
        samples.scale(environment, 3)
        assert first_answer(environment, new_pod(environment, known)) == cold["v0"]
        samples.scale(environment, 2)
        assert {p["metadata"]["name"] for p in kubectl.pods(LABEL)} == known
    finally:
        install(environment)
        samples.until_ready(environment)
