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

import pytest

from e2e.cluster.conftest import PROMPT, TOKENS, answers
from e2e.cluster.test_bad_input import create_version, lead_to
from e2e.harness import checkpoints, samples
from e2e.harness.environment import NAMESPACE, SAMPLES, SYSTEM, Environment, publish
from e2e.harness.fleet import is_ready, restarts, words
from e2e.harness.kubectl import CommandFailed, TimedOut, eventually
from e2e.harness.reach import reach
from e2e.harness.sabotage import kill_container
from e2e.harness.tape import Body, Tape, record
from e2e.harness.traffic import complete_ids

LABEL = "app=tiny-llama"
_API = "/apis/hotweights.dev/v1alpha1/namespaces"
ROLLOUT = f"{_API}/{NAMESPACE}/weightrollouts?fieldSelector=metadata.name%3Dtiny-llama"
NODES = f"{_API}/{SYSTEM}/nodeweights"


@dataclass
class Account:
    """What a witness saw."""

    # answers that were compared, by the version that the pod said and the pod
    compared: Counter[tuple[str, str]] = field(default_factory=Counter)
    lies: list[str] = field(default_factory=list)

    def saw(self, version: str) -> set[str]:
        """The pods that it has seen serve this version."""
        return {pod for known, pod in self.compared if known == version}


@contextmanager
def witness(
    environment: Environment, cold: dict[str, list[int]], ends_with: str = "v1"
) -> Iterator[Account]:
    """Asks every pod again and again, from when it has seen both serve v0; in the end it must have
    seen both serve what it ends with as well, and no lie.

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
            account.compared[said, name] += 1
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
            eventually("the witness has seen v0 serve", lambda: len(account.saw("v0")) == 2)
            yield account
            eventually(
                f"the witness has seen {ends_with} serve",
                lambda: len(account.saw(ends_with)) == 2,
            )
        finally:
            stop.set()
            watching.result(timeout=300)  # an error of its own is one
    assert account.lies == []


def system_pod(environment: Environment, component: str, node: str = "") -> dict[str, Any]:
    """The operator's pod, or the agent's of a node."""
    pods = samples.system_pods(environment, component)
    return next(pod for pod in pods if not node or pod["spec"]["nodeName"] == node)


def converges(
    environment: Environment, cold: dict[str, list[int]], timeout_seconds: float = 900
) -> None:
    samples.until_ready(environment, timeout_seconds=timeout_seconds)
    assert answers(environment) == [cold["v1"]] * 2


def node_weights(environment: Environment, node: str) -> dict[str, Any]:
    """What the agent of a node is told, and what it says."""
    return environment.kubectl.get("nodeweights", node, "--namespace", SYSTEM)


def lives(environment: Environment, component: str, node: str = "") -> int:
    """How often a container of ours was started again."""
    status: Any = system_pod(environment, component, node)["status"]
    return int(status["containerStatuses"][0]["restartCount"])


def test_agent_killed_while_staging(environment: Environment, cold: dict[str, list[int]]) -> None:
    """It is told to stage a version that no node has, and dies before it has done so. It stands
    still from before it is told: nobody could be quick enough to kill it in between.
    """
    node = environment.in_samples.pods(LABEL)[0]["spec"]["nodeName"]
    name = "staging"
    checkpoints.copy(environment.models / "tiny-llama" / "v1", name)
    digest = publish(environment.models / "tiny-llama" / name, name)
    create_version(environment, name)
    eventually(
        "it is resolved",
        lambda: (
            environment.in_samples.get("weightversion", f"tiny-llama-{name}")
            .get("status", {})
            .get("digest")
            == digest
        ),
    )

    def told() -> bool:
        entries = node_weights(environment, node)["spec"].get("rollouts", [])
        return any(item["digest"] == digest for e in entries for item in e.get("stage", []))

    def staged() -> list[str]:
        said = node_weights(environment, node).get("status", {}).get("staged", [])
        return [one["phase"] for one in said if one["digest"] == digest]

    before = lives(environment, "agent", node)
    with witness(environment, {**cold, name: cold["v1"]}, ends_with=name):
        agent = system_pod(environment, "agent", node)
        assert not told()
        kill_container(environment, agent, "agent", "SIGSTOP")
        try:
            lead_to(environment, name)
            eventually("it is told to stage it", told, every_seconds=0.1)
            assert staged() == [], "there was nothing left to stage"
        finally:
            kill_container(environment, agent, "agent")
        eventually("the kill seen", lambda: lives(environment, "agent", node) > before)
        converges(environment, cold)
        assert staged() == ["Staged"]


def test_operator_killed_in_the_middle(
    environment: Environment, cold: dict[str, list[int]]
) -> None:
    operator = system_pod(environment, "operator")
    before = lives(environment, "operator")
    with witness(environment, cold):
        with record(environment.in_samples, {"rollout": ROLLOUT}) as tape:
            environment.in_samples.apply(SAMPLES / "weightrollout.yaml")
            tape.until("it goes to v1", lambda t: _goes_to_v1(t.latest("rollout")[0]), 180)
            kill_container(environment, operator, "operator")
        # nobody writes a status now, and the next operator takes longer to start than this to read
        rollout = environment.in_samples.get("weightrollout", "tiny-llama")
        assert _goes_to_v1(rollout), "it was over when the operator was killed"
        eventually("the kill seen", lambda: lives(environment, "operator") > before)
        converges(environment, cold)


def _goes_to_v1(rollout: Body) -> bool:
    """Begun, and not complete."""
    return bool(rollout["status"]["target"]["version"] == "v1") and not is_ready(rollout, 0)


def test_vllm_killed_on_its_way(environment: Environment, cold: dict[str, list[int]]) -> None:
    """From when it prepares; `test_way_back` kills one in the middle of its commit."""
    pod = environment.in_samples.pods(LABEL)[0]
    uid = pod["metadata"]["uid"]
    with witness(environment, cold):
        with record(environment.kubectl, {"node": NODES}) as tape:
            environment.in_samples.apply(SAMPLES / "weightrollout.yaml")
            tape.until("it prepares or commits", lambda t: _is_on_its_way(t, uid), 180)
            kill_container(environment, pod, "vllm")
        eventually("the kill seen", lambda: restarts_of(environment, uid) > restarts(pod))
        converges(environment, cold)


def _is_on_its_way(tape: Tape, uid: str) -> bool:
    said = {word["phase"] for word in words(tape, uid)}
    return not said.isdisjoint(("Preparing", "Prepared", "Committing"))


def restarts_of(environment: Environment, uid: str) -> int:
    pods = environment.in_samples.pods(LABEL)
    return next(restarts(pod) for pod in pods if pod["metadata"]["uid"] == uid)


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
        with pytest.raises(CommandFailed):
            environment.in_samples.pods(LABEL)
        time.sleep(20)
        environment.cluster.control_plane.start_apiserver()
        converges(environment, cold)
