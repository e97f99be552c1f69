"""What the API server says of pods' gates, or of another condition, change by change: times in
statuses have whole seconds, the order of changes is exact.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from e2e.harness.kubectl import CommandFailed, Kubectl

_SHOWN = '{{.metadata.name}} {{.status.conditions[?(@.type=="{}")].status}}{{"\\n"}}'


@dataclass
class Gates:
    """Every state of the gates since the watch began."""

    now: dict[str, str] = field(default_factory=dict)
    most_closed: int = 0
    """How many were False at the same time."""
    closed: set[str] = field(default_factory=set)
    """Pods whose gate was False at any time."""

    def note(self, pod: str, gate: str) -> None:
        self.now[pod] = gate
        shut = {name for name, value in self.now.items() if value == "False"}
        self.closed |= shut
        self.most_closed = max(self.most_closed, len(shut))


@contextmanager
def watch_gates(
    kubectl: Kubectl, selector: str, condition: str = "hotweights.dev/weights"
) -> Iterator[Gates]:
    """Follow the gates of the selected pods, or another condition of theirs, while the context
    lasts. Raises `CommandFailed` where the watch has ended before: silence would look like gates
    that do not change.
    """
    gates = Gates()
    began = threading.Event()
    command = [
        str(kubectl.binary), "--kubeconfig", str(kubectl.kubeconfig), "--namespace", kubectl.namespace,
        "get", "pods", "--selector", selector, "--watch", "--output", f"jsonpath={_SHOWN.format(condition)}",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def follow() -> None:
        if process.stdout is None:
            return
        with process.stdout as lines:
            for line in lines:
                note(line)

    def note(line: str) -> None:
        pod, _, gate = line.strip().partition(" ")
        gates.note(pod, gate)
        began.set()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        if not began.wait(60):
            raise TimeoutError(f"{' '.join(command)}: no pod within 60 s")
        yield gates
        if process.poll() is not None:
            raise CommandFailed(f"{' '.join(command)} ended with {process.returncode}")
    finally:
        process.terminate()
        process.wait(60)
        thread.join(60)
