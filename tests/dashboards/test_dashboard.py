"""The Grafana dashboard: every query of a host without Kubernetes is answered by a real Prometheus
that scrapes real processes.

The rollouts' row is held against a real operator in ``e2e/cluster/test_metrics.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy
import pytest
from safetensors.numpy import save_file

from e2e.harness.prometheus import panels, prometheus
from tests.ports import free_ports

DASHBOARD = Path(__file__).parents[2] / "dashboards" / "hotweights.json"
PATIENCE_SECONDS = 120.0


def hotweights(*arguments: object, folder: Path, environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "hotweights.cli", *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def service(*arguments: str, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    with (folder / f"{arguments[0]}.log").open("w") as log:
        command = [sys.executable, "-m", "hotweights.cli", *arguments]
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0, (folder / f"{arguments[0]}.log").read_text()


@pytest.fixture
def home() -> Iterator[Path]:
    """A short one: a unix socket lies below it, whose path may have 107 bytes."""
    with TemporaryDirectory(prefix="hw") as folder:
        yield Path(folder)


@pytest.mark.timeout(600)
def test_every_query_is_answered(tmp_path: Path, home: Path) -> None:
    coordinator, coordinator_metrics, worker_metrics, events = free_ports(4)
    environment = os.environ | {
        "HOTWEIGHTS_COORD": f"tcp://127.0.0.1:{coordinator}",
        "HOTWEIGHTS_COORD_METRICS_PORT": str(coordinator_metrics),
        "HOTWEIGHTS_METRICS_PORT": str(worker_metrics),
        "HOME": str(home),
    }
    (tmp_path / "next").mkdir()
    save_file(
        {"weight": numpy.ones((64, 64), numpy.float32)}, tmp_path / "next" / "model.safetensors"
    )
    targets = [f"127.0.0.1:{coordinator_metrics}", f"127.0.0.1:{worker_metrics}"]
    with ExitStack() as stack:
        enter = stack.enter_context
        endpoint = f"tcp://127.0.0.1:{coordinator}"
        pub = f"tcp://127.0.0.1:{events}"
        enter(
            service(
                "coord-serve",
                "--endpoint",
                endpoint,
                "--pub-endpoint",
                pub,
                folder=tmp_path,
                environment=environment,
            )
        )
        enter(service("worker", "--root", ".", folder=tmp_path, environment=environment))
        server = enter(prometheus(tmp_path, targets))
        for command in (
            "publish --checkpoint next --version v1 --output next.json",
            "plan --next next.json --output plan.json",
            "coord-submit-plan --plan plan.json",
            "begin --version v1 --commit-when-ready --wait --wait-timeout 90 --timeout 60",
        ):
            hotweights(*command.split(), folder=tmp_path, environment=environment)
        server.until_scraped(len(targets))
        asked = panels(DASHBOARD, "Hosts (agents and workers)") + panels(DASHBOARD, "Coordinator")
        assert not server.unanswered(asked)


def test_it_is_a_dashboard_with_rows_units_and_a_choice_of_prometheus() -> None:
    document = json.loads(DASHBOARD.read_text())
    assert document["templating"]["list"][0]["type"] == "datasource"
    drawn = [panel for panel in document["panels"] if panel["type"] != "row"]
    assert {panel["id"] for panel in drawn} <= set(range(1, 1 + len(document["panels"])))
    for panel in drawn:
        assert panel["targets"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
