"""How this machine reaches a pod's port, or a Service: directly where they have addresses here,
through kubectl elsewhere.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from e2e.harness.environment import Environment
from e2e.harness.kubectl import CommandFailed, TimedOut

_FORWARD_SECONDS = 30.0


@contextmanager
def reach(
    environment: Environment, pods: Sequence[dict[str, Any]], port: int
) -> Iterator[list[str]]:
    """``host:port`` for every pod, valid inside the context."""
    if environment.cluster is not None:
        yield [f"{pod['status']['podIP']}:{port}" for pod in pods]
        return
    with ExitStack() as stack:
        yield [stack.enter_context(_forwarded(environment, pod, port)) for pod in pods]


@contextmanager
def reach_service(environment: Environment, name: str, port: int) -> Iterator[str]:
    """Where a Service of the samples' namespace answers, valid inside the context. Each connection
    goes to whichever pod is in the Service at that moment, and fails when none is: through
    kube-proxy here, through the API server's proxy elsewhere (a forwarded port stays with one pod).
    """
    kubectl = environment.in_samples
    if environment.cluster is not None:
        yield f"{kubectl.get('service', name)['spec']['clusterIP']}:{port}"
        return
    command = [
        str(kubectl.binary), "--kubeconfig", str(kubectl.kubeconfig), "proxy", "--port=0",
    ]  # fmt: skip
    with _listening(command) as address:
        path = f"api/v1/namespaces/{kubectl.namespace}/services/{name}:{port}/proxy"
        yield f"{address}/{path}"


@contextmanager
def _forwarded(environment: Environment, pod: dict[str, Any], port: int) -> Iterator[str]:
    kubectl = environment.kubectl
    command = [
        str(kubectl.binary), "--kubeconfig", str(kubectl.kubeconfig), "--namespace", pod["metadata"]["namespace"],
        "port-forward", f"pod/{pod['metadata']['name']}", f":{port}",
    ]  # fmt: skip
    with _listening(command) as address:
        yield address


@contextmanager
def _listening(command: Sequence[str]) -> Iterator[str]:
    """``host:port`` of a kubectl that listens while the context lasts."""
    # a pipe that nobody reads would be full after some thousand connections
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            yield _address(process, said, " ".join(command))
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: subprocess.Popen[bytes], said: IO[bytes], command: str) -> str:
    """Where kubectl says that it listens."""
    deadline = time.monotonic() + _FORWARD_SECONDS
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        # kubectl writes at the offset that a seek would move
        text = os.pread(said.fileno(), 65536, 0).decode()
        if found := re.search(r"127\.0\.0\.1:(\d+)", text):
            return f"127.0.0.1:{found[1]}"
        if ended:
            raise CommandFailed(f"{command}: {text.strip()}")
        time.sleep(0.05)
    raise TimedOut(f"{command} said nothing of a port within {_FORWARD_SECONDS:g} s")
