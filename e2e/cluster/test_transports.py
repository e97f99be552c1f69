"""A rollout over MPI: the agents of both nodes get a version by one broadcast, with the rights and
the image of the chart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.cluster.conftest import answers
from e2e.cluster.test_bad_input import roll_out
from e2e.harness import checkpoints, samples
from e2e.harness.environment import SYSTEM, Environment, install, publish
from e2e.harness.kubectl import eventually

NAME = "broadcast"


@pytest.fixture
def with_mpi(environment: Environment) -> Iterator[None]:
    """The same release with MPI switched on."""
    install(environment, "agent.transports.mpi=true")
    yield
    environment.in_samples(
        "patch",
        "weightrollout",
        "tiny-llama",
        "--type=merge",
        "-p",
        json.dumps({"spec": {"staging": None}}),
    )
    install(environment)


def nodes(environment: Environment) -> dict[str, dict[str, Any]]:
    """What every agent says, by node."""
    items = environment.kubectl.get("nodeweights", "--namespace", SYSTEM)["items"]
    return {item["metadata"]["name"]: item.get("status", {}) for item in items}


def ready_for_mpi(environment: Environment) -> bool:
    """Whether every agent offers broadcasts and has every engine back at its version."""
    found = nodes(environment).values()
    offers = [
        {one["scheme"]: one.get("endpoint") for one in status.get("endpoints", [])}
        for status in found
    ]
    return [bool(o.get("mpi")) for o in offers] == [True] * 2 and [
        s.get("summary") for s in found
    ] == ["1/1"] * 2


@pytest.mark.usefixtures("with_mpi")
def test_a_rollout_by_broadcast(environment: Environment, cold: dict[str, list[int]]) -> None:
    eventually("agents with MPI", lambda: ready_for_mpi(environment), 300)
    checkpoints.copy(environment.models / "tiny-llama" / "v1", NAME)
    digest = publish(environment.models / "tiny-llama" / NAME, NAME)
    environment.in_samples(
        "patch",
        "weightrollout",
        "tiny-llama",
        "--type=merge",
        "-p",
        json.dumps({"spec": {"staging": {"transport": "MPI"}}}),
    )
    roll_out(environment, NAME)
    eventually(
        "both pods on it",
        lambda: (
            {
                pod["metadata"]["labels"].get("hotweights.dev/version")
                for pod in environment.in_samples.pods("app=tiny-llama")
            }
            == {NAME}
        ),
        300,
    )
    samples.until_ready(environment)
    assert answers(environment) == [cold["v1"]] * 2
    found = nodes(environment)
    assert len(found) == 2
    for name, status in found.items():
        staged = {one["digest"]: one for one in status["staged"]}[digest]
        assert staged["message"].startswith("by a broadcast to 2 nodes"), (name, staged)
