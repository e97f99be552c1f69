"""The agent as a process of its own, told by a real API server what to do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from localcluster import paths
from localcluster.controlplane import ControlPlane
from tests.helm.conftest import NAMESPACE


class AgentProcess:
    """``python -m hotweights_agent`` for one node; what it keeps on disk outlives it."""

    def __init__(
        self,
        plane: ControlPlane,
        token: Callable[[str], str],
        node: str,
        folder: Path,
        settings: Mapping[str, object],
    ) -> None:
        """``token``: its pod's, for an audience; none is the API server's."""
        self.node = node
        self.run_folder = folder / "r"
        self.log = folder / "log"
        state = folder / node
        state.mkdir(parents=True)
        kubeconfig, peer_token = state / "kubeconfig", state / "peer-token"
        paths.write_atomically(
            kubeconfig, plane.credentials.kubeconfig(plane.url, token("")), 0o600
        )
        peer_token.write_text(token("hotweights-peer"))
        self._config = state / "config.yaml"
        self.configure(settings)
        self.environment = os.environ | {
            "NODE_NAME": node,
            "POD_NAMESPACE": NAMESPACE,
            "POD_IP": "127.0.0.1",
            "KUBECONFIG": str(kubeconfig),
            "HOTWEIGHTS_CONFIG": str(self._config),
            "HOTWEIGHTS_RUN_FOLDER": str(self.run_folder),
            "HOTWEIGHTS_STATE_FOLDER": str(state / "state"),
            "HOTWEIGHTS_PLUGIN_FOLDER": str(state / "none"),
            "HOTWEIGHTS_PEER_TOKEN_FILE": str(peer_token),
            "HOTWEIGHTS_PEER_PORT": "0",
            "HOTWEIGHTS_METRICS_PORT": "0",
        }
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.run_folder / self.node / "agent.sock"

    def configure(self, settings: Mapping[str, object]) -> None:
        """What the next start finds."""
        self.settings = dict(settings)
        self._config.write_text(yaml.safe_dump(self.settings))

    def start(self) -> None:
        with self.log.open("ab") as log:
            words = [sys.executable, "-m", "hotweights_agent"]
            self.process = subprocess.Popen(words, env=self.environment, stderr=log, stdout=log)

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(number)
        code = self.process.wait(60)
        self.process = None
        return code

    def metrics(self) -> str:
        port = re.findall(r"metrics at port (\d+)", self.log.read_text())[-1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            return str(answer.read().decode())
