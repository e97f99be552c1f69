"""Whatever dies, it converges without help, and nobody is ever said to serve what it does not serve.

While each of these runs, a witness compares every statement of a version (label, status) with the engine's own answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from e2e.cluster.conftest import PROMPT, TOKENS, answers
from e2e.harness import samples
from e2e.harness.containers import kill_container
from e2e.harness.environment import SAMPLES, SYSTEM, Environment
from e2e.harness.kubectl import CommandFailed, TimedOut, eventually
from e2e.harness.reach import reach
from e2e.harness.traffic import complete_ids

LABEL = "app=tiny-llama"


@contextmanager
def witness(environment: Environment, cold: dict[str, list[int]]) -> Iterator[list[str]]:
    """A list that collects every false statement: a pod labelled with a version that it did not answer with.

    Label, answer, label: a pod counts only when it said the same before and after the answer, for it may change in between.
    """
    lies: list[str] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.3):
            try:
                for pod in environment.in_samples.pods(LABEL):
                    name = pod["metadata"]["name"]
                    said = samples.version_of(environment, name)
                    with reach(environment, [pod], 8000) as (address,):
                        answered = complete_ids(address, PROMPT, TOKENS, timeout_seconds=20)
                    if said and said == samples.version_of(environment, name) and answered != cold[said]:
                        lies.append(f"{name} is labelled {said} and answers otherwise")
            except (OSError, CommandFailed, TimedOut, KeyError):
                continue  # the API server or the pod is away: that is what these tests do

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lies
    finally:
        stop.set()
        thread.join(timeout=60)


def system_pod(environment: Environment, component: str, node: str = "") -> dict[str, object]:
    """The operator's pod, or the agent's of a node."""
    selector = f"app.kubernetes.io/component={component}"
    items = environment.kubectl.get("pods", "--namespace", SYSTEM, "--selector", selector)["items"]
    return next(item for item in items if not node or item["spec"]["nodeName"] == node)


def converges(
    environment: Environment, cold: dict[str, list[int]], lies: list[str], timeout_seconds: float = 300
) -> None:
    samples.until_ready(environment, timeout_seconds=timeout_seconds)
    assert answers(environment) == [cold["v1"]] * 2
    assert lies == []


def test_agent_killed_while_staging(environment: Environment, cold: dict[str, list[int]]) -> None:
    node = environment.in_samples.pods(LABEL)[0]["spec"]["nodeName"]
    with witness(environment, cold) as lies:
        environment.in_samples.apply(SAMPLES / "weightrollout.yaml")
        kill_container(environment, system_pod(environment, "agent", node), "agent")
        converges(environment, cold, lies)


def test_operator_killed_in_the_middle(environment: Environment, cold: dict[str, list[int]]) -> None:
    with witness(environment, cold) as lies:
        environment.in_samples.apply(SAMPLES / "weightrollout.yaml")
        eventually(
            "it began",
            lambda: (
                environment.in_samples.get("weightrollout", "tiny-llama")["status"]["phase"]
                in ("Staging", "Activating", "Complete")
            ),
        )
        kill_container(environment, system_pod(environment, "operator"), "operator")
        converges(environment, cold, lies)


def test_vllm_killed_in_its_commit(environment: Environment, cold: dict[str, list[int]]) -> None:
    pod = environment.in_samples.pods(LABEL)[0]
    uid = pod["metadata"]["uid"]
    with witness(environment, cold) as lies:
        environment.in_samples.apply(SAMPLES / "weightrollout.yaml")
        eventually(
            "it prepares or commits",
            lambda: (
                samples.engine_status(environment).get(uid, {}).get("phase") in ("Preparing", "Prepared", "Committing")
            ),
            every_seconds=0.05,
        )
        kill_container(environment, pod, "vllm")
        converges(environment, cold, lies, timeout_seconds=400)


def test_api_server_stopped_for_20_seconds(environment: Environment, cold: dict[str, list[int]]) -> None:
    if environment.cluster is None:
        raise CommandFailed("somebody else's API server is not ours to stop: run the e2e without KUBECONFIG")
    with witness(environment, cold) as lies:
        environment.in_samples.apply(SAMPLES / "weightrollout.yaml")
        environment.cluster.control_plane.stop_apiserver()
        time.sleep(20)
        environment.cluster.control_plane.start_apiserver()
        converges(environment, cold, lies)
