"""What may import what is a contract that is checked: a forbidden import in a copy of each layer
makes the check fail, and names it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
PACKAGES = tuple(CONFIG["root_packages"])

FORBIDDEN = (
    ("Layers", "hotweights_common.hosts", "hotweights_crds"),
    ("Layers", "hotweights_crds.base", "hotweights_planner"),
    ("Layers", "hotweights_planner.pull_routes", "hotweights_storage"),
    ("Layers", "hotweights_storage.linux", "hotweights_transports"),
    ("Layers", "hotweights_transports.peers.frames", "hotweights_agent"),
    ("Layers", "hotweights_kube.errors", "hotweights_operator"),
    ("Layers", "hotweights_agent.session.retry", "hotweights"),
    ("Layers", "hotweights_coordinator.wire.address", "hotweights_agent"),
    ("Layers", "hotweights_operator.model.fencing", "hotweights_agent"),
    ("Within the agent", "hotweights_agent.staging.progress", "hotweights_agent.local.state_file"),
    ("Within the agent", "hotweights_agent.session.phases", "hotweights_agent.engines.limits"),
    (
        "Within the operator",
        "hotweights_operator.model.selectors",
        "hotweights_operator.decide.blocked",
    ),
    ("Within the operator", "hotweights_operator.runtime.queue", "hotweights_operator.sim"),
    (
        "Within the coordinator",
        "hotweights_coordinator.state.state",
        "hotweights_coordinator.backends.base",
    ),
    (
        "Within the transports",
        "hotweights_transports.peers.base",
        "hotweights_transports.broadcast.group",
    ),
    (
        "TCP and UCX",
        "hotweights_transports.peers.stream.timed_socket",
        "hotweights_transports.peers.ucx",
    ),
    ("The bottom floor", "hotweights_common.sizes", "prometheus_client"),
    ("The planner is pure", "hotweights_planner.layout", "random"),
    ("The planner is pure", "hotweights_crds.conditions", "time"),
    ("Decisions are pure", "hotweights_operator.decide.disruption_budget", "time"),
    ("Decisions are pure", "hotweights_operator.model.selectors", "logging"),
    ("A node's session", "hotweights_agent.session.phases", "socket"),
    ("What moves bytes", "hotweights_storage.linux", "hotweights_crds"),
    ("A coordinator's rules", "hotweights_coordinator.state.membership", "time"),
    ("Only the Redis store", "hotweights_coordinator.server.replies", "redis"),
    ("Staging knows no engine", "hotweights_agent.staging.progress", "hotweights_agent.engines"),
    ("Only the handlers know kopf", "hotweights_operator.runtime.loop", "kopf"),
    ("Only hotweights_kube knows", "hotweights_agent.kube.sync", "kubernetes"),
    ("What runs inside vLLM", "hotweights.adapters.vllm.agent_connection", "hotweights_common"),
    ("What runs inside vLLM", "hotweights_transports.handoff.frames", "pydantic"),
)
"""A contract's name, a module, and what it may not import."""


def folder_of(package: str) -> Path:
    """Where a package lies: in a top folder of its own name, or in the root."""
    return (
        Path(package)
        if package == "hotweights"
        else Path(package.removeprefix("hotweights_")) / package
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the check says of a tree with all of these imports in it."""
    copy = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        shutil.copytree(
            ROOT / folder_of(package),
            copy / folder_of(package),
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shutil.copy(ROOT / "pyproject.toml", copy)
    for _, module, imported in FORBIDDEN:
        top, *rest = module.split(".")
        path = copy.joinpath(folder_of(top), *rest).with_suffix(".py")
        path.write_text(path.read_text() + f"\nimport {imported}\n")
    paths = {str(copy / folder_of(package).parent) for package in PACKAGES}
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sorted(paths)), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(320)  # the fixture looks at the whole tree
@pytest.mark.parametrize(("contract", "module", "imported"), FORBIDDEN)
def test_a_forbidden_import_is_found(told: str, contract: str, module: str, imported: str) -> None:
    assert f"{module} -> {imported} " in told.replace("\n", " ").replace("  ", " ")
    assert any(line.startswith(contract) and "BROKEN" in line for line in told.splitlines()), told


def test_each_contract_and_each_layer_is_tried() -> None:
    tried = {contract for contract, _, _ in FORBIDDEN}
    names = [contract["name"] for contract in CONFIG["contracts"]]
    assert [name for name in names if not any(name.startswith(begin) for begin in tried)] == []
    layers = [name.strip() for line in CONFIG["contracts"][0]["layers"] for name in line.split("|")]
    assert sorted(layers) == sorted(PACKAGES)
    tried_layers = {
        module.split(".")[0] for contract, module, _ in FORBIDDEN if contract == "Layers"
    }
    assert tried_layers == set(layers) - {layers[0]}
