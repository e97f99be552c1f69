"""What pods show at the API server, change by change: times in statuses have whole seconds, the
order of changes is exact.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from e2e.harness.kubectl import CommandFailed, Kubectl

READY = '.status.conditions[?(@.type=="Ready")].status'
DIGEST = r".metadata.labels.hotweights\.dev/digest"


@dataclass
class Shown:
    """Every state of the pods since the watch began."""

    now: dict[str, str] = field(default_factory=dict)
    most_lacking: int = 0
    """How many showed nothing, or False, at the same time."""
    lacked: set[str] = field(default_factory=set)
    """Pods that showed nothing, or False, at any time."""

    def note(self, pod: str, value: str) -> None:
        self.now[pod] = value
        lacking = {name for name, value in self.now.items() if value in ("", "False")}
        self.lacked |= lacking
        self.most_lacking = max(self.most_lacking, len(lacking))


@contextmanager
def watch_shown(kubectl: Kubectl, selector: str, what: str) -> Iterator[Shown]:
    """Follow `READY` or `DIGEST` of the selected pods while the context lasts. Raises
    `CommandFailed` where the watch has ended before: silence would look like pods that do not
    change.
    """
    shown = Shown()
    began = threading.Event()
    command = [
        str(kubectl.binary), "--kubeconfig", str(kubectl.kubeconfig), "--namespace", kubectl.namespace,
        "get", "pods", "--selector", selector, "--watch",
        "--output", f'jsonpath={{.metadata.name}} {{{what}}}{{"\\n"}}',
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def follow() -> None:
        if process.stdout is None:
            return
        with process.stdout as lines:
            for line in lines:
                pod, _, value = line.strip().partition(" ")
                shown.note(pod, value)
                began.set()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        if not began.wait(60):
            raise TimeoutError(f"{' '.join(command)}: no pod within 60 s")
        yield shown
        if process.poll() is not None:
            raise CommandFailed(f"{' '.join(command)} ended with {process.returncode}")
    finally:
        process.terminate()
        process.wait(60)
        thread.join(60)
