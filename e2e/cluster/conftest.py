"""One cluster with two vLLM pods for all of these tests; every test begins with the rollout complete on v0."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from e2e.harness import docs, samples
from e2e.harness.environment import SAMPLES, Environment, diagnose, provide
from e2e.harness.reach import reach
from e2e.harness.traffic import complete_ids
from localvllm import models

PROMPT = tuple(range(30, 70))
TOKENS = 24


def pytest_report_header() -> list[str]:
    """What the documents say and nobody tries here."""
    return [f"not run: {block}: {block.not_run}" for block in docs.not_run()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "e2e/cluster" in str(item.path):
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def cluster_environment() -> Iterator[Environment]:
    environment = provide()
    try:
        samples.start_pods(environment)
        yield environment
    finally:
        if environment.cluster is not None:
            environment.cluster.down()


@pytest.fixture
def environment(cluster_environment: Environment, request: pytest.FixtureRequest) -> Iterator[Environment]:
    """The cluster, at v0; what it looked like is printed when the test failed."""
    cluster_environment.in_samples.apply(
        SAMPLES / "weightversion-v0.yaml", SAMPLES / "weightversion.yaml", SAMPLES / "weightrollout-v0.yaml"
    )
    samples.until_ready(cluster_environment)
    failed_before = request.session.testsfailed
    yield cluster_environment
    if request.session.testsfailed > failed_before:
        print(diagnose(cluster_environment))


@pytest.fixture(scope="session")
def cold(cluster_environment: Environment) -> dict[str, list[int]]:
    """What a vLLM answers that is started cold, by version."""
    folder = cluster_environment.models / "tiny-llama"
    return {version: models.greedy_text(folder / version, [PROMPT], TOKENS)[0] for version in ("v0", "v1")}


def answers(environment: Environment, selector: str = "app=tiny-llama") -> list[list[int]]:
    """What every pod answers now."""
    with reach(environment, environment.in_samples.pods(selector), 8000) as addresses:
        return [complete_ids(address, PROMPT, TOKENS) for address in addresses]
