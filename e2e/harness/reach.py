"""How this machine reaches a pod's port: directly where pods have addresses here, through kubectl elsewhere."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from e2e.harness.environment import Environment
from e2e.harness.kubectl import CommandFailed


@contextmanager
def reach(environment: Environment, pods: Sequence[dict[str, Any]], port: int) -> Iterator[list[str]]:
    """``host:port`` for every pod, valid inside the context."""
    if environment.cluster is not None:
        yield [f"{pod['status']['podIP']}:{port}" for pod in pods]
        return
    with ExitStack() as stack:
        yield [stack.enter_context(_forwarded(environment, pod, port)) for pod in pods]


@contextmanager
def _forwarded(environment: Environment, pod: dict[str, Any], port: int) -> Iterator[str]:
    kubectl = environment.kubectl
    command = [
        str(kubectl.binary), "--kubeconfig", str(kubectl.kubeconfig), "--namespace", pod["metadata"]["namespace"],
        "port-forward", f"pod/{pod['metadata']['name']}", f":{port}",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        found = re.search(r"127\.0\.0\.1:(\d+)", line)
        if found is None:
            raise CommandFailed(f"{' '.join(command)}: {line.strip()}")
        yield f"127.0.0.1:{found.group(1)}"
    finally:
        process.terminate()
        process.wait(timeout=10)
