"""A version is shown to one pod first: somebody promotes it, or takes it back, or it goes back by
itself; and the pods that are no canaries are left alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from e2e.cluster.conftest import answers
from e2e.cluster.test_bad_input import create_version, lead_to
from e2e.harness import checkpoints, samples
from e2e.harness.environment import Environment
from e2e.harness.kubectl import eventually
from e2e.harness.shown import DIGEST, watch_shown
from hotweights_planner import manifest

LABEL = "app=tiny-llama"
COMMAND = "hotweights.dev/command"
STEP_SECONDS = 300.0


@pytest.fixture(autouse=True)
def one_pod_first(environment: Environment) -> Iterator[None]:
    """One canary, until somebody promotes it; without steps again after the test."""
    steps = [{"setReplicas": 1}, {"pause": {}}]
    patch(environment, {"strategy": {"canary": {"steps": steps}}})
    yield
    patch(
        environment,
        {"strategy": {"canary": None}, "failurePolicy": {"action": "Pause"}, "paused": False},
    )


def patch(environment: Environment, spec: dict[str, Any]) -> None:
    environment.in_samples(
        "patch", "weightrollout", "tiny-llama", "--type=merge", "-p", json.dumps({"spec": spec})
    )


def rollout(environment: Environment) -> dict[str, Any]:
    return environment.in_samples.get("weightrollout", "tiny-llama")


def command(environment: Environment, verb: str) -> dict[str, Any]:
    """Command it, and what came of that."""
    text = f"{verb} {rollout(environment)['status']['revision']}"
    environment.in_samples(
        "annotate", "weightrollout", "tiny-llama", f"{COMMAND}={text}", "--overwrite"
    )
    found: dict[str, Any] = eventually(f"an answer to {text}", partial(_answer, environment, text))
    return found


def _answer(environment: Environment, text: str) -> dict[str, Any] | None:
    answer: dict[str, Any] = rollout(environment)["status"].get("lastCommand", {})
    return answer if answer.get("text") == text else None


def until_promotion_is_waited_for(environment: Environment, name: str) -> None:
    def waits() -> bool:
        status = rollout(environment)["status"]
        at_it = status["target"]["name"] == name and status["phase"] == "Paused"
        return bool(at_it and status["canary"]["waitsFor"] == "Promotion")

    eventually("the canary waits for a promotion", waits, STEP_SECONDS)


def versions(environment: Environment) -> list[str]:
    """What the pods' labels say, sorted."""
    pods = environment.in_samples.pods(LABEL)
    return sorted(samples.version_of(environment, pod["metadata"]["name"]) for pod in pods)


def test_a_canary_is_promoted(environment: Environment, cold: dict[str, list[int]]) -> None:
    lead_to(environment, "v1")
    until_promotion_is_waited_for(environment, "tiny-llama-v1")
    assert versions(environment) == ["v0", "v1"]
    assert sorted(answers(environment)) == sorted([cold["v0"], cold["v1"]])
    answer = command(environment, "promote")
    assert answer["outcome"] == "Done", answer["message"]
    samples.until_ready(environment)
    assert answers(environment) == [cold["v1"]] * 2
    # late, and for a revision that is complete: said, and nothing happens
    assert command(environment, "rollback@v9")["outcome"] == "Refused"
    assert versions(environment) == ["v1", "v1"]


def test_what_is_complete_goes_back_by_a_command(
    environment: Environment, cold: dict[str, list[int]]
) -> None:
    """Without a byte of the network, beside a spec that still names the new version."""
    patch(environment, {"strategy": {"canary": None}})
    lead_to(environment, "v1")
    samples.until_ready(environment)
    fetched = fetched_bytes(environment)
    began = time.monotonic()
    answer = command(environment, "rollback")
    assert answer["outcome"] == "Done", answer["message"]
    eventually("all are back", lambda: versions(environment) == ["v0", "v0"], STEP_SECONDS)
    print(f"command to the last label of v0: {time.monotonic() - began:.1f} s")
    samples.until_condition(environment, "Stalled", "RolledBack")
    assert answers(environment) == [cold["v0"]] * 2
    assert fetched_bytes(environment) == fetched
    body = rollout(environment)
    assert body["spec"]["versionRef"]["name"] == "tiny-llama-v1"
    assert body["status"]["phase"] == "RolledBack"
    assert body["status"]["rolledBack"]["to"]["version"] == "v0"
    assert command(environment, "retry")["outcome"] == "Done"
    samples.until_ready(environment)
    assert answers(environment) == [cold["v1"]] * 2


def test_a_bad_version_goes_back_by_itself(
    environment: Environment, cold: dict[str, list[int]]
) -> None:
    """Its canary answers other tokens than were recorded; the other pod is never asked."""
    good = environment.models / "tiny-llama" / "v1"
    folder = checkpoints.copy(good, "other-tokens")
    body = json.loads((good / manifest.FILE_NAME).read_bytes())
    body["version"] = "other-tokens"
    for probe in body["probes"]:
        probe["tokenIds"] = [token ^ 1 for token in probe["tokenIds"]]
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    (folder / manifest.FILE_NAME).write_bytes(text)
    patch(environment, {"failurePolicy": {"action": "Rollback"}})
    create_version(environment, "other-tokens")
    with watch_shown(environment.in_samples, LABEL, DIGEST) as shown:
        lead_to(environment, "other-tokens")
        stalled = samples.until_condition(environment, "Stalled", "RolledBack")
    assert "ProbeMismatch" in stalled["message"]
    assert len(shown.lacked) == 1, "only the canary was asked to change"
    assert versions(environment) == ["v0", "v0"]
    assert answers(environment) == [cold["v0"]] * 2


def fetched_bytes(environment: Environment) -> list[tuple[str, str, int]]:
    """What came to each node from elsewhere for each version that it holds."""
    items = environment.kubectl.get("nodeweights", "--all-namespaces")["items"]
    return sorted(
        (item["metadata"]["name"], staged["digest"], staged.get("bytesFetched", 0))
        for item in items
        for staged in item.get("status", {}).get("staged", [])
    )
