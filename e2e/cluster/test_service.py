"""Clients who know a Service, and no pod, notice nothing of a new version: not with a single pod,
and not when all pods change at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

import pytest

from e2e.cluster.conftest import answers
from e2e.harness import samples
from e2e.harness.environment import Environment
from e2e.harness.kubectl import eventually
from e2e.harness.reach import reach_service
from e2e.harness.shown import READY, watch_shown
from e2e.harness.traffic import Traffic

SERVICE, PORT = "tiny-llama", 8000
LABEL = "app=tiny-llama"
CLIENTS = 3
TOKENS = 4  # short: many of them begin in each pause
ENOUGH = 30  # answers for each change of version


@pytest.fixture
def replicas(environment: Environment, request: pytest.FixtureRequest) -> Iterator[int]:
    """So many pods for this test; two again after it."""
    wanted: int = request.param
    samples.scale(environment, wanted)
    yield wanted
    samples.scale(environment, 2)
    samples.until_ready(environment, timeout_seconds=samples.START_SECONDS)


@pytest.mark.parametrize(
    ("replicas", "strategy"), [(1, "Rolling"), (2, "AllAtOnce")], indirect=["replicas"]
)
def test_a_service_is_never_empty(
    environment: Environment, cold: dict[str, list[int]], replicas: int, strategy: str
) -> None:
    kubectl = environment.in_samples
    with (
        reach_service(environment, SERVICE, PORT) as address,
        watch_shown(kubectl, LABEL, READY) as ready,
        Traffic([address], plain=CLIENTS, max_tokens=TOKENS) as traffic,
    ):
        for version in ("v1", "v0", "v1"):
            before = traffic.requests
            lead_to(environment, version, strategy)
            samples.until_ready(environment)
            eventually("enough was asked", partial(has_asked, traffic, before + ENOUGH))
            assert answers(environment) == [cold[version]] * replicas
    assert traffic.failures == []
    # a pod that was scaled away may still be seen to end
    served = {pod["metadata"]["name"] for pod in kubectl.pods(LABEL)}
    assert served <= ready.now.keys()
    assert served.isdisjoint(ready.lacked)
    print(
        f"{replicas} replicas, {strategy}: {traffic.requests} requests through the Service, "
        f"0 failed; the slowest took {traffic.slowest_seconds:.2f} s"
    )


def has_asked(traffic: Traffic, requests: int) -> bool:
    return traffic.requests >= requests


def lead_to(environment: Environment, version: str, strategy: str) -> None:
    """One write: the version, and how pods go there."""
    spec = {
        "versionRef": {"name": f"tiny-llama-{version}"},
        "strategy": {"type": strategy, "rolling": None},
    }
    environment.in_samples(
        "patch",
        "weightrollout",
        "tiny-llama",
        "--type=merge",
        "--patch",
        json.dumps({"spec": spec}),
    )
