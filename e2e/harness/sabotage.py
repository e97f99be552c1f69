"""What the tests have their engines do with a version: the orders that `e2e/cluster/sabotage` reads
in the pods.

The plugin and its file lie in the folder of the models, which every pod mounts: so a change is seen
at once, by pods that boot too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from e2e.harness.environment import MODELS_IN_PODS
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
