"""What the tests do to those who serve: orders to their engines, which `e2e/cluster/sabotage` reads
in the pods, and signals to their containers.

The plugin and its file lie in the folder of the models, which every pod mounts: so a change is seen
at once, by pods that boot too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from e2e.harness.environment import MODELS_IN_PODS, Environment
from e2e.harness.kubectl import CommandFailed, run
from localcluster import paths

PLUGIN = Path(__file__).parents[1] / "cluster" / "sabotage"
EVERYWHERE = "*"
VARIABLES = {
    "PYTHONPATH": f"{MODELS_IN_PODS}/sabotage",
    "VLLM_PLUGINS": "cluster_sabotage",
    "HOTWEIGHTS_SABOTAGE": f"{MODELS_IN_PODS}/sabotage/orders.json",
}
"""What a pod's template says, so that its engine has the plugin."""


class Sabotage:
    """The orders for all pods."""

    def __init__(self, models: Path) -> None:
        """Put the plugin into the folder of the models, without any order."""
        self._folder = models / "sabotage"
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.copytree(PLUGIN, self._folder, ignore=shutil.ignore_patterns("__pycache__"))

    def order(self, digest: str, deeds: Mapping[str, str]) -> None:
        """Deeds by pod, for this version alone; every order before is forgotten."""
        paths.write_atomically(self._folder / "orders.json", json.dumps({digest: dict(deeds)}))

    def clear(self) -> None:
        """Nothing is bad any more."""
        (self._folder / "orders.json").unlink(missing_ok=True)


def kill_container(
    environment: Environment, pod: dict[str, Any], container: str, signal: str = "SIGKILL"
) -> None:
    """Signal a container's main process from outside, as the kernel's out-of-memory killer would
    kill it; the kubelet will notice that it ended and start it again.
    """
    if environment.cluster is None:
        raise CommandFailed(
            "killing containers needs the nodes' containerd: run the e2e without KUBECONFIG"
        )
    status = next(s for s in pod["status"]["containerStatuses"] if s["name"] == container)
    identity = status["containerID"].removeprefix("containerd://")
    node = next(n for n in environment.cluster.nodes if n.name == pod["spec"]["nodeName"])
    run(*node.ctr(), "tasks", "kill", "--signal", signal, identity, timeout_seconds=60)
