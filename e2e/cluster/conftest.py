"""One cluster with two vLLM pods for all of these tests; every test begins with the rollout
complete on v0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.harness import cold as cold_starts
from e2e.harness import docs, samples
from e2e.harness.environment import ROOT, SAMPLES, Environment, diagnose, provide
from e2e.harness.reach import reach
from e2e.harness.story import table
from e2e.harness.traffic import complete_ids

PROMPT, TOKENS = cold_starts.PROMPT, cold_starts.TOKENS
WAY_BACK = pytest.StashKey[list[dict[str, Any]]]()
"""What `test_way_back` found out: one row for each of its cases."""


def pytest_report_header() -> list[str]:
    """What the documents say and nobody tries here."""
    return [f"not run: {block}: {block.not_run}" for block in docs.not_run()]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The way back, case by case, also when all is well; and in ``build/way-back.json``."""
    if rows := config.stash.get(WAY_BACK, []):
        header = tuple(rows[0])
        cells = [
            tuple("-" if value is None else str(value) for value in row.values()) for row in rows
        ]
        terminalreporter.section("the way back")
        terminalreporter.write_line(table(tuple(name.upper() for name in header), cells))
        (ROOT / "build").mkdir(exist_ok=True)
        (ROOT / "build" / "way-back.json").write_text(json.dumps(rows, indent=2) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "e2e/cluster" in str(item.path):
            item.add_marker(pytest.mark.cluster)
            # the first of them starts the cluster, builds the images, and starts two engines
            item.add_marker(pytest.mark.timeout(2400))


@pytest.fixture(scope="session")
def installed() -> Iterator[Environment]:
    """The cluster with Hotweights on it, and no pods yet."""
    environment = provide()
    try:
        yield environment
    finally:
        if environment.cluster is not None:
            environment.cluster.down()


@pytest.fixture(scope="session")
def cluster_environment(installed: Environment) -> Environment:
    """The same with the sample's two pods."""
    samples.start_pods(installed)
    return installed


@pytest.fixture
def environment(
    cluster_environment: Environment, request: pytest.FixtureRequest
) -> Iterator[Environment]:
    """The cluster, at v0; what it looked like is printed when the test failed."""
    cluster_environment.in_samples.apply(
        SAMPLES / "weightversion-v0.yaml",
        SAMPLES / "weightversion.yaml",
        SAMPLES / "weightrollout-v0.yaml",
    )
    samples.until_ready(cluster_environment)
    failed_before = request.session.testsfailed
    yield cluster_environment
    if request.session.testsfailed > failed_before:
        print(diagnose(cluster_environment))


@pytest.fixture(scope="session")
def cold() -> dict[str, list[int]]:
    """What a vLLM answers that is started cold, by version."""
    found = {version: cold_starts.answers(version, PROMPT, TOKENS) for version in ("v0", "v1")}
    assert found["v0"] != found["v1"], "whatever a pod served, it would pass"
    return found


def answers(environment: Environment, selector: str = "app=tiny-llama") -> list[list[int]]:
    """What every pod answers now."""
    with reach(environment, environment.in_samples.pods(selector), 8000) as addresses:
        return [complete_ids(address, PROMPT, TOKENS) for address in addresses]
