"""Whatever dies, it converges without help, and nobody is ever said to serve what it does not
serve.

While each of these runs, a witness compares every statement of a version (label, status) with the
engine's own answers.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

from e2e.cluster.conftest import PROMPT, TOKENS, answers
from e2e.harness import samples
from e2e.harness.environment import SAMPLES, SYSTEM, Environment
from e2e.harness.kubectl import CommandFailed, TimedOut, eventually
from e2e.harness.reach import reach
from e2e.harness.sabotage import kill_container
from e2e.harness.traffic import complete_ids

LABEL = "app=tiny-llama"


@dataclass
class Account:
    """What a witness saw."""

    compared: Counter[str] = field(
        default_factory=Counter
    )  # answers that were compared, by the version that the pod said
    lies: list[str] = field(default_factory=list)


@contextmanager
def witness(environment: Environment, cold: dict[str, list[int]]) -> Iterator[Account]:
    """Asks every pod again and again, from when it has seen one serve v0; in the end it must have
    seen v1 as well, and no lie.

    Label, answer, label: a pod counts only when it said the same before and after the answer, for
    it may change in between.
    """
    account = Account()
    stop = threading.Event()

    def look(pod: dict[str, Any]) -> None:
        name = pod["metadata"]["name"]
        try:
            said = samples.version_of(environment, name)
            with reach(environment, [pod], 8000) as (address,):
                answered = complete_ids(address, PROMPT, TOKENS, timeout_seconds=20)
            again = samples.version_of(environment, name)
        except HTTPError as error:
            error.close()  # it holds the connection
            return
        except (OSError, HTTPException, ValueError, KeyError, CommandFailed, TimedOut):
            # the API server or the pod is away (or has no address yet): that is what these tests do
            return
        if said and said == again:
            account.compared[said] += 1
            if answered != cold.get(said):
                account.lies.append(f"{name} is labelled {said} and answers otherwise")

    def watch() -> None:
        while not stop.wait(0.3):
            try:
                pods = environment.in_samples.pods(LABEL)
            except (CommandFailed, TimedOut):
                continue  # the API server is away
            for pod in pods:
                look(pod)

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            eventually("the witness has seen v0 serve", lambda: account.compared["v0"] > 0)
            yield account
            eventually("the witness has seen v1 serve", lambda: account.compared["v1"] > 0)
        finally:
            stop.set()
            watching.result(timeout=60)  # an error of its own is one
    assert account.lies == []


def system_pod(environment: Environment, component: str, node: str = "") -> dict[str, object]:
    """The operator's pod, or the agent's of a node."""
    selector = f"app.kubernetes.io/component={component}"
    items = environment.kubectl.get("pods", "--namespace", SYSTEM, "--selector", selector)["items"]
    return next(item for item in items if not node or item["spec"]["nodeName"] == node)


def converges(
    environment: Environment, cold: dict[str, list[int]], timeout_seconds: float = 300
) -> None:
    samples.until_ready(environment, timeout_seconds=timeout_seconds)
    assert answers(environment) == [cold["v1"]] * 2


def test_agent_killed_while_staging(environment: Environment, cold: dict[str, list[int]]) -> None:
    node = environment.in_samples.pods(LABEL)[0]["spec"]["nodeName"]
    with witness(environment, cold):
        environment.in_samples.apply(SAMPLES / "weightrollout.yaml")
        kill_container(environment, system_pod(environment, "agent", node), "agent")
        converges(environment, cold)


def test_operator_killed_in_the_middle(
    environment: Environment, cold: dict[str, list[int]]
) -> None:
    with witness(environment, cold):
        environment.in_samples.apply(SAMPLES / "weightrollout.yaml")
        eventually("it goes to v1", lambda: _goes_to_v1(environment), every_seconds=0.1)
        kill_container(environment, system_pod(environment, "operator"), "operator")
        converges(environment, cold)


def _goes_to_v1(environment: Environment) -> bool:
    """Begun; on a machine that is quick it may be over already, and then the next operator finds
    that.
    """
    status = environment.in_samples.get("weightrollout", "tiny-llama")["status"]
    return bool(status["target"]["version"] == "v1")


def test_vllm_killed_in_its_commit(environment: Environment, cold: dict[str, list[int]]) -> None:
    pod = environment.in_samples.pods(LABEL)[0]
    uid = pod["metadata"]["uid"]
    with witness(environment, cold):
        environment.in_samples.apply(SAMPLES / "weightrollout.yaml")
        eventually(
            "it prepares or commits",
            lambda: (
                samples.engine_status(environment).get(uid, {}).get("phase")
                in ("Preparing", "Prepared", "Committing")
            ),
            every_seconds=0.05,
        )
        kill_container(environment, pod, "vllm")
        converges(environment, cold, timeout_seconds=400)


def test_api_server_stopped_for_20_seconds(
    environment: Environment, cold: dict[str, list[int]]
) -> None:
    if environment.cluster is None:
        raise CommandFailed(
            "somebody else's API server is not ours to stop: run the e2e without KUBECONFIG"
        )
    with witness(environment, cold):
        environment.in_samples.apply(SAMPLES / "weightrollout.yaml")
        environment.cluster.control_plane.stop_apiserver()
        time.sleep(20)
        environment.cluster.control_plane.start_apiserver()
        converges(environment, cold)
