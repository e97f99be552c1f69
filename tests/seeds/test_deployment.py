"""`deployment.md`, block by block, in the order of the document."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.timeout(1200)  # the first one installs everything
Find = Callable[[str, str], str]
COORDINATOR = "hotweights coord-serve --endpoint tcp://127.0.0.1:5555 &"
STATUS = "hotweights coord-status --timeout 60"  # one that has just begun may not lead yet


@pytest.fixture
def plan(house: Any, block: Find) -> None:
    """The document's plan in the folder, and the coordinator that it was submitted to."""
    house.run(block("Coordinator & Metrics", COORDINATOR + "\n# Metrics"))
    house.run(block("Create Manifests & Plan", "hotweights publish"))


def value(metrics: str, name: str) -> float:
    found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", metrics, re.MULTILINE)
    assert found, f"no {name} in:\n{metrics}"
    return float(found[1])


def test_the_coordinator_serves_metrics(house: Any, block: Find) -> None:
    house.run(block("Coordinator & Metrics", COORDINATOR + "\n# Metrics"))
    metrics = house.scrape("http://localhost:9100/metrics")
    assert value(metrics, "hotweights_coord_workers") == 0
    assert "idle" in house.run(STATUS)


@pytest.mark.usefixtures("redis")
def test_redis_keeps_the_state(house: Any, block: Find) -> None:
    text = block("Coordinator & Metrics", "HOTWEIGHTS_COORD_BACKEND=redis")
    house.run(text)
    house.scrape("http://localhost:9100/metrics")
    house.run(block("Create Manifests & Plan", "hotweights publish"))
    house.close()  # the coordinator is gone, what it knew is not
    house.run(text.replace("pip install redis\n", ""))
    house.scrape("http://localhost:9100/metrics")
    status = json.loads(house.run(f"{STATUS} --json"))
    assert (status["state"], status["version"]) == ("begun", "v1")


@pytest.mark.usefixtures("plan")
def test_manifests_and_plan(house: Any) -> None:
    plan = json.loads((house.folder / "plan.json").read_text())
    items = [item for bucket in plan["buckets"] for item in bucket["items"]]
    assert {item["tensor"] for item in items} == {"head.weight", "new.bias"}
    assert plan["removed"] == ["old.bias"]
    assert {"key", "tensor", "nbytes", "hash", "uri", "dtype", "shape", "offset"} <= set(items[0])
    names = {
        item["key"]: item["tensor"].replace("/", ".")
        for bucket in plan["buckets"]
        for item in bucket["items"]
    }
    assert len(names) == len(items)
    status = json.loads(house.run(f"{STATUS} --json"))
    assert (status["state"], status["version"]) == ("begun", "v1")


@pytest.mark.usefixtures("plan")
def test_replicate_puts_the_weights_in_place(house: Any, block: Find) -> None:
    house.run(block("Replicate Locally", "--verify --commit --device cpu"))
    assert weights(house.folder / "home/.cache/hotweights/current") == weights(
        house.folder / "ckpt_b"
    )


@pytest.mark.usefixtures("plan")
def test_replicate_serves_metrics_while_it_runs(house: Any, block: Find) -> None:
    text = block("Replicate Locally", "--verify --commit --device cpu")
    house.run(f"{{ {text.splitlines()[0]} --metrics-hold 60; }} &")
    metrics = house.scrape("http://localhost:9097/metrics")
    assert "hotweights_" in metrics


@pytest.mark.usefixtures("plan")
def test_replicate_to_a_gpu_falls_back_and_says_so(house: Any, block: Find) -> None:
    """The packages of the block's first line exist at no index under these names: ``pip install -e
    .[gds]`` is what works.
    """
    text = block("Replicate Locally", "HOTWEIGHTS_USE_GDS=1")
    printed = house.run(text.partition("\n")[2])
    assert re.search(r"gds|pinned|no GPU", printed)


@pytest.mark.usefixtures("plan")
def test_two_ranks_over_ucx(house: Any, block: Find) -> None:
    printed = house.run(block("UCX Broadcast Demo", "run_ucx_broadcast_demo.sh"))
    assert "images equal: True" in printed
    assert re.search(r"[\d.]+ [GM]B/s", printed)


@pytest.mark.usefixtures("plan")
def test_two_ranks_over_mpi(house: Any) -> None:
    printed = house.run("./scripts/run_mpi_broadcast_demo.sh plan.json")
    assert "images equal: True" in printed
    assert re.search(r"[\d.]+ [GM]B/s", printed)


@pytest.mark.usefixtures("plan")
def test_a_worker_joins_late(house: Any, block: Find) -> None:
    house.run(block("Worker Agent", "run_worker_ucx_demo.sh").replace("demo.sh\n", "demo.sh &\n"))
    metrics = house.scrape("http://localhost:9099/metrics")
    assert "hotweights_agent_staged_bytes_total" in metrics
    house.run("hotweights commit --version v1 --wait --timeout 60")
    status = json.loads(house.run(f"{STATUS} --json"))
    assert status["state"] == "committed"


@pytest.mark.usefixtures("plan")
def test_the_benchmark(house: Any, block: Find) -> None:
    printed = house.run(block("Benchmark", "bench_replicate.py"))
    assert re.search(r"[\d.]+ [GM]B/s", printed)


def weights(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes, whatever the files are called."""
    found: dict[str, bytes] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {name: array.tobytes() for name, array in load_file(file).items()}
    assert found, f"no weights in {folder}"
    return found
